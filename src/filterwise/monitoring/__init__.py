"""Live warnings: what goes wrong in a training, said once, before the night is lost."""

from __future__ import annotations

from filterwise.monitoring.watch import Monitor, monitor

__all__ = ["Monitor", "monitor"]
