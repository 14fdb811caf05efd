"""Learning rate and momentum as functions of the step: nothing to save, nothing to drift."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Annotated, Literal, NamedTuple

from pydantic import Field, model_validator

from filterwise.lab.settings import Frozen

__all__ = ["Constant", "Cosine", "Polynomial", "Rates", "Schedule", "Steps", "SuperConvergence"]

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, lt=1)]


class Rates(NamedTuple):
    """What a step is taken with.

    Attributes:
        factor: Of the learning rate that the settings name.
        momentum: In place of the settings' one; None leaves it.
    """

    factor: float
    momentum: float | None = None


class _Warmed(Frozen):
    """A schedule with a linear warm-up before it, in epochs."""

    warm_up: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0

    def at(self, epoch: float, epochs: float) -> Rates:
        """Return the rates at a time in epochs (a fraction within one) of a run of `epochs`."""
        if epoch < self.warm_up:
            return Rates(epoch / self.warm_up * self._factor(self.warm_up, epochs))
        return Rates(self._factor(epoch, epochs))

    def _factor(self, epoch: float, epochs: float) -> float:
        raise NotImplementedError


class Constant(_Warmed):
    """The same learning rate throughout."""

    kind: Literal["constant"] = "constant"

    def _factor(self, epoch: float, epochs: float) -> float:
        del epoch, epochs
        return 1.0


class Cosine(_Warmed):
    """Half a cosine from the learning rate to zero (Loshchilov and Hutter, arXiv 1608.03983)."""

    kind: Literal["cosine"] = "cosine"

    def _factor(self, epoch: float, epochs: float) -> float:
        return (1 + math.cos(math.pi * epoch / epochs)) / 2


class Steps(_Warmed):
    """The learning rate times a factor after each milestone.

    Attributes:
        milestones: In epochs, rising: from that many finished epochs on the factor holds.
        factor: Multiplied once for each milestone passed.
    """

    kind: Literal["steps"] = "steps"
    milestones: Annotated[tuple[Positive, ...], Field(min_length=1)]
    factor: Annotated[float, Field(gt=0, lt=1)] = 0.1

    @model_validator(mode="after")
    def _rising(self) -> Steps:
        if any(later <= earlier for earlier, later in pairwise(self.milestones)):
            raise ValueError(f"milestones must rise, got {self.milestones}")
        return self

    def _factor(self, epoch: float, epochs: float) -> float:
        del epochs
        # An epoch's first step may lie a rounding error before its number.
        passed = sum(epoch >= milestone - 1e-9 for milestone in self.milestones)
        return self.factor**passed


class Polynomial(_Warmed):
    """``(1 - epoch / epochs) ** power``: the schedule of DeepLab."""

    kind: Literal["polynomial"] = "polynomial"
    power: Positive = 0.9

    def _factor(self, epoch: float, epochs: float) -> float:
        return (1 - epoch / epochs) ** self.power


class SuperConvergence(Frozen):
    """Linear up to a peak and down again, then a geometric fall; momentum against it.

    Smith and Topin, arXiv 1708.07120, in the form of Defazio and Bottou, arXiv 1812.04549, section
    6.2: from 0.1 to 0.5 in 13 epochs, back in 13, then 100 times smaller by the end of epoch 30;
    momentum 0.95 to 0.85 to 0.95, and 0.85 in the last part.

    Attributes:
        peak: Factor of the learning rate at the top.
        rise: End of the way up, as a share of the epochs.
        fall: End of the way down, as a share of the epochs.
        end: Factor at the end of the run.
        high: Momentum at the ends of the ramps.
        low: Momentum at the peak.
        last: Momentum after the ramps.
    """

    kind: Literal["super-convergence"] = "super-convergence"
    peak: Positive = 5.0
    rise: Annotated[float, Field(gt=0, lt=1)] = 13 / 30
    fall: Annotated[float, Field(gt=0, lt=1)] = 26 / 30
    end: Positive = 0.01
    high: Share = 0.95
    low: Share = 0.85
    last: Share = 0.85

    @model_validator(mode="after")
    def _in_order(self) -> SuperConvergence:
        if self.rise >= self.fall:
            raise ValueError(f"rise must lie before fall, got {self.rise} and {self.fall}")
        return self

    def at(self, epoch: float, epochs: float) -> Rates:
        """Return the rates at a time in epochs (a fraction within one) of a run of `epochs`."""
        time = epoch / epochs
        if time >= self.fall:
            share = (time - self.fall) / (1 - self.fall)
            return Rates(self.end**share, self.last)
        up = time / self.rise if time < self.rise else (self.fall - time) / (self.fall - self.rise)
        return Rates(1 + (self.peak - 1) * up, self.high + (self.low - self.high) * up)


Schedule = Annotated[
    Constant | Cosine | Steps | Polynomial | SuperConvergence, Field(discriminator="kind")
]
