"""Converted layers for the laws on hosts: a method, a host and a dtype, all perturbed."""

from __future__ import annotations

import functools
import warnings
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import filterwise as fw
from filterwise import host as hosting
from support import equilibrium, references
from support.cases import PLAIN, MethodCase
from support.hosts import HOSTS, Host
from support.tolerances import DTYPES


@dataclass(frozen=True)
class HostCase:
    """A method on a host in a dtype.

    `layer`, `method`, `x` and `expected` are made once and fresh for every case; a law that changes
    the layer changes its own.
    """

    case: MethodCase
    host: Host
    dtype: torch.dtype

    @property
    def id(self) -> str:
        """As in ``ws-ConvTranspose2d[g=2]-bf16``."""
        name = next(k for k, v in DTYPES.items() if v is self.dtype)
        return f"{self.case.id}-{self.host.id}-{name}"

    @property
    def takes(self) -> bool:
        """Whether the method can be on this host."""
        return not (
            self.case.method().uses_input and (self.host.transposed or self.host.id == "named")
        )

    def plain(self) -> Any:
        """Return the layer before its conversion, with a mean in its weights."""
        torch.manual_seed(zlib.crc32(self.host.id.encode()))
        layer = self.host.make()
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.normal_(0.05, 0.2)
        return layer.to(self.dtype)

    def method(self, layer: nn.Module) -> Any:
        """Return the method, with labels for the layer's weight where it has cells."""
        return self.case.method(getattr(layer, self.host.parameter).shape)

    def convert(self, layer: nn.Module) -> nn.Module:
        """Convert a layer and perturb what was added; return it."""
        model = nn.Sequential(layer)
        with warnings.catch_warnings():
            # That nothing follows the one layer, and that cells are small, is meant here.
            warnings.simplefilter("ignore", fw.FilterwiseWarning)
            fw.convert_(model, fw.Recipe("keep", self.method(layer)), select=self.host.selector)
        with torch.no_grad():
            for name, tensor in (*layer.named_parameters(), *layer.named_buffers()):
                if name.endswith(("gain", "offset")):
                    tensor.mul_(1.0 + 0.3 * torch.randn(tensor.shape)).add_(0.01)
                if name == "input_mean":
                    tensor.uniform_(0.2, 1.2)
                if name == "num_batches_tracked":
                    tensor.fill_(3)
        return layer.eval()

    def layer(self) -> Any:
        """Return a converted layer in evaluation mode."""
        return self.convert(self.plain())

    def x(self, seed: int = 0) -> Tensor:
        """Return a positive input."""
        source = torch.Generator().manual_seed(seed)
        return torch.rand(self.host.input_shape, generator=source).to(self.dtype)

    def effective(self, layer: nn.Module, x: Tensor | None = None) -> Tensor:
        """Return what the converted layer computes with."""
        return hosting.effective_weight(
            layer, x
        )  # looked up late, so that a fault can be put there

    def expected(self, layer: Any) -> Tensor:
        """Return the filter matrix of the published formula in float64."""
        weight = getattr(layer, self.host.parameter)
        method, rows = self.method(layer), self.host.rows(layer, weight.detach())
        prefix = "" if self.host.parameter == "weight" else f"{self.host.parameter}_"
        gain = getattr(layer, f"{prefix}gain", None)
        if method.uses_input:
            done = equilibrium.effective(weight, layer.input_mean, gain)
            return self.host.rows(layer, done)
        offset = getattr(layer, f"{prefix}offset", None)
        labels = None
        if self.case.cells:
            labels = self.host.rows(layer, self.case.labels(weight.shape).expand(weight.shape))
        return references.effective(method, rows, gain, offset, label=labels)


@functools.cache
def host_cases(
    dtypes: tuple[str, ...] = tuple(DTYPES),
    cases: tuple[MethodCase, ...] = tuple(PLAIN),
    hosts: Sequence[Host] = tuple(HOSTS),
) -> list[HostCase]:
    """Return every method with its defaults on every host that takes it."""
    every = [HostCase(c, host, DTYPES[name]) for c in cases for host in hosts for name in dtypes]
    return [case for case in every if case.takes]
