"""Signals of weights, against loops over Python's own floats."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import filterwise as fw
from support import slow_signals as slow

pytestmark = pytest.mark.filterwarnings("ignore::filterwise.NormalizationWarning")

LAYERS = {
    "conv": lambda: nn.Conv2d(4, 6, 3),
    "grouped": lambda: nn.Conv1d(4, 6, 3, groups=2),
    "transposed": lambda: nn.ConvTranspose2d(6, 4, 3, groups=2),
    "linear": lambda: nn.Linear(7, 5),
}
LOOPS = {
    "weight_mean": slow.mean,
    "weight_std": lambda row: math.sqrt(slow.variance(row)),
    "weight_norm": slow.norm,
    "weight_positive": slow.positive,
    "weight_sign_distance": slow.sign_distance,
}


def found(model, **options):
    records = fw.diagnose.weights(model, **options)
    return {record["signal"]: record["value"] for record in records}


def close(got, expected, dtype=torch.float64):
    rtol = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-6}[dtype]
    got, expected = (torch.tensor(one, dtype=torch.float64) for one in (got, expected))
    torch.testing.assert_close(got, expected, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_every_filter_against_a_loop(kind, dtype):
    layer = LAYERS[kind]().to(dtype)
    rows = slow.rows_of(layer, layer.weight)
    got = found(layer)
    for name, loop in LOOPS.items():
        close(got[name], [loop(row) for row in rows], dtype)
    close(got["weight_variance_minimum"], min(map(slow.variance, rows)), dtype)


def test_a_mean_far_above_the_deviation_leaves_the_variance_right():
    layer = nn.Linear(64, 3)
    with torch.no_grad():
        layer.weight.mul_(1e-3).add_(1e4)
    rows = slow.rows_of(layer, layer.weight)
    got = found(layer)
    expected = [math.sqrt(slow.variance(row)) for row in rows]
    assert got["weight_std"] == pytest.approx(expected, rel=1e-5)
    assert got["weight_mean"] == pytest.approx([slow.mean(row) for row in rows], rel=1e-12)


def test_effective_rate_counts_the_part_that_reaches_the_effective_weight():
    plain, centring = nn.Conv2d(4, 6, 3).double(), nn.Conv2d(4, 6, 3).double()
    fw.convert_(centring, "wa", select=lambda *_: True)
    for layer, part in ((plain, lambda row: row), (centring, slow.centred)):
        with torch.no_grad():
            layer.weight.add_(0.3)
        rows = slow.rows_of(layer, layer.weight)
        got = found(layer, lr=0.2)["effective_learning_rate"]
        close(got, [0.2 / slow.norm(part(row)) ** 2 for row in rows])
    assert "effective_learning_rate" not in found(plain)


def test_gains_and_dead_and_duplicate_filters():
    layer = nn.Conv2d(4, 6, 3).double()
    fw.convert_(layer, "wa", select=lambda *_: True)
    with torch.no_grad():
        layer.gain.copy_(torch.tensor([1.0, 0.0, 2.0, 1.0, 1.0, 1.0]))
        layer.weight[3] = 0.5  # constant: WeightAlign makes it zero
        layer.weight[4] = 2 * layer.weight[0] + 1  # the same once it is centred
    got = found(layer, signals=["weights", "duplicate_filters"])
    assert got["gain"] == [1.0, 0.0, 2.0, 1.0, 1.0, 1.0]
    assert got["dead_filters"] == 2
    assert got["duplicate_filters"] == 1


def test_duplicates_of_a_plain_layer_are_not_centred():
    layer = nn.Conv2d(4, 6, 3).double()
    with torch.no_grad():
        layer.weight[4] = 2 * layer.weight[0] + 1
        layer.weight[5] = 3 * layer.weight[2]
    assert found(layer, signals="duplicate_filters") == {"duplicate_filters": 1}
    assert found(layer, signals="dead_filters") == {"dead_filters": 0}


def test_histograms_count_every_weight():
    layer = nn.Conv2d(16, 3, 3).double()
    fw.convert_(layer, "ws", select=lambda *_: True)
    got = found(layer, signals=["weight_histogram", "effective_weight_histogram"])
    effective = fw.functional.weight_standardization(layer.weight)
    for name, weight in (("weight", layer.weight), ("effective_weight", effective)):
        for row, (low, high, *counts) in zip(
            slow.rows_of(layer, weight), got[f"{name}_histogram"], strict=True
        ):
            spread = 5 * math.sqrt(slow.variance(row))
            assert low == pytest.approx(slow.mean(row) - spread, abs=1e-12)
            assert high == pytest.approx(slow.mean(row) + spread, abs=1e-12)
            assert sum(counts) == len(row)
            off = sum(
                abs(a - b) for a, b in zip(counts, slow.count_between(row, low, high), strict=True)
            )
            assert off <= 2  # a weight on the edge of a bin may round to either side


def test_effective_norms_are_those_of_the_published_formula():
    layer = nn.Conv2d(4, 6, 3).double()
    fw.convert_(layer, "ws(eps=0)", select=lambda *_: True)
    close(found(layer, signals="effective_weight_norm")["effective_weight_norm"], [6.0] * 6)


def test_a_signal_that_needs_a_run_is_refused():
    with pytest.raises(ValueError, match=r"channel_mean is a signal of the activations"):
        fw.diagnose.weights(nn.Linear(3, 3), signals="channel_mean")


def test_signals_are_told_with_formula_cost_and_source():
    listed = fw.diagnose.signals()
    assert len({one.name for one in listed}) == len(listed)
    for one in listed:
        assert one.formula, one.name
        assert one.cost, one.name
        assert one.source, one.name
        assert one.per in ("layer", "filter", "channel")
