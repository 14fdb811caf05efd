"""What a measurement ran on, from which commit, and whether the machine was its own meanwhile."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path
from typing import Any

__all__ = ["IDLE", "Watch", "commit"]

IDLE = 0.1
"""Cores that other processes may take on average while a machine still counts as idle."""


def commit() -> dict[str, str | bool | None]:
    """Return the commit that the benchmarks are run from, and whether files differ from it."""
    head = _git("rev-parse", "HEAD")
    return {"commit": head, "changed": None if head is None else bool(_git("status", "--short"))}


def _git(*words: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *words],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
            timeout=30,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


class Watch:
    """Watches from its making on what other processes take of the machine."""

    def __init__(self) -> None:
        """Begin."""
        self._started = time.time()
        self._clock, self._all, self._own = time.monotonic(), _busy_seconds(), _own_seconds()
        self._load = _load()

    def seen(self) -> dict[str, Any]:
        """Return what was seen so far.

        Returns:
            ``started`` and ``seconds``; ``load_average`` at start and end over 1, 5 and 15 minutes;
            ``other_cores``, how many cores other processes took on average, None where the system
            does not tell; and ``idle``, whether that is at most `IDLE`.
        """
        seconds = time.monotonic() - self._clock
        everybody, others = _busy_seconds(), None
        if everybody is not None and self._all is not None and seconds > 0:
            mine = _own_seconds() - self._own
            others = round(max(0.0, everybody - self._all - mine) / seconds, 3)
        return {
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self._started)),
            "seconds": round(seconds, 1),
            "load_average": {"start": self._load, "end": _load()},
            "other_cores": others,
            "idle": None if others is None else others <= IDLE,
        }


def _busy_seconds() -> float | None:
    """Return how long all cores together have worked since the system started (Linux)."""
    try:
        words = Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()
        ticks = os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError):
        return None
    user, nice, system, _, _, interrupt, soft, steal = (int(word) for word in words[1:9])
    return (user + nice + system + interrupt + soft + steal) / ticks


def _own_seconds() -> float:
    """Return how long this process and its finished children have worked."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _load() -> list[float] | None:
    try:
        return [round(value, 2) for value in os.getloadavg()]
    except OSError:
        return None
