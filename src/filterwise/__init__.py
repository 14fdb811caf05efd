"""Weight-space normalization for PyTorch: exact, convertible onto any model, foldable.

Example:
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.ReLU(),
    ...                       nn.Flatten(), nn.Linear(32 * 36, 10))
    >>> report = convert_(model, "gn+ws")
"""

from __future__ import annotations

from filterwise import diagnose, functional
from filterwise.adopt import adopt_
from filterwise.check import Finding, check
from filterwise.convert import convert_, describe, plan, unconvert_
from filterwise.defer import defer, keep_weights
from filterwise.errors import (
    CheckpointWarning,
    ConversionError,
    DeferralError,
    ExportError,
    FilterwiseWarning,
    FoldError,
    NormalizationWarning,
    RecipeError,
    TrainingWarning,
)
from filterwise.export import Comparison, ExportReport, export
from filterwise.fold import fold, fold_report
from filterwise.headroom import HeadRoom, HeadRoomReport, headroom_report, rescale_
from filterwise.identify import identify
from filterwise.initialize import initialize_
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
from filterwise.monitoring import Monitor, monitor
from filterwise.optim import clip_grad_adaptive_, param_groups
from filterwise.recipe import Recipe
from filterwise.report import FoldReport, FoldRow, Report, Row

__version__ = "0.1.0"

__all__ = [
    "CenteredWeightNormalization",
    "CheckpointWarning",
    "Comparison",
    "ConversionError",
    "DeferralError",
    "EquilibriumNormalization",
    "EquivariantWeightStandardization",
    "ExportError",
    "ExportReport",
    "FilterwiseWarning",
    "Finding",
    "FoldError",
    "FoldReport",
    "FoldRow",
    "HeadRoom",
    "HeadRoomReport",
    "MethodInfo",
    "Monitor",
    "NormalizationWarning",
    "ParametricWeightStandardization",
    "Recipe",
    "RecipeError",
    "Report",
    "Row",
    "ScaledWeightStandardization",
    "TrainingWarning",
    "WeightAlign",
    "WeightCentering",
    "WeightNormalization",
    "WeightStandardization",
    "adopt_",
    "check",
    "clip_grad_adaptive_",
    "convert_",
    "defer",
    "describe",
    "diagnose",
    "export",
    "fold",
    "fold_report",
    "functional",
    "headroom_report",
    "identify",
    "initialize_",
    "keep_weights",
    "methods",
    "monitor",
    "param_groups",
    "plan",
    "rescale_",
    "unconvert_",
]
