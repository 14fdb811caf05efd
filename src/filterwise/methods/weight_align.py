"""WeightAlign (Shi et al. 2020) and its ablations."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from filterwise.kernel import Family
from filterwise.methods import options
from filterwise.methods.method import WeightMethod

__all__ = ["WeightAlign"]

CONSTANTS = {"he": math.sqrt(2.0), "preserving": math.sqrt(2.0 / (1.0 - 1.0 / math.pi))}
"""sqrt 2, and the number that keeps the second moment through a ReLU (specification, 2.3)."""


@dataclass(frozen=True)
class WeightAlign(WeightMethod):
    r"""Every filter to mean 0 and He's variance, times a learnable gain.

    .. math:: \hat w = \gamma\,\frac{w - \mu}{\sqrt{(n/2)\,(V + \epsilon)}}

    with the gain :math:`\gamma` per filter, starting at 1, and n the fan-in: mean 0, variance
    2 gain^2 / n. No activation norm is needed.

    Attributes:
        constant: "he" is the paper's sqrt 2. "preserving" is 1.7129 in its place, which keeps the
            signal's second moment through a ReLU layer; He's keeps the gradient's. None keeps both.
        eps: Number added to V.
        centre: False leaves the mean in (Table IV, "scale only").
        divide: False leaves the scale as it is (Table IV, "centre only").
        factor: k of the scale ablation; it divides the effective weight.
        learn_gain: False keeps the gain as a buffer.

    Raises:
        ValueError: If an option is out of range, or neither centre nor divide is left.

    Source: Shi, Li, Liu, van Gemert, *WeightAlign: Normalizing Activations by Weight Alignment*,
    arXiv 2010.07160, Eq. 10.
    """

    name: ClassVar = "wa"
    title: ClassVar = "WeightAlign"
    source: ClassVar = "Shi et al. 2020, arXiv 2010.07160, Eq. 10"
    formula: ClassVar = "gain * (w - mean) / sqrt(n/2 * (var + eps))"

    constant: Literal["he", "preserving"] = "he"
    eps: float = 1e-10
    centre: bool = True
    divide: bool = True
    factor: float = 1.0
    learn_gain: bool = True

    def __post_init__(self) -> None:
        """Check the options."""
        options.choice("constant", self.constant, tuple(CONSTANTS))
        object.__setattr__(self, "eps", options.number("eps", self.eps))
        object.__setattr__(self, "factor", options.number("factor", self.factor, above=True))
        for name in ("centre", "divide", "learn_gain"):
            options.flag(name, getattr(self, name))
        if not (self.centre or self.divide):
            raise ValueError("centre and divide cannot both be false: nothing would be left to do")

    @property
    def has_gain(self) -> bool:
        """There is always a gain."""
        return True

    def family(self, fan_in: int) -> Family:
        """Return the method's place in the family for filters of `fan_in` weights."""
        constant = CONSTANTS[self.constant] / math.sqrt(fan_in) if self.divide else 1.0
        return Family(
            centre=self.centre,
            scale="root" if self.divide else "none",
            eps=self.eps,
            constant=constant / self.factor,
        )
