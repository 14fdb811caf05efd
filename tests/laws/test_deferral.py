"""Law 30: deferral is invisible in the final gradients; `tests/defer` tries more to break it."""

from __future__ import annotations

import copy

import pytest
import torch

import filterwise as fw
from support import deferral_faults  # noqa: F401 (enters its faults)
from support.deferral import as_ever, assert_same_gradients, gradients
from support.laws import case_law
from support.models import HostCase, host_cases

HOSTED = [case for case in host_cases(("f64",)) if not case.case.method().uses_input]
SIZES = {1: (3,), 2: (2, 2), 7: (2, 2, 2, 2, 2, 2, 1)}
"""Micro-batches of a step to their sizes: the last of seven is ragged."""


def train(layer, steps, defer):
    """Return the gradients of each step; a stale weight would show in the second."""
    optimizer = torch.optim.SGD(layer.parameters(), 0.1, momentum=0.9)
    found = []
    for parts in steps:
        for i, x in enumerate(parts):
            with defer(layer, enabled=i < len(parts) - 1):
                layer(x).sin().sum().backward()
        found.append(gradients(layer))
        optimizer.step()
        optimizer.zero_grad()
    return found


@case_law(
    30,
    HOSTED,
    rejects={
        "loses_the_sum": "wa-Conv2d-f64",
        "hands_over_again": "ws-ConvTranspose2d[g=2]-f64",
        "trusts_the_kept_weight": "cwn-named-f64",
    },
)
def test_law30_deferral_is_invisible(case: HostCase):
    """Gradients of weights and gains are those of the ordinary way, in two steps running."""
    shape = case.host.input_shape[1:]
    for sizes in SIZES.values():
        ordinary = case.layer().train()
        deferred = copy.deepcopy(ordinary)
        torch.manual_seed(0)
        steps = [[torch.randn(n, *shape, dtype=torch.float64) for n in sizes] for _ in range(2)]
        expected, got = train(ordinary, steps, as_ever), train(deferred, steps, fw.defer)
        for one, other in zip(got, expected, strict=True):
            assert_same_gradients(one, other)


@case_law(
    30,
    [case for case in HOSTED if case.host.id == "Conv2d"],
    rejects={"outlives_zero_grad": "wa-Conv2d-f64"},
)
def test_law30_the_step_after_an_exception_is_right(case: HostCase):
    """What a broken-off step had gathered goes the way of every other gradient."""
    ordinary = case.layer().train()
    deferred = copy.deepcopy(ordinary)
    x = case.x()
    with fw.defer(deferred):
        deferred(x).sin().sum().backward()
    with fw.defer(deferred), pytest.raises(RuntimeError):
        deferred(x[:, :2])
    deferred.zero_grad()
    expected, got = train(ordinary, [[x, x + 1]], as_ever), train(deferred, [[x, x + 1]], fw.defer)
    assert_same_gradients(got[0], expected[0])
