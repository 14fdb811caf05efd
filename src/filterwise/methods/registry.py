"""The table of methods: one line each."""

from __future__ import annotations

from typing import TYPE_CHECKING

from filterwise.methods.centered_weight_normalization import CenteredWeightNormalization
from filterwise.methods.equinorm import EquilibriumNormalization
from filterwise.methods.equivariant_weight_standardization import EquivariantWeightStandardization
from filterwise.methods.parametric_weight_standardization import ParametricWeightStandardization
from filterwise.methods.scaled_weight_standardization import ScaledWeightStandardization
from filterwise.methods.weight_align import WeightAlign
from filterwise.methods.weight_centering import WeightCentering
from filterwise.methods.weight_normalization import WeightNormalization
from filterwise.methods.weight_standardization import WeightStandardization

if TYPE_CHECKING:
    from filterwise.methods.method import Method, MethodInfo

__all__ = ["METHODS", "methods"]

METHODS: dict[str, type[Method]] = {
    "ws": WeightStandardization,
    "wa": WeightAlign,
    "pws": ParametricWeightStandardization,
    "equinorm": EquilibriumNormalization,
    "wn": WeightNormalization,
    "cwn": CenteredWeightNormalization,
    "centered": WeightCentering,
    "sws": ScaledWeightStandardization,
    "ews": EquivariantWeightStandardization,
}


def methods() -> list[MethodInfo]:
    """Return what there is: one record per method, in the order of the table.

    Example:
        >>> [info.name for info in methods()][:3]
        ['ws', 'wa', 'pws']
    """
    return [method.info() for method in METHODS.values()]
