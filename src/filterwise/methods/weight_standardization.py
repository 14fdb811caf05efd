"""Weight Standardization (Qiao et al. 2019) and its ablations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from filterwise.kernel import Family
from filterwise.methods import options
from filterwise.methods.method import WeightMethod

__all__ = ["WeightStandardization"]


@dataclass(frozen=True)
class WeightStandardization(WeightMethod):
    r"""Every filter to mean 0 and standard deviation close to 1.

    .. math:: \hat W = \frac{W - \mu}{\sigma + \epsilon}

    with the mean and the biased standard deviation over the fan-in n of the filter.
    An activation norm must follow: the effective weights are sqrt(n/2) times He's.

    Attributes:
        eps: Number that keeps the divisor from 0, in the unit of sigma (of its square if inside).
        eps_inside: Divide by sqrt(V + eps) instead; the same eps makes another network.
        ddof: 1 divides the sum of squares by n - 1, as the authors' PyTorch code does.
        centre: False leaves the mean in ("divide only", Eq. 6).
        divide: False leaves the scale as it is ("mean only", Eq. 5).
        moment: What ``centre=False`` divides by: root of the mean square ("raw"), or sigma
            ("central").
        affine: Adds a learnable gain (starts at 1) and offset (at 0) per filter.
        scale: "fan_in" multiplies by n ** -0.5, for the head-room of float16. Exact only where the
            norm that follows has no eps.

    Raises:
        ValueError: If an option is out of range, or neither centre nor divide is left.

    Source: Qiao, Wang, Liu, Shen, Yuille, *Weight Standardization*, arXiv 1903.10520, Eq. 2.
    """

    name: ClassVar = "ws"
    title: ClassVar = "Weight Standardization"
    source: ClassVar = "Qiao et al. 2019, arXiv 1903.10520, Eq. 2"
    formula: ClassVar = "(W - mean) / (std + eps)"
    needs_norm: ClassVar = True
    presets: ClassVar = {
        "official": {"ddof": 1},
        "mmcv": {"ddof": 1},
        "bcn": {"ddof": 1, "eps_inside": True},
        "mmcv_aws": {"ddof": 1, "eps_inside": True},
        "vit_hybrid": {},
        "bit": {"eps": 1e-10, "eps_inside": True},
        "timm": {"eps": 1e-6, "eps_inside": True},
        "timm_bit": {"eps": 1e-8, "eps_inside": True},
    }

    eps: float = 1e-5
    eps_inside: bool = False
    ddof: Literal[0, 1] = 0
    centre: bool = True
    divide: bool = True
    moment: Literal["raw", "central"] = "raw"
    affine: bool = False
    scale: Literal["unit", "fan_in"] = "unit"

    def __post_init__(self) -> None:
        """Check the options."""
        object.__setattr__(self, "eps", options.number("eps", self.eps))
        for name in ("eps_inside", "centre", "divide", "affine"):
            options.flag(name, getattr(self, name))
        options.choice("ddof", self.ddof, (0, 1))
        options.choice("moment", self.moment, ("raw", "central"))
        options.choice("scale", self.scale, ("unit", "fan_in"))
        if not (self.centre or self.divide):
            raise ValueError("centre and divide cannot both be false: nothing would be left to do")

    @property
    def has_gain(self) -> bool:
        """Only the affine ablation has gains."""
        return self.affine

    @property
    def has_offset(self) -> bool:
        """Only the affine ablation has offsets."""
        return self.affine

    def family(self, fan_in: int) -> Family:
        """Return the method's place in the family for filters of `fan_in` weights."""
        scale = ("root" if self.eps_inside else "outside") if self.divide else "none"
        return Family(
            centre=self.centre,
            moment="central" if self.centre else self.moment,
            scale=scale,
            eps=self.eps,
            constant=fan_in**-0.5 if self.scale == "fan_in" else 1.0,
            ddof=self.ddof,
        )
