"""Parametric Weight Standardization (Liu et al. 2021)."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import ClassVar

from filterwise.kernel import Family
from filterwise.methods import options
from filterwise.methods.method import WeightMethod

__all__ = ["ParametricWeightStandardization"]

NAMED_GAMMA = {"large": 1e-3, "medium": 1e-4, "small": 1e-5, "none": 0.0}
RELATIVE = re.compile(r"(?P<share>[0-9.]+(?:e[+-]?[0-9]+)?)\*2/n")


@dataclass(frozen=True)
class ParametricWeightStandardization(WeightMethod):
    r"""Every filter to mean 0 and a damped He variance, times a learnable alpha.

    .. math:: K = \alpha\,\sqrt{2/n}\,\frac{W - \mu}{\sqrt{V + \gamma}}

    with :math:`\alpha` (the layer's gain) per filter, starting at 1 and kept from weight decay, n
    the fan-in; the paper's :math:`\beta` is the layer's bias. No activation norm is needed.

    Attributes:
        gamma: A number >= 0 in the unit of W squared; or ``"0.1*2/n"``, a share of He's variance
            2/n in every layer; or a name: relative (0.1*2/n), large 1e-3, medium 1e-4, small 1e-5,
            none 0. Larger gamma bounds the step of a shrunken filter and damps the signal.

    Raises:
        ValueError: If gamma is none of these.

    Source: Liu, Ge, Li, Gui, *Delving into Variance Transmission and Normalization*, arXiv
    2103.11590, Eq. 12. The paper's closing advice for gamma is read as 0.1 * 2/n.
    """

    name: ClassVar = "pws"
    title: ClassVar = "Parametric Weight Standardization"
    source: ClassVar = "Liu et al. 2021, arXiv 2103.11590, Eq. 12"
    formula: ClassVar = "alpha * sqrt(2/n) * (W - mean) / sqrt(var + gamma)"
    presets: ClassVar = {"public": {"gamma": 1e-5}, "public_tf": {"gamma": 1e-3}}

    gamma: float | str = "relative"

    def __post_init__(self) -> None:
        """Check gamma, and bring it to its canonical form."""
        gamma = self.gamma
        if isinstance(gamma, str):
            gamma = gamma.replace(" ", "").lower()
            match = RELATIVE.fullmatch(gamma)
            if match:
                try:
                    share = options.number("gamma", float(match["share"]))
                except ValueError:
                    share = None
                gamma = None if share is None else f"{share!r}*2/n"
            elif gamma not in ("relative", *NAMED_GAMMA):
                gamma = None
            if gamma is None:
                names = ", ".join(("relative", *NAMED_GAMMA))
                demand = f"gamma must be a number >= 0, NUMBER*2/n, or one of {names}"
                raise ValueError(f"{demand}, got {self.gamma!r}")
        else:
            gamma = options.number("gamma", gamma)
        object.__setattr__(self, "gamma", gamma)

    def gamma_of(self, fan_in: int) -> float:
        """Return gamma as a number, in the unit of W squared, for filters of `fan_in` weights."""
        if not isinstance(self.gamma, str):
            return self.gamma
        if self.gamma in NAMED_GAMMA:
            return NAMED_GAMMA[self.gamma]
        match = RELATIVE.fullmatch(self.gamma)
        return (float(match["share"]) if match else 0.1) * 2.0 / fan_in

    @property
    def has_gain(self) -> bool:
        """Alpha is the gain."""
        return True

    def family(self, fan_in: int) -> Family:
        """Return the method's place in the family for filters of `fan_in` weights."""
        return Family(eps=self.gamma_of(fan_in), constant=math.sqrt(2.0 / fan_in))
