"""Where decay and steps balance, by running them; when a falling value is at its end."""

from __future__ import annotations

import math

import pytest
import torch

from filterwise.monitoring.decay import balanced_turn, fall_per_step, steps_until, variance_at_turn


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.06),
        lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.06, momentum=0.9),
        lambda p: torch.optim.AdamW(p, lr=0.03, weight_decay=0.2),
    ],
    ids=["sgd", "momentum", "adamw"],
)
def test_balanced_turn_is_where_a_scale_invariant_filter_ends(make):
    """Random gradients across 32 filters of 200 weights, of a size that goes as 1/length."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(32, 200, generator=generator, dtype=torch.float64))
    optimizer = make([weight])
    turns = []
    for step in range(900):
        old = weight.detach().clone()
        unit = old / old.norm(dim=1, keepdim=True)
        noise = torch.randn(32, 200, generator=generator, dtype=torch.float64)
        noise -= unit * (noise * unit).sum(1, keepdim=True)
        weight.grad = noise / old.norm(dim=1, keepdim=True)
        optimizer.step()
        if step >= 500:
            new = weight.detach()
            cosine = (new * old).sum(1) / (new.norm(dim=1) * old.norm(dim=1))
            turns.append(torch.rad2deg(torch.acos(cosine.clamp(-1, 1))))
    measured = float(torch.stack(turns).square().mean().sqrt())
    assert balanced_turn(optimizer, optimizer.param_groups[0]) == pytest.approx(measured, rel=0.05)


def test_no_decay_and_other_optimizers():
    weight = torch.nn.Parameter(torch.zeros(2, 2))
    sgd = torch.optim.SGD([weight], lr=0.1)
    assert balanced_turn(sgd, sgd.param_groups[0]) == 0
    other = torch.optim.RMSprop([weight], lr=0.1, weight_decay=0.1)
    assert balanced_turn(other, other.param_groups[0]) is None


def test_trend_of_plain_decay_is_its_own_law():
    # V_t = V_0 (1 - lr decay)^(2t) without a gradient.
    steps = list(range(10, 110, 10))
    values = [0.3 * (1 - 0.1 * 0.02) ** (2 * t) for t in steps]
    fall = fall_per_step(steps, values)
    assert fall == pytest.approx(-2 * math.log(1 - 0.1 * 0.02), rel=1e-9)
    ahead = steps_until(values[-1], 0.01, fall)
    assert 0.3 * (1 - 0.1 * 0.02) ** (2 * (steps[-1] + ahead)) == pytest.approx(0.01, rel=1e-9)
    assert steps_until(1.0, 0.5, -0.1) == math.inf
    assert steps_until(0.4, 0.5, 0.1) == 0
    assert fall_per_step([3], [1.0]) == 0


@pytest.mark.parametrize("eps", [0.0, 1e-3, 1.0])
def test_variance_at_which_a_step_turns_further(eps):
    """The angle of a step along G across a filter is lr c G / (sqrt(V + eps) |W|)."""

    def turn(variance):
        return 0.7 / math.sqrt((variance + eps) * variance)

    found = variance_at_turn(0.02, eps, turn(0.02), 5 * turn(0.02))
    assert turn(found) == pytest.approx(5 * turn(0.02), rel=1e-9)
    assert variance_at_turn(0.02, eps, 0.0, 10.0) == 0
