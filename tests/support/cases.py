"""What the laws run on: every method of the registry, with its options, and every host.

Methods are found in the registry, not listed; `OPTIONS` adds the settings that change a formula,
and presets come from the method's own table.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from filterwise.filters import FilterLayout
from filterwise.methods.registry import METHODS
from support import equilibrium, references
from support.compare import per_row
from support.tolerances import CLOSED_FORM, DTYPES, REFERENCE_FLOOR, TOLERANCE

OPTIONS: dict[str, dict[str, dict[str, Any]]] = {
    "ws": {
        "eps=0": {"eps": 0.0},
        "inside": {"eps_inside": True},
        "ddof=1": {"ddof": 1},
        "mean-only": {"divide": False},
        "divide-only": {"centre": False},
        "divide-only,central": {"centre": False, "moment": "central"},
        "affine": {"affine": True},
        "fan_in": {"scale": "fan_in"},
    },
    "wa": {
        "eps=0": {"eps": 0.0},
        "preserving": {"constant": "preserving"},
        "centre-only": {"divide": False},
        "scale-only": {"centre": False},
        "factor=2": {"factor": 2.0},
    },
    "pws": {
        "none": {"gamma": "none"},
        "large": {"gamma": "large"},
        "0.3*2/n": {"gamma": "0.3*2/n"},
    },
    "equinorm": {"single": {"single_pass": True}},
    "wn": {"eps=0": {"eps": 0.0}, "eps=0.5": {"eps": 0.5}},
    "cwn": {"eps=0": {"eps": 0.0}},
    "sws": {
        "gelu": {"activation": "gelu"},
        "gamma=1.5": {"activation": 1.5},
        "added": {"floor": False},
        "eps=0": {"eps": 0.0},
    },
    "ews": {"inside": {"eps_inside": True}, "eps=0": {"eps": 0.0}, "shared": {"shared": True}},
}

Kernel = Callable[..., Tensor]
"""(method, weight, gain, offset, input_mean) -> effective weight of a filter matrix."""


def product(
    method: Any, weight: Tensor, gain: Any = None, offset: Any = None, input_mean: Any = None
) -> Tensor:
    """Compute what filterwise computes; the laws run on this and, to see them bite, on mutants."""
    if method.uses_input:
        return method.effective(weight, input_mean, gain)
    return method.effective(weight, FilterLayout(), gain, offset)


@dataclass(frozen=True)
class MethodCase:
    """A method with options.

    Attributes:
        id: Name and options, as in ``ws[eps=0]``.
        name: The registry's key.
        options: Fields that differ from their defaults, labels left out.
    """

    id: str
    name: str
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def cells(self) -> bool:
        """Whether the method needs labels for the shape of a weight."""
        return METHODS[self.name].cells

    def labels(self, shape: Sequence[int]) -> Tensor:
        """Return alternating labels along the last axis that is longer than one."""
        axis = max(i for i, size in enumerate(shape) if size > 1)
        pattern = torch.arange(shape[axis]) % 2
        return pattern.view([-1 if i == axis else 1 for i in range(len(shape))])

    def method(self, shape: Sequence[int] = (4, 16)) -> Any:
        """Return the method for a weight of this shape."""
        options = dict(self.options)
        if self.cells:
            options["label"] = self.labels(shape)
        return METHODS[self.name](**options)


def _cases() -> list[MethodCase]:
    found: dict[Any, MethodCase] = {}
    for name, cls in METHODS.items():
        settings = {name: {}}
        settings |= {f"{name}[{label}]": more for label, more in OPTIONS.get(name, {}).items()}
        settings |= {f"{name}[like={label}]": more for label, more in cls.presets.items()}
        for label, options in settings.items():
            case = MethodCase(label, name, tuple(options.items()))
            # Several presets are one formula; it is tried once.
            found.setdefault(case.method(), case)
    return list(found.values())


CASES = _cases()
PLAIN = [case for case in CASES if case.id == case.name]
"""Every method with its defaults."""


@dataclass(frozen=True)
class Subject:
    """What a law is tried on: a method with options, a dtype, and who computes.

    Every draw is seeded by the case, so that a failure can be repeated alone.
    """

    case: MethodCase
    dtype: torch.dtype
    kernel: Kernel = product

    @property
    def id(self) -> str:
        """Method and dtype, as in ``ws[eps=0]-bf16``."""
        return f"{self.case.id}-{next(k for k, v in DTYPES.items() if v is self.dtype)}"

    @property
    def tolerance(self) -> float:
        """T of the laws."""
        return TOLERANCE[self.dtype]

    @property
    def epsilon(self) -> float:
        """Relative rounding of the dtype."""
        return torch.finfo(self.dtype).eps if self.dtype != torch.float64 else 0.0

    @property
    def flags(self) -> Any:
        """The method, for what it declares of itself."""
        return self.case.method()

    def with_kernel(self, kernel: Kernel) -> Subject:
        """Return the same subject, computed by somebody else."""
        return replace(self, kernel=kernel)

    def generator(self, seed: int) -> torch.Generator:
        """Return a generator for this case and seed."""
        return torch.Generator().manual_seed(zlib.crc32(self.case.id.encode()) + seed)

    def draw(
        self,
        filters: int = 5,
        fan_in: int = 48,
        *,
        ratio: float = 0.3,
        std: float = 0.2,
        seed: int = 0,
    ) -> Tensor:
        """Return raw weights whose filters differ in scale; `ratio` is mean over std."""
        source = self.generator(seed)
        values = torch.randn(filters, fan_in, generator=source, dtype=torch.float64)
        scale = std * torch.exp(
            0.5 * torch.randn(filters, 1, generator=source, dtype=torch.float64)
        )
        return (scale * (values + ratio)).to(self.dtype)

    def gain(self, filters: int = 5, seed: int = 1) -> Tensor | None:
        """Return perturbed gains, or None for a method without."""
        if not self.flags.has_gain:
            return None
        noise = torch.randn(filters, generator=self.generator(seed), dtype=torch.float64)
        return (1.0 + 0.3 * noise).to(self.dtype)

    def offset(self, filters: int = 5, seed: int = 2) -> Tensor | None:
        """Return perturbed offsets, or None for a method without."""
        if not getattr(self.flags, "has_offset", False):
            return None
        noise = torch.randn(filters, generator=self.generator(seed), dtype=torch.float64)
        return (0.1 * noise).to(self.dtype)

    def input_mean(self, fan_in: int) -> Tensor | None:
        """Return fixed positive input means for a method that needs them."""
        if not self.flags.uses_input:
            return None
        dtype = torch.promote_types(self.dtype, torch.float32)
        values = torch.rand(fan_in, generator=self.generator(3), dtype=torch.float64)
        return (0.2 + values).to(dtype)

    def effective(
        self, weight: Tensor, gain: Tensor | None = None, offset: Tensor | None = None
    ) -> Tensor:
        """Compute the effective weight of a filter matrix."""
        method = self.case.method(weight.shape)
        return self.kernel(method, weight, gain, offset, self.input_mean(weight.shape[1]))

    def gradients(
        self,
        weight: Tensor,
        upstream: Tensor,
        gain: Tensor | None = None,
        offset: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return dL/dW, dL/dgain and dL/doffset for dL/dE = `upstream`."""
        leaves = [
            t if t is None else t.detach().clone().requires_grad_() for t in (weight, gain, offset)
        ]
        out = self.effective(*leaves)
        wanted = [t for t in leaves if t is not None]
        found = iter(torch.autograd.grad(out, wanted, upstream))
        return tuple(None if t is None else next(found) for t in leaves)  # pyright: ignore

    def labels(self, shape: Sequence[int]) -> Tensor | None:
        """Return the labels of a filter matrix, spread over it, for a method of cells."""
        return self.case.labels(shape).expand(tuple(shape)) if self.case.cells else None

    def parts(self, weight: Tensor) -> list[Any]:
        """Return indices of columns that are standardized together: all, or those of a label."""
        labels = self.labels(weight.shape)
        return [slice(None)] if labels is None else [labels[0] == one for one in (0, 1)]

    def expected(
        self,
        weight: Tensor,
        gain: Tensor | None = None,
        offset: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """Return the published formula's effective weight in float64."""
        method = self.case.method(weight.shape)
        if method.uses_input:
            means = self.input_mean(weight.shape[1])
            assert means is not None
            return equilibrium.effective(weight, means, gain, single_pass=method.single_pass)
        return references.effective(
            method, weight, gain, offset, label=self.labels(weight.shape), **options
        )

    def expected_gradients(
        self, weight: Tensor, upstream: Tensor, gain: Tensor | None = None, **options: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the closed forms of dL/dW, dL/dgain and dL/doffset in float64."""
        method = self.case.method(weight.shape)
        if not method.uses_input:
            labels = self.labels(weight.shape)
            return references.gradient(method, weight, upstream, gain, label=labels, **options)
        means = self.input_mean(weight.shape[1])
        assert means is not None
        one_pass = method.single_pass
        gains = torch.ones(len(weight)) if gain is None else gain
        pushed = upstream.double() * gains.double()[:, None]
        to_weight, _ = equilibrium.gradient(weight, means, pushed, single_pass=one_pass)
        plain = equilibrium.effective(weight, means, single_pass=one_pass)
        return to_weight, (upstream.double() * plain).sum(1), upstream.double().sum(1)

    def bound(self, reference: Tensor, *, gradient: bool = False) -> tuple[Tensor, float]:
        """Return law 3's bound on a filter matrix as (absolute, relative)."""
        floor = CLOSED_FORM[torch.float64] if gradient else REFERENCE_FLOOR[torch.float64]
        floor = floor if self.dtype == torch.float64 else REFERENCE_FLOOR[self.dtype]
        smallest = torch.finfo(self.dtype).smallest_normal * max(self.epsilon, 2.0**-52)
        return floor * self.saturated(per_row(reference)) + smallest, self.epsilon

    def saturated(self, reference: Tensor) -> Tensor:
        """Return what the dtype can hold of a reference: its largest number beyond that."""
        limit = torch.finfo(self.dtype).max
        return reference.clamp(-limit, limit)


def subjects(
    cases: Sequence[MethodCase] = CASES, dtypes: Sequence[str] = tuple(DTYPES)
) -> list[Subject]:
    """Return every case in every dtype."""
    return [Subject(case, DTYPES[name]) for case in cases for name in dtypes]
