"""One training scenario done twice, as ever and with `defer`, and what both leave compared."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

import filterwise as fw

Defer = Callable[..., AbstractContextManager[Any]]
Scenario = Callable[[Any, Defer], Any]

EXACT = 1e-12
"""Largest difference of a float64 gradient, in units of its largest entry."""


def as_ever(model: nn.Module, enabled: bool = True) -> AbstractContextManager[Any]:
    """Stand in for `defer` and do nothing: the ordinary way."""
    del model, enabled
    return nullcontext()


def convert(model: nn.Module, method: Any, select: Any = None) -> nn.Module:
    """Convert every weight layer (or those selected), leaving norms, and perturb what was added."""
    with warnings.catch_warnings():
        # That nothing normalizes these small networks is meant here.
        warnings.simplefilter("ignore", fw.FilterwiseWarning)
        recipe = f"keep+{method}" if isinstance(method, str) else fw.Recipe("keep", method)
        fw.convert_(model, recipe, select=select or (lambda *_: True))
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if name.endswith(("gain", "offset")):
                tensor.mul_(1.0 + 0.3 * torch.randn(tensor.shape)).add_(0.01)
    return model


class Net(nn.Module):
    """Three converted layers (plain, grouped, linear), a norm between them, smooth throughout."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.GroupNorm(2, 8)
        self.second = nn.Conv2d(8, 8, 3, groups=2, bias=False)
        self.last = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.norm(self.first(x)))
        return self.last(torch.tanh(self.second(x)).mean((2, 3)))


def network(method: Any = "wa", seed: int = 0, make: Callable[[], nn.Module] = Net) -> Any:
    """Return a converted network in float64; `wa` has a gain."""
    torch.manual_seed(seed)
    return convert(make(), method).double()


def pictures(count: int, seed: int = 1) -> Tensor:
    """Return a batch of pictures in float64."""
    source = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, 5, 5, generator=source, dtype=torch.float64)


def micro_batches(*sizes: int, seed: int = 1) -> list[Tensor]:
    """Return micro-batches of these sizes."""
    return list(pictures(sum(sizes), seed).split(sizes))


def loss(model: nn.Module, x: Tensor) -> Tensor:
    """Return a loss without symmetry, so that no gradient is zero by chance."""
    out = model(x)
    weight = torch.linspace(0.5, 1.5, out.shape[-1], dtype=out.dtype)
    return (out * weight).square().sum() + out.sum()


def accumulate(model: nn.Module, batches: list[Tensor], defer: Defer) -> None:
    """Do what a training loop does between two optimizer steps."""
    for i, x in enumerate(batches):
        with defer(model, enabled=i < len(batches) - 1):
            loss(model, x).backward()


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    """Return a copy of every gradient by name."""
    return {
        name: None if p.grad is None else p.grad.detach().clone()
        for name, p in model.named_parameters()
    }


def assert_same_gradients(
    got: dict[str, Tensor | None], expected: dict[str, Tensor | None], within: float = EXACT
) -> None:
    """Assert that gradients agree to rounding: in units of the largest of each parameter."""
    assert got.keys() == expected.keys()
    for name, want in expected.items():
        have = got[name]
        assert (have is None) == (want is None), f"{name}: {have} in place of {want}"
        if have is None or want is None:
            continue
        assert have.dtype == want.dtype, name
        largest = float(want.abs().max())
        worst = float((have.double() - want.double()).abs().max())
        assert worst <= within * largest, f"{name}: off by {worst:.3g} of {largest:.3g}"


def states(model: nn.Module) -> dict[str, Tensor | None]:
    """Return a copy of every parameter by name, to be compared like gradients."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def both(
    scenario: Scenario, build: Callable[[], Any] = network, *, within: float = EXACT
) -> tuple[Any, Any]:
    """Run a scenario as ever and with `defer`, on equal models; gradients and weights must agree.

    Returns:
        What the scenario gave as ever, and with `defer`.
    """
    ordinary = build()
    deferred = copy.deepcopy(ordinary)
    expected = scenario(ordinary, as_ever)
    got = scenario(deferred, fw.defer)
    assert_same_gradients(gradients(deferred), gradients(ordinary), within)
    assert_same_gradients(states(deferred), states(ordinary), within)
    return expected, got


def raw_weights(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield name and raw weight of every converted layer of `Net`."""
    for name in ("first", "second", "last"):
        yield name, model.get_submodule(name).weight  # pyright: ignore[reportReturnType]
