"""Weight decay against Var[W]: where the two balance, and when a falling variance matters.

A method that divides by a filter's size computes the same from a shorter filter, and turns it
further with every step: the gradient grows as the filter shrinks. Decay shrinks it, steps lengthen
it, and where the two balance every step turns it by an angle that the optimizer's settings alone
decide.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["balanced_turn", "fall_per_step", "steps_until", "variance_at_turn"]


def balanced_turn(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> float | None:
    r"""Return the angle per step, in degrees, at which decay and steps balance.

    .. math:: \theta = \sqrt{2\eta\lambda/(1+m)} \quad\text{(SGD, momentum m)}, \qquad
              \theta = \sqrt{2\eta\lambda\,(1-\beta_1)/(1+\beta_1)} \quad\text{(AdamW)}

    for gradients that are independent from step to step and have no part along the filter. Returns
    None for another optimizer, and 0 without decay.

    Source: the first from the recursion of the length under SGD; the second is Kosson et al.,
    *Rotational Equilibrium*, arXiv 2305.17212, Table 1.
    """
    rate, decay = float(group["lr"]), float(group.get("weight_decay", 0.0))
    if rate * decay == 0:
        return 0.0
    if type(optimizer) is torch.optim.SGD:
        share = 1 / (1 + float(group["momentum"]))
    elif type(optimizer) is torch.optim.AdamW:
        beta = float(group["betas"][0])
        share = (1 - beta) / (1 + beta)
    else:
        return None
    return math.degrees(math.sqrt(2 * rate * decay * share))


def fall_per_step(steps: Sequence[int], values: Sequence[float]) -> float:
    """Return by how much the logarithm of a value falls per step: a line by least squares."""
    logs = [math.log(value) for value in values]
    middle, level = sum(steps) / len(steps), sum(logs) / len(logs)
    spread = sum((step - middle) ** 2 for step in steps)
    if spread == 0:
        return 0.0
    return -sum((s - middle) * (v - level) for s, v in zip(steps, logs, strict=True)) / spread


def variance_at_turn(variance: float, eps: float, turn: float, limit: float) -> float:
    r"""Return the variance at which a step would turn filters by `limit` degrees.

    With the same gradient of the effective weight the turn goes as :math:`1/\sqrt{V(V+\epsilon)}`.
    """
    if turn <= 0:
        return 0.0
    product = variance * (variance + eps) * (turn / limit) ** 2
    return (math.sqrt(eps * eps + 4 * product) - eps) / 2


def steps_until(value: float, limit: float, fall: float) -> float:
    """Return in how many steps a value that falls by `fall` in logarithm reaches a limit."""
    if fall <= 0 or limit <= 0:
        return math.inf
    return max(0.0, math.log(value / limit) / fall)
