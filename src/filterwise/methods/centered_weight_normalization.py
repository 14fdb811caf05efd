"""Centered Weight Normalization (Huang et al. 2017)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from filterwise.kernel import Family
from filterwise.methods import options
from filterwise.methods.method import WeightMethod

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["CenteredWeightNormalization"]


@dataclass(frozen=True)
class CenteredWeightNormalization(WeightMethod):
    r"""Every filter centred, then to a learnable Euclidean norm.

    .. math:: \hat W = g\,\frac{W - \mu}{\max(|W - \mu|, \epsilon)}

    Attributes:
        eps: Floor of the centred filter's norm, in the unit of W.
        start: Initial gain; sqrt 2, He's scale, as in the public code.
        learn_gain: False keeps the gain as a buffer, as the public code does by default.

    Raises:
        ValueError: If an option is out of range.

    Source: Huang, Liu, Liu, Lang, Tao, *Centered Weight Normalization in Accelerating Training of
    Deep Neural Networks*, ICCV 2017. (What an encyclopedia calls by this name, centring without a
    new scale, is ``centered`` here.)
    """

    name: ClassVar = "cwn"
    title: ClassVar = "Centered Weight Normalization"
    source: ClassVar = "Huang et al., ICCV 2017"
    formula: ClassVar = "gain * (W - mean) / |W - mean|"

    eps: float = 1e-12
    start: float = math.sqrt(2.0)
    learn_gain: bool = True

    def __post_init__(self) -> None:
        """Check the options."""
        object.__setattr__(self, "eps", options.number("eps", self.eps))
        start = options.number("start", self.start, minimum=-math.inf)
        object.__setattr__(self, "start", start)
        options.flag("learn_gain", self.learn_gain)

    @property
    def has_gain(self) -> bool:
        """There is always a gain."""
        return True

    def gain_start(self, matrix: Tensor) -> Tensor:
        """Return the initial gain, one number per filter."""
        return matrix.new_full((matrix.shape[0],), self.start)

    def family(self, fan_in: int) -> Family:
        """Return the method's place in the family for filters of `fan_in` weights."""
        return Family(scale="max", eps=self.eps**2 / fan_in, constant=fan_in**-0.5)
