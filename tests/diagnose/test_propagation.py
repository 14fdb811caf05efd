"""Predicted variance against all orders of a filter, and parts by sign against loops."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn

import filterwise as fw
from support import slow_signals as slow

pytestmark = pytest.mark.filterwarnings("ignore::filterwise.FilterwiseWarning")


def of(records, layer="0"):
    return {record["signal"]: record["value"] for record in records if record["layer"] == layer}


def correlated(samples, channels, *size):
    """Inputs of unequal means, variances and correlation."""
    generator = torch.Generator().manual_seed(13)
    x = torch.randn(samples, channels, *size, generator=generator, dtype=torch.float64)
    x = x + 0.7 * x.roll(1, 1)
    shape = [1, channels] + [1] * len(size)
    return x + torch.linspace(-1, 2, channels, dtype=torch.float64).view(shape)


def test_over_all_orders_of_a_filter_the_prediction_is_exact():
    filter = [0.3, -1.2, 0.8, 2.0, 0.1]
    orders = list(itertools.permutations(filter))
    net = nn.Sequential(nn.Linear(5, len(orders)))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor(orders))
        net[0].bias.fill_(0.4)
    x = correlated(7, 5)
    got = of(fw.diagnose.propagation(net.double(), x))
    outputs = net(x).flatten().tolist()
    assert got["variance_measured"] == pytest.approx(slow.variance(outputs), rel=1e-12)
    assert got["variance_predicted"] == pytest.approx(slow.variance(outputs), rel=1e-6)
    # Correlated inputs are what the channels alone cannot tell.
    assert got["variance_predicted_channels"] != pytest.approx(slow.variance(outputs), rel=0.05)


def patches(x, kernel, stride, padding, groups):
    """Every patch of a 2d input, zeros outside, by indices: group -> list of patches."""
    samples, channels, height, width = x.shape
    each = channels // groups
    found = [[] for _ in range(groups)]
    for sample, group in itertools.product(range(samples), range(groups)):
        for top in range(-padding, height + padding - kernel + 1, stride):
            for left in range(-padding, width + padding - kernel + 1, stride):
                patch = []
                for channel in range(group * each, (group + 1) * each):
                    for row, column in itertools.product(range(kernel), range(kernel)):
                        inside = 0 <= top + row < height and 0 <= left + column < width
                        patch.append(
                            float(x[sample, channel, top + row, left + column]) if inside else 0.0
                        )
                found[group].append(patch)
    return found


@pytest.mark.parametrize("groups", [1, 2])
def test_both_predictions_against_loops(groups):
    torch.manual_seed(14)
    net = nn.Sequential(nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=groups)).double()
    x = correlated(2, 4, 5, 5)
    got = of(fw.diagnose.propagation(net, x))
    rows = slow.rows_of(net[0], net[0].weight)
    bias = net[0].bias.tolist()
    n, each = len(rows[0]), 6 // groups
    seen = patches(x, 3, 2, 1, groups)
    square, first = [], []
    for o, row in enumerate(rows):
        own = seen[o // each]
        inside = [slow.variance(p) * n / (n - 1) for p in own]
        means = [n * slow.mean(row) * slow.mean(p) + bias[o] for p in own]
        square.append(
            n * slow.variance(row) * slow.mean(inside) + slow.mean([m * m for m in means])
        )
        first.append(slow.mean(means))
    expected = slow.mean(square) - slow.mean(first) ** 2
    assert got["variance_predicted"] == pytest.approx(expected, rel=1e-10)
    channels = [part.flatten().tolist() for part in x.unbind(1)]
    square, first = [], []
    for o, row in enumerate(rows):
        group = o // each
        own = channels[group * 4 // groups : (group + 1) * 4 // groups]
        means = [slow.mean(c) for c in own]
        taps = n // len(own)
        spread = sum(taps * (m - slow.mean(means)) ** 2 for m in means) / (n - 1)
        own_variance = slow.mean([slow.variance(c) for c in own])
        first.append(n * slow.mean(row) * slow.mean(means) + bias[o])
        square.append(
            n * (slow.variance(row) + slow.mean(row) ** 2) * own_variance
            + n * slow.variance(row) * spread
            + first[-1] ** 2
        )
    expected = slow.mean(square) - slow.mean(first) ** 2
    assert got["variance_predicted_channels"] == pytest.approx(expected, rel=1e-10)
    everything = [value for c in channels for value in c]
    printed = slow.mean([slow.norm(row) ** 2 for row in rows])
    printed *= slow.norm(everything) ** 2 / len(everything)
    assert got["variance_printed"] == pytest.approx(printed, rel=1e-10)


def test_the_corrected_formula_holds_behind_relu_and_the_printed_one_does_not():
    """A wide centred layer keeps 0.6817 of the second moment; the paper's text says all of it."""
    torch.manual_seed(15)
    net = nn.Sequential(nn.Linear(400, 400, bias=False), nn.ReLU(), nn.Linear(400, 400, bias=False))
    fw.convert_(net.double(), "wa", select=["0", "2"])
    got = of(fw.diagnose.propagation(net, torch.randn(200, 400).double()), "2")
    assert got["variance_predicted"] == pytest.approx(got["variance_measured"], rel=0.02)
    assert got["variance_predicted_channels"] == pytest.approx(got["variance_measured"], rel=0.02)
    assert got["variance_printed"] / got["variance_measured"] == pytest.approx(
        1 / (1 - 1 / math.pi), rel=0.03
    )


def test_the_model_stays_as_it_is_and_norms_take_the_batch():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3))
    x = 5 + torch.randn(4, 3, 8, 8)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    state = torch.get_rng_state()
    got = of(fw.diagnose.propagation(net, x), "3")
    assert got["input_mean_share"] == pytest.approx(1 / math.pi, abs=0.05)
    fw.diagnose.contributions(net, (x,))
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module._forward_hooks for module in net.modules())


def test_parts_by_sign_against_loops():
    torch.manual_seed(16)
    net = nn.Sequential(nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2)).double()
    x = correlated(2, 4, 5, 5)
    got = of(fw.diagnose.contributions(net, x))
    seen = patches(x, 3, 2, 1, 2)
    for o, row in enumerate(slow.rows_of(net[0], net[0].weight)):
        above = [sum(w * v for w, v in zip(row, p, strict=True) if w > 0) for p in seen[o // 3]]
        below = [sum(w * v for w, v in zip(row, p, strict=True) if w < 0) for p in seen[o // 3]]
        assert got["positive_contribution"][o] == pytest.approx(slow.mean(above), rel=1e-10)
        assert got["negative_contribution"][o] == pytest.approx(slow.mean(below), rel=1e-10)


def test_equinorm_gives_plus_and_minus_nine_on_the_papers_toy():
    """A 3x3 kernel on a 3x3 picture with cyclic padding: nine outputs, one each (its Fig. 1)."""
    torch.manual_seed(17)
    net = nn.Sequential(nn.Conv2d(1, 1, 3, padding=1, padding_mode="circular", bias=False))
    fw.convert_(net, "equinorm(affine=false)", select="0")
    got = of(fw.diagnose.contributions(net, torch.rand(1, 1, 3, 3)))
    assert 9 * got["positive_contribution"][0] == pytest.approx(9, rel=1e-6)
    assert 9 * got["negative_contribution"][0] == pytest.approx(-9, rel=1e-6)


@pytest.mark.parametrize("kind", [nn.ConvTranspose2d, nn.Conv2d])
def test_every_host_has_its_parts(kind):
    net = nn.Sequential(kind(16, 4, 3)).double()
    fw.convert_(net, "wa", select="0")
    x = correlated(2, 16, 5, 5)
    got = of(fw.diagnose.contributions(net, x))
    whole = net(x) - net[0].bias.view(1, -1, 1, 1)
    expected = whole.transpose(0, 1).flatten(1).mean(1).tolist()
    total = [a + b for a, b in zip(*got.values(), strict=True)]
    assert total == pytest.approx(expected, abs=1e-10)
