"""Centring alone: the mean-only ablation of Weight Standardization, by its own name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from filterwise.kernel import Family
from filterwise.methods.method import WeightMethod

__all__ = ["WeightCentering"]


@dataclass(frozen=True)
class WeightCentering(WeightMethod):
    r"""Every filter to mean 0, its scale untouched.

    .. math:: \hat W = W - \mu

    An activation norm must follow. This is what an encyclopedia article calls Centered Weight
    Normalization; the method of that paper is ``cwn``.

    Source: Qiao et al., *Weight Standardization*, arXiv 1903.10520, Eq. 5 (the ablation).
    """

    name: ClassVar = "centered"
    title: ClassVar = "Weight centring (mean only)"
    source: ClassVar = "Qiao et al. 2019, arXiv 1903.10520, Eq. 5 (ablation)"
    formula: ClassVar = "W - mean"
    needs_norm: ClassVar = True

    def family(self, fan_in: int) -> Family:
        """Return the method's place in the family, the same for every fan-in."""
        del fan_in
        return Family(scale="none")
