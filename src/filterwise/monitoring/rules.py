"""What the monitor speaks up about: each rule looks at all layers and names the worst of them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any

import torch

from filterwise.findings import Finding, share_left
from filterwise.first_step import SHIFT, shift_why, turn_fix, turn_why
from filterwise.methods.equinorm import EquilibriumNormalization
from filterwise.methods.method import WeightMethod
from filterwise.methods.parametric_weight_standardization import ParametricWeightStandardization
from filterwise.monitoring.decay import (
    balanced_turn,
    fall_per_step,
    steps_until,
    variance_at_turn,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from filterwise.kernel import Family
    from filterwise.monitoring.figures import Figures, Watched

__all__ = ["RULES", "History", "Scene"]

LEAST_LEFT = 0.25
STEEPEST = 3.5  # lr (2/n)/(V + gamma): published runs put the largest stable one at 0.35 to 3.5
SIGNED = 0.05  # of a layer's filters
BALANCED = 0.5  # of the largest angle: single steps turn filters twice as far as the median one
TREND = 10  # looks that a trend is drawn through
HORIZON = 1000


@dataclass
class History:
    """What is known of one layer.

    Attributes:
        layer: The layer.
        optimizer: The optimizer that moves its weight.
        group: Its group there.
        steps: Steps of the last looks.
        looks: Their figures.
        signed: One-signed filters at the start.
    """

    layer: Watched
    optimizer: torch.optim.Optimizer
    group: dict[str, Any]
    signed: float
    steps: list[int] = field(default_factory=list)
    looks: list[Figures] = field(default_factory=list)

    def add(self, step: int, figures: Figures) -> None:
        """Take a look in, and forget what is older than a trend."""
        self.steps, self.looks = [*self.steps, step][-TREND:], [*self.looks, figures][-TREND:]

    @property
    def now(self) -> Figures:
        """The last look."""
        return self.looks[-1]

    @property
    def rate(self) -> float:
        """The layer's learning rate."""
        return float(self.group["lr"])

    def family(self) -> Family | None:
        """Return the layer's place in the family, if its method has one."""
        method = self.layer.method
        if not isinstance(method, WeightMethod) or method.cells:
            return None
        return method.family(self.layer.fan_in)


@dataclass(frozen=True)
class Scene:
    """What holds for all layers.

    Attributes:
        step: The step that was just taken, from 1.
        normalized: Whether the model has activation norms.
        turn: The largest angle per step, in degrees.
    """

    step: int
    normalized: bool
    turn: float


def _not_finite(layers: Sequence[History], scene: Scene) -> Finding | None:
    broken = [one for one in layers if not one.now.finite]
    if not broken:
        return None
    return Finding(
        "error",
        broken[0].layer.name,
        f"weights are NaN or infinite after step {scene.step}{_count(broken)}",
        "whatever reads them becomes NaN, and training cannot undo that",
        "load the last good checkpoint; a smaller learning rate, a warm-up or clipping of gradients"
        " keeps a single step from doing it",
    )


def _turns(layers: Sequence[History], scene: Scene) -> Finding | None:
    over = [one for one in layers if one.now.turn >= scene.turn]
    if not over:
        return None
    worst = max(over, key=lambda one: one.now.turn)
    turn = worst.now.turn
    return Finding(
        "warning",
        worst.layer.name,
        f"step {scene.step} turned its filters by {turn:.3g} degrees (median), over the limit of"
        f" {scene.turn:g}{_count(over)}",
        turn_why(scene.normalized),
        turn_fix(worst.rate, turn, scene.turn, scene.normalized),
    )


def _shifts(layers: Sequence[History], scene: Scene) -> Finding | None:
    moved = [
        one
        for one in layers
        if not one.layer.is_centred and not one.layer.last and one.now.shift >= SHIFT
    ]
    if not moved or scene.normalized:
        return None
    worst = max(moved, key=lambda one: one.now.shift)
    before = ""
    if len(worst.looks) > 1:
        before = f", {worst.looks[-2].shift:.2g} in step {worst.steps[-2]}"
    return Finding(
        "warning",
        worst.layer.name,
        f"the average gradient shifts its filters: Var of n E[dW] over filters is"
        f" {worst.now.shift:.3g} in step {scene.step}{before}{_count(moved)}",
        shift_why(),
        'a method that centres filters ("wa", "pws") has no such part; or a smaller learning rate',
    )


def _collapses(layers: Sequence[History], scene: Scene) -> Finding | None:
    """Find variances that decay shrinks until steps turn filters too far, or to nothing."""
    found: list[tuple[float, History, str, str]] = []
    for one in layers:
        family = one.family()
        if family is None or family.scale == "none" or len(one.looks) < TREND:
            continue
        if not float(one.group.get("weight_decay", 0.0)):
            continue
        balance = balanced_turn(one.optimizer, one.group)
        medians = [look.variance for look in one.looks]
        angle = BALANCED * scene.turn
        if balance is None or balance >= angle:
            turn = median(look.turn for look in one.looks)
            end = variance_at_turn(medians[-1], _eps(family), turn, angle)
            words = f"steps turn filters by {angle:g} degrees"
            found.append((_left(one, medians, end), one, "median", words))
        least = [look.least_variance for look in one.looks]
        end = torch.finfo(one.layer.weight.dtype).tiny
        if all(map(math.isfinite, least)):
            found.append((_left(one, least, end), one, "smallest", "it is 0 in its dtype"))
    ahead, worst, which, words = min(found, default=(math.inf, None, "", ""), key=lambda f: f[0])
    if worst is None or ahead > max(HORIZON, scene.step):
        return None
    look = worst.now
    value = look.variance if which == "median" else look.least_variance
    balance = balanced_turn(worst.optimizer, worst.group)
    settings = "" if balance is None else f", which balances at {balance:.2g} degrees per step"
    return Finding(
        "warning",
        worst.layer.name,
        f"weight decay shrinks Var[W]: the {which} is {value:.2g} at step {scene.step}, and on its"
        f" trend {words} at step {scene.step + math.ceil(ahead)}",
        f"a shorter filter is turned further by the same step{settings}; where nothing else damps"
        " it, training jumps there and can end in NaN",
        "less decay or a smaller learning rate (the angle goes with the root of their product), or"
        " a larger gamma or eps",
    )


def _left(one: History, values: Sequence[float], end: float) -> float:
    """Return in how many steps a falling value is at its end; infinity if it is not falling."""
    if min(values) <= 0 or values[-1] <= end:
        return math.inf
    return steps_until(values[-1], end, fall_per_step(one.steps, values))


def _damped(layers: Sequence[History], scene: Scene) -> Finding | None:
    found: list[tuple[float, History]] = []
    for one in layers:
        family = one.family()
        if family is not None and one.now.finite:
            left = float(share_left(family, torch.tensor(one.now.variance)))
            if left < LEAST_LEFT:
                found.append((left, one))
    if not found:
        return None
    left, worst = min(found, key=lambda pair: pair[0])
    family = worst.family()
    pws = isinstance(worst.layer.method, ParametricWeightStandardization)
    return Finding(
        "warning",
        worst.layer.name,
        f"{'gamma' if pws else 'eps'} = {family.eps if family else 0:.2g} dwarfs Var[W], now"
        f" {worst.now.variance:.2g} (median), and leaves {100 * left:.2g} % of the nominal variance"
        f" at step {scene.step}{_count([one for _, one in found])}",
        "every such layer damps the signal by that factor on top of the one before it",
        "less weight decay, or a gamma or eps that is small beside 2/n (pws: relative)",
    )


def _steep(layers: Sequence[History], scene: Scene) -> Finding | None:
    """Find PWS layers whose Var[W] has left gamma too small to bound the step."""
    found: list[tuple[float, History, float]] = []
    for one in layers:
        family = one.family()
        if family and isinstance(one.layer.method, ParametricWeightStandardization):
            size = one.now.variance + family.eps
            times = one.rate * 2 / one.layer.fan_in / size if size > 0 else math.inf
            found.append((times, one, family.eps))
    times, worst, gamma = max(found, default=(0.0, None, 0.0), key=lambda triple: triple[0])
    if worst is None or times < STEEPEST or scene.normalized:
        return None
    return Finding(
        "warning",
        worst.layer.name,
        f"gamma = {gamma:.2g} no longer bounds the step: with Var[W] at {worst.now.variance:.2g}"
        f" (median) a step on the effective weight is {times:.3g} times a plain layer's step at"
        f" rate 1 (step {scene.step})",
        "published runs of PWS trained at 0.35 and became NaN at 3.5",
        "a larger gamma (relative bounds it by 10 lr), less decay, or a smaller learning rate",
    )


def _one_signed(layers: Sequence[History], scene: Scene) -> Finding | None:
    found = [
        one
        for one in layers
        if _minds_signs(one.layer)
        and one.now.one_signed - one.signed >= max(1.0, SIGNED * one.layer.filters)
    ]
    if not found:
        return None
    worst = max(found, key=lambda one: one.now.one_signed / one.layer.filters)
    equinorm = isinstance(worst.layer.method, EquilibriumNormalization)
    return Finding(
        "warning",
        worst.layer.name,
        f"{worst.now.one_signed:.0f} of {worst.layer.filters} filters have weights of one sign at"
        f" step {scene.step} ({worst.signed:.0f} at the start){_count(found)}",
        "the single pass has no positive part for them and takes the two-pass divisor"
        if equinorm
        else "behind a ReLU such a filter adds up its inputs: its channel is a large constant, or"
        " dead where the weights are negative",
        "equinorm(single_pass=false)"
        if equinorm
        else 'a smaller learning rate, or a method that centres filters ("wa", "gn+ws")',
    )


def _minds_signs(layer: Watched) -> bool:
    method = layer.method
    if isinstance(method, EquilibriumNormalization):
        return method.single_pass
    return not layer.is_centred and not layer.last


def _eps(family: Family) -> float:
    """Return the eps of a method in the unit of the variance, where it adds to it."""
    if family.scale == "outside":
        return family.eps**2
    return family.eps if family.scale == "root" else 0.0


def _count(layers: Sequence[object]) -> str:
    return f" ({len(layers)} such layers)" if len(layers) > 1 else ""


RULES: dict[str, Callable[[Sequence[History], Scene], Finding | None]] = {
    "not finite": _not_finite,
    "turn": _turns,
    "shift": _shifts,
    "collapse": _collapses,
    "damped": _damped,
    "steep": _steep,
    "one-signed": _one_signed,
}
"""By the name under which a rule has spoken or not."""
