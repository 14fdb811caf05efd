"""Weight Normalization (Salimans and Kingma 2016)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from filterwise.kernel import Family
from filterwise.methods import options
from filterwise.methods.method import WeightMethod

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["WeightNormalization"]


@dataclass(frozen=True)
class WeightNormalization(WeightMethod):
    r"""Every filter to a learnable Euclidean norm.

    .. math:: \hat W = g\,\frac{v}{\max(|v|, \epsilon)}

    Attributes:
        eps: Floor of the norm, in the unit of v.
        start: Initial gain: "norm" keeps the function at the start, or a number.
        learn_gain: False keeps the gain as a buffer.

    Raises:
        ValueError: If an option is out of range.

    Source: Salimans and Kingma, *Weight Normalization*, arXiv 1602.07868, Eq. 2.
    """

    name: ClassVar = "wn"
    title: ClassVar = "Weight Normalization"
    source: ClassVar = "Salimans and Kingma 2016, arXiv 1602.07868, Eq. 2"
    formula: ClassVar = "gain * v / |v|"

    eps: float = 1e-12
    start: float | str = "norm"
    learn_gain: bool = True

    def __post_init__(self) -> None:
        """Check the options."""
        object.__setattr__(self, "eps", options.number("eps", self.eps))
        options.flag("learn_gain", self.learn_gain)
        if self.start != "norm":
            if isinstance(self.start, str):
                raise ValueError(f"start must be norm or a number, got {self.start!r}")
            start = options.number("start", self.start, minimum=-math.inf)
            object.__setattr__(self, "start", start)

    @property
    def has_gain(self) -> bool:
        """There is always a gain."""
        return True

    @property
    def starts_plain(self) -> bool:
        """A gain that starts at the norm keeps the function."""
        return self.start == "norm"

    def gain_start(self, matrix: Tensor) -> Tensor:
        """Return the norms of the filters, or the number asked for."""
        if isinstance(self.start, float):
            return matrix.new_full((matrix.shape[0],), self.start)
        # The peak is divided out: the square of a large half-precision weight would be infinite.
        wide = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
        peak = wide.abs().amax(1, keepdim=True)
        unit = torch.where(peak > 0, peak, torch.ones_like(peak))
        norm = (wide / unit).square().sum(1).sqrt() * unit.squeeze(1)
        return norm.to(matrix.dtype)

    def family(self, fan_in: int) -> Family:
        """Return the method's place in the family for filters of `fan_in` weights."""
        return Family(
            centre=False,
            moment="raw",
            scale="max",
            eps=self.eps**2 / fan_in,
            constant=fan_in**-0.5,
        )
