"""Errors and warnings of filterwise.

::

    ValueError
        RecipeError           a recipe that cannot be read
        ConversionError       a model that cannot be converted as asked; it is unchanged
    RuntimeError
        FoldError             a folded model that would not equal its original
        DeferralError         gathered gradients that cannot be handed over
        ExportError           a file that cannot be written, or would compute something else
    UserWarning
        FilterwiseWarning
            CheckpointWarning     a checkpoint of another method, or of unknown options
            NormalizationWarning  nothing normalizes a layer's output, under a method that needs it
            TrainingWarning       something goes wrong in a training that is watched
"""

from __future__ import annotations

__all__ = [
    "CheckpointWarning",
    "ConversionError",
    "DeferralError",
    "ExportError",
    "FilterwiseWarning",
    "FoldError",
    "NormalizationWarning",
    "RecipeError",
    "TrainingWarning",
]


class RecipeError(ValueError):
    """A recipe cannot be read; the text has the position and the nearest valid name."""


class ConversionError(ValueError):
    """A model cannot be converted as asked; the model is as it was."""


class FoldError(RuntimeError):
    """A folded model would not compute what its original computes."""


class DeferralError(RuntimeError):
    """Gathered gradients cannot be handed over; no parameter has moved."""


class ExportError(RuntimeError):
    """A model cannot be exported, or its file would compute something else; no file is left."""


class FilterwiseWarning(UserWarning):
    """Base of every warning that filterwise gives."""


class CheckpointWarning(FilterwiseWarning):
    """A checkpoint was loaded whose method or options differ from the model's, or are unknown."""


class NormalizationWarning(FilterwiseWarning):
    """Nothing normalizes the output of a layer whose method needs it."""


class TrainingWarning(FilterwiseWarning):
    """Something goes wrong in a training that `filterwise.monitor` watches."""
