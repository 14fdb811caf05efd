"""All signals that a recorder knows."""

from __future__ import annotations

from filterwise.diagnose import activation_signals, gradient_signals, weight_signals
from filterwise.diagnose.signal import Signal, SignalInfo

__all__ = ["SIGNALS", "signals"]

SIGNALS: dict[str, Signal] = {
    one.info.name: one
    for one in (*weight_signals.SIGNALS, *gradient_signals.SIGNALS, *activation_signals.SIGNALS)
}


def signals() -> list[SignalInfo]:
    """Return what can be recorded: name, group, formula, cost and source of every signal."""
    return [one.info for one in SIGNALS.values()]
