"""Signals of what happens inside a network: weights, gradients, activations, curvature.

Room by room: ``signals`` lists every signal, ``weight_signals``, ``gradient_signals`` and
``activation_signals`` define them, ``recorder`` watches a model by the hooks of ``observing``, and
``trace`` holds what was recorded. ``propagation`` and ``curvature`` run a copy of the model.

It needs torch alone, gives plain records, and changes nothing that it looks at.
"""

from __future__ import annotations

from filterwise.diagnose.curvature import hessian, landscape, largest_eigenvalue
from filterwise.diagnose.propagation import contributions, propagation
from filterwise.diagnose.recorder import record, weights
from filterwise.diagnose.signal import SignalInfo
from filterwise.diagnose.signals import signals
from filterwise.diagnose.trace import Trace

__all__ = [
    "SignalInfo",
    "Trace",
    "contributions",
    "hessian",
    "landscape",
    "largest_eigenvalue",
    "propagation",
    "record",
    "signals",
    "weights",
]
