"""Weight-space normalization for PyTorch: exact, convertible onto any model, foldable."""

from __future__ import annotations

from filterwise import functional
from filterwise.errors import (
    CheckpointWarning,
    ConversionError,
    DeferralError,
    FilterwiseWarning,
    FoldError,
    NormalizationWarning,
    RecipeError,
)
from filterwise.methods.centered_weight_normalization import CenteredWeightNormalization
from filterwise.methods.equinorm import EquilibriumNormalization
from filterwise.methods.equivariant_weight_standardization import EquivariantWeightStandardization
from filterwise.methods.method import MethodInfo
from filterwise.methods.parametric_weight_standardization import ParametricWeightStandardization
from filterwise.methods.registry import methods
from filterwise.methods.scaled_weight_standardization import ScaledWeightStandardization
from filterwise.methods.weight_align import WeightAlign
from filterwise.methods.weight_centering import WeightCentering
from filterwise.methods.weight_normalization import WeightNormalization
from filterwise.methods.weight_standardization import WeightStandardization
from filterwise.recipe import Recipe
from filterwise.report import Report, Row

__version__ = "0.1.0"

__all__ = [
    "CenteredWeightNormalization",
    "CheckpointWarning",
    "ConversionError",
    "DeferralError",
    "EquilibriumNormalization",
    "EquivariantWeightStandardization",
    "FilterwiseWarning",
    "FoldError",
    "MethodInfo",
    "NormalizationWarning",
    "ParametricWeightStandardization",
    "Recipe",
    "RecipeError",
    "Report",
    "Row",
    "ScaledWeightStandardization",
    "WeightAlign",
    "WeightCentering",
    "WeightNormalization",
    "WeightStandardization",
    "functional",
    "methods",
]
