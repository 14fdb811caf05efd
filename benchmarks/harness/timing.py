"""Times side by side: contestants take turns in one process, and each round gives a ratio."""

from __future__ import annotations

import gc
import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy
import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

__all__ = ["Rounds", "Spread", "clocked", "interleaved", "ratios", "spread", "warmed_up"]


@dataclass(frozen=True)
class Rounds:
    """How often everybody has a turn.

    Attributes:
        most: Rounds, if there is time.
        least: Rounds that are run in any case.
        seconds: After so many seconds no further round begins.
    """

    most: int = 30
    least: int = 5
    seconds: float = math.inf


@dataclass(frozen=True)
class Spread:
    """Median of what was seen in the rounds, and how far it scatters.

    Attributes:
        median: Of all rounds.
        lower: First quartile.
        upper: Third quartile.
        low: Lower end of a 95 % interval for the median (by order, without a distribution).
        high: Upper end; the interval is the whole range where there are too few rounds for 95 %.
        rounds: How many.
    """

    median: float
    lower: float
    upper: float
    low: float
    high: float
    rounds: int


def spread(values: Sequence[float]) -> Spread:
    """Return median, quartiles and the interval of the median."""
    ordered = sorted(values)
    lower, middle, upper = (float(value) for value in numpy.percentile(ordered, (25, 50, 75)))
    out = _left_out(len(ordered))
    return Spread(middle, lower, upper, ordered[out], ordered[-1 - out], len(ordered))


def _left_out(count: int) -> int:
    """Return how many values may be left out at each end of a 95 % interval of the median."""
    below, out = 0.0, 0
    while out < count:
        below += math.comb(count, out) / 2**count
        if below > 0.025:
            break
        out += 1
    return max(0, out - 1) if out else 0


def ratios(mine: Sequence[float], baseline: Sequence[float]) -> list[float]:
    """Return what each round took, by what it took the baseline in the same round."""
    return [one / other for one, other in zip(mine, baseline, strict=True)]


def clocked(work: Callable[[], object], device: torch.device) -> Callable[[], float]:
    """Return a function that does the work and returns the seconds until the device is done."""

    def turn() -> float:
        _wait(device)
        start = time.perf_counter()
        work()
        _wait(device)
        return time.perf_counter() - start

    return turn


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def warmed_up(turns: Mapping[str, Callable[[], object]], times: int = 2) -> None:
    """Let everybody have a few turns before the clock starts."""
    for _ in range(times):
        for turn in turns.values():
            turn()


def interleaved(
    turns: Mapping[str, Callable[[], float]],
    rounds: Rounds,
    advance: Callable[[float], None] = lambda _: None,
) -> dict[str, list[float]]:
    """Give everybody one turn a round; the order turns from round to round.

    The garbage collector runs between rounds only: within one it would hit whoever comes next.

    Args:
        turns: What each does; returns seconds.
        rounds: How often.
        advance: Called with 1 after each round.

    Returns:
        Seconds of each round by name.
    """
    names = list(turns)
    times: dict[str, list[float]] = {name: [] for name in names}
    collects = gc.isenabled()
    gc.disable()
    start = time.perf_counter()
    try:
        for number in range(rounds.most):
            if number >= rounds.least and time.perf_counter() - start > rounds.seconds:
                break
            gc.collect()
            for place in range(len(names)):
                name = names[(place + number) % len(names)]
                times[name].append(turns[name]())
            advance(1.0)
    finally:
        if collects:
            gc.enable()
    return times
