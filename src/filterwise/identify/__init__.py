"""Whose formula a layer of another library computes, found by its numbers.

Names are shared by several formulas (five are called Weight Standardization, and the difference
decides what a trained checkpoint computes), so a copy of the layer is run on chosen weights of many
sizes, and what it convolves with is compared.
"""

from __future__ import annotations

from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from torch import nn

from filterwise.filters import check_module
from filterwise.identify.examine import Examined, examine
from filterwise.identify.forms import info_of
from filterwise.identify.probe import Bench, Probe, normal, per_channel_difference, quiet
from filterwise.identify.subject import Subject, subject_of
from filterwise.state import is_converted, state_of

if TYPE_CHECKING:
    from filterwise.methods.method import MethodInfo

__all__ = [
    "Bench",
    "Examined",
    "Probe",
    "Subject",
    "examine",
    "identify",
    "normal",
    "per_channel_difference",
    "quiet",
    "standardizes",
    "subject_of",
]


_ANSWERS: WeakKeyDictionary[type[nn.Module], bool] = WeakKeyDictionary()


def standardizes(layer: nn.Module) -> bool:
    """Tell whether a layer of another library normalizes its weight itself.

    A class is run on probing weights once.
    """
    subject = subject_of(layer)
    if subject is None:
        return False
    if subject.form != "class":
        return subject.is_known or examine(layer, subject).match is not None
    if type(layer) not in _ANSWERS:
        found = examine(layer, subject)
        _ANSWERS[type(layer)] = not found.plain and (subject.is_known or found.match is not None)
    return _ANSWERS[type(layer)]


def identify(layer: nn.Module) -> MethodInfo | None:
    """Tell whose published formula a layer computes its weight with.

    A copy of the layer is run on seeded weights of many sizes, in float64, and what it convolves
    with is compared with every published form: Weight Standardization of its authors, BCN, timm,
    Big Transfer, mmcv, Composer and transformers, the scaled forms of the NFNets, Parametric Weight
    Standardization, Weight Normalization; and with the forms that are wrong, of which the one that
    multiplies by the standard deviation is copied most. The layer and the random state are left as
    they were.

    Args:
        layer: A layer of any library, parametrized ones included, or a converted one.

    Returns:
        The formula, with the options that the layer really has and, in `source`, whose it is; None
        for a plain layer, or one whose numbers are those of no published formula.

    Example:
        >>> import torch
        >>> info = identify(torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(8, 4)))
        >>> info.name, info.formula
        ('wn', 'gain * v / |v|')
    """
    check_module(layer)
    if is_converted(layer):
        return info_of(state_of(layer).method)
    subject = subject_of(layer)
    if subject is None:
        return None
    found = examine(layer, subject).match
    return found.info if found else None
