"""A small net with everything that a conversion must carry over, and every method on it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import filterwise as fw
from filterwise.methods.registry import METHODS


class Net(nn.Module):
    """Residual, with a reused layer, tied and frozen weights, dropout, groups and a way up."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.branch = nn.Sequential(
            nn.Conv2d(16, 16, 3, padding=1, groups=2, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Dropout(0.1),
        )
        self.twice = nn.Conv2d(16, 16, 1)
        self.tied = nn.Conv2d(16, 16, 1)
        self.tied.weight = self.twice.weight
        self.again = self.branch[0]
        self.frozen = nn.Conv2d(16, 16, (1, 3), padding=(0, 1))
        self.frozen.weight.requires_grad_(False)
        self.up = nn.ConvTranspose2d(16, 8, 2, stride=2)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(x + self.branch(x))
        x = torch.relu(self.tied(torch.relu(self.twice(x))))
        x = torch.relu(self.frozen(x + 0.1 * self.again(x)))
        return self.head(self.up(x).mean((2, 3)))


@dataclass(frozen=True)
class NetCase:
    """A method with its defaults, on `Net`."""

    name: str
    norm: str = "keep"
    preserve: bool = False

    @property
    def id(self) -> str:
        """As in ``keep+ws``."""
        return f"{self.norm}+{self.name}{',preserve' if self.preserve else ''}"

    @property
    def has_gain(self) -> bool:
        """Whether converted layers have gains."""
        return self.method.has_gain or self.preserve

    @property
    def method(self) -> Any:
        """The method; one label for all weights where labels are needed."""
        cls = METHODS[self.name]
        return cls(label=[0]) if cls.cells else cls()

    @property
    def exclude(self) -> str | None:
        """What the method cannot take."""
        return "up" if METHODS[self.name].uses_input else None

    def net(self, dtype: torch.dtype = torch.float32) -> Net:
        """Return a plain net with perturbed norms, always the same."""
        torch.manual_seed(3)
        net = Net().to(dtype)
        with torch.no_grad():
            for module in net.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.weight.uniform_(0.5, 1.5)
                    module.bias.normal_(0.0, 0.2)
                    module.running_mean.normal_(0.0, 0.2)
                    module.running_var.uniform_(0.5, 1.5)
        return net

    def convert(self, net: nn.Module, **options: Any) -> fw.Report:
        """Convert a net; what nothing normalizes is meant here."""
        if self.exclude:
            options.setdefault("exclude", self.exclude)
        if self.preserve:
            options.setdefault("preserve", True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", fw.FilterwiseWarning)
            return fw.convert_(net, fw.Recipe(self.norm, self.method), **options)

    def converted(self, dtype: torch.dtype = torch.float32) -> Net:
        """Return a converted net after two steps of training, so that nothing is at its start."""
        net = self.net(dtype)
        self.convert(net)
        train(net, 2)
        return net.eval()


NET_CASES = [NetCase(name) for name in METHODS] + [NetCase("ws", "gn"), NetCase("wa", "none")]
NET_CASES += [NetCase("ws", preserve=True), NetCase("wa", "none", preserve=True)]


def batch(
    dtype: torch.dtype = torch.float32, samples: int = 4, size: int = 6, seed: int = 0
) -> Tensor:
    """Return positive pictures."""
    source = torch.Generator().manual_seed(seed)
    return torch.rand(samples, 3, size, size, generator=source, dtype=torch.float64).to(dtype)


def train(net: nn.Module, steps: int, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Take a few small steps on a fixed loss."""
    optimizer = optimizer or torch.optim.SGD(net.parameters(), lr=1e-2, momentum=0.9)
    dtype = next(net.parameters()).dtype
    net.train()
    with quiet():
        for step in range(steps):
            optimizer.zero_grad()
            net(batch(dtype, seed=step)).square().mean().backward()
            optimizer.step()


@contextmanager
def quiet() -> Iterator[None]:
    """Ignore filterwise's own warnings, where a law is about something else."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fw.FilterwiseWarning)
        yield
