"""Signals of gradients, against loops and a derivation that knows nothing of the layers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional

import filterwise as fw
from support import slow_signals as slow

pytestmark = pytest.mark.filterwarnings("ignore::filterwise.NormalizationWarning")

GRADIENTS = ["gradients"]
LR = 0.05


def chain(method=None):
    """Return a convolution, ReLU and a convolution, in float64."""
    torch.manual_seed(3)
    net = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.ReLU(), nn.Conv2d(4, 5, 3, bias=False))
    with torch.no_grad():
        net[0].weight.add_(0.05)
        net[2].weight.sub_(0.02)
    if method:
        fw.convert_(net, method, select=lambda *_: True)
        with torch.no_grad():
            if hasattr(net[2], "gain"):
                net[2].gain.mul_(torch.linspace(0.5, 1.5, 5))
    return net.double()


def pictures():
    return torch.randn(6, 3, 7, 7, generator=torch.Generator().manual_seed(4)).double()


def loss_of(output):
    return output.sin().sum()


def by_hand(hats):
    """Return the gradients of both effective weights, which are leaves here."""
    leaves = [hat.detach().clone().requires_grad_() for hat in hats]
    loss_of(
        functional.conv2d(functional.conv2d(pictures(), leaves[0]).relu(), leaves[1])
    ).backward()
    return [leaf.grad for leaf in leaves]


def aligned(weight, gain):
    """WeightAlign, written out."""
    rows = weight.detach().flatten(1)
    n = rows.shape[1]
    rows = rows - rows.mean(1, keepdim=True)
    variance = rows.square().mean(1, keepdim=True)
    hat = gain.detach()[:, None] * math.sqrt(2 / n) * rows / (variance + 1e-10).sqrt()
    return hat.view_as(weight)


def recorded(trace, layer):
    return {record["signal"]: record["value"] for record in trace.records(layer=layer)}


def close(got, expected, rtol=1e-9):
    assert got == pytest.approx(expected, rel=rtol, abs=1e-14)


def check(net, trace, gradients, raws):
    for name, gradient, raw in zip(("0", "2"), gradients, raws, strict=True):
        got = recorded(trace, name)
        layer = net.get_submodule(name)
        weights, rows = slow.rows_of(layer, layer.weight), slow.rows_of(layer, gradient)
        shares = [slow.three_shares(g, w) for g, w in zip(rows, weights, strict=True)]
        close(got["lipschitz_kept"], [one[0] for one in shares])
        close(got["lipschitz_radial"], [one[1] for one in shares])
        close(got["lipschitz_mean"], [one[2] for one in shares])
        for parts in zip(*(got[f"lipschitz_{p}"] for p in ("kept", "radial", "mean")), strict=True):
            assert sum(parts) == pytest.approx(1, abs=1e-14)
        close(got["effective_gradient_norm"], [slow.norm(row) for row in rows])
        raw = slow.rows_of(layer, raw)
        close(got["gradient_norm"], slow.norm([g for row in raw for g in row]))
        pairs = list(zip(raw, weights, strict=True))
        close(got["gradient_tangential"], [slow.tangential(g, w) for g, w in pairs])
        if "gradient_shift" in got:
            close(got["gradient_variance_ratio"], [slow.variance_ratio(w, g, LR) for g, w in pairs])
            assert got["gradient_shift"] == pytest.approx(slow.shift(raw, LR), rel=1e-9, abs=1e-20)
        expected = [slow.radial(g, w) for g, w in pairs]
        assert got["gradient_radial"] == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_plain_layers():
    net = chain()
    with fw.diagnose.record(net, signals=GRADIENTS) as trace:
        loss_of(net(pictures())).backward()
        trace.step(lr=LR)
    gradients = by_hand([net[0].weight, net[2].weight])
    check(net, trace, gradients, gradients)
    assert trace.steps() == [0]


@pytest.mark.parametrize("way", ["whole", "accumulated", "deferred", "by hand"])
def test_converted_layers_whatever_the_step_was_cut_into(way):
    net = chain("wa")
    optimizer = torch.optim.SGD(net.parameters(), lr=LR)
    before = [net[place].weight.detach().clone() for place in (0, 2)]
    gains = [net[place].gain.detach().clone() for place in (0, 2)]
    x = pictures()
    with fw.diagnose.record(net, signals=GRADIENTS) as trace:
        parts = [x] if way in ("whole", "by hand") else x.split((2, 3, 1))
        for place, part in enumerate(parts):
            with fw.defer(net, enabled=way == "deferred" and place < len(parts) - 1):
                loss_of(net(part)).backward()
        raws = [net[place].weight.grad.clone() for place in (0, 2)]
        if way == "by hand":
            trace.step(lr=LR)
        else:
            optimizer.step()
    with torch.no_grad():
        for place, weight in zip((0, 2), before, strict=True):
            net[place].weight.copy_(weight)
    hats = [aligned(weight, gain) for weight, gain in zip(before, gains, strict=True)]
    check(net, trace, by_hand(hats), raws)
    assert trace.steps() == [0]


def test_the_raw_gradient_keeps_what_the_shares_say():
    """Kept = sigma^2 |dL/dW|^2 / |G|^2 for WS without eps (Eqs. 10 to 15, corrected)."""
    net = chain("ws(eps=0)")
    with fw.diagnose.record(net, signals=GRADIENTS) as trace:
        loss_of(net(pictures())).backward()
    got = recorded(trace, "0")
    rows = slow.rows_of(net[0], net[0].weight)
    raw = slow.rows_of(net[0], net[0].weight.grad)
    expected = [
        slow.variance(w) * slow.dot(g, g) / norm**2
        for w, g, norm in zip(rows, raw, got["effective_gradient_norm"], strict=True)
    ]
    close(got["lipschitz_kept"], expected)


def test_under_autocast_the_shares_are_those_of_the_gradient_in_half():
    net = chain("gn+ws").float()
    with fw.diagnose.record(net, signals=GRADIENTS) as trace, torch.autocast("cpu"):
        loss_of(net(pictures().float()).float()).backward()
    half = recorded(trace, "0")
    exact = chain("gn+ws")
    with fw.diagnose.record(exact, signals=GRADIENTS) as trace:
        loss_of(exact(pictures())).backward()
    whole = recorded(trace, "0")
    for name in ("lipschitz_kept", "lipschitz_mean"):
        assert half[name] == pytest.approx(whole[name], abs=0.05)
    parts = zip(*(half[f"lipschitz_{p}"] for p in ("kept", "radial", "mean")), strict=True)
    assert [sum(part) for part in parts] == pytest.approx([1.0] * 4, abs=1e-6)


def test_a_step_that_was_dropped_has_no_part_in_the_next():
    net = chain("wa")
    with fw.diagnose.record(net, signals=GRADIENTS) as trace:
        loss_of(100 * net(pictures())).backward()
        net.zero_grad()
        loss_of(net(pictures())).backward()
    hats = [aligned(net[place].weight, net[place].gain) for place in (0, 2)]
    check(net, trace, by_hand(hats), [net[place].weight.grad for place in (0, 2)])


def test_a_layer_used_twice_has_the_sum():
    net = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1, bias=False)).double()
    fw.convert_(net, "wa", select=lambda *_: True)
    with fw.diagnose.record(net, signals=GRADIENTS) as trace:
        loss_of(net(net(pictures()))).backward()
    leaf = aligned(net[0].weight, net[0].gain).requires_grad_()
    once = functional.conv2d(pictures(), leaf, padding=1)
    loss_of(functional.conv2d(once, leaf, padding=1)).backward()
    close(
        recorded(trace, "0")["effective_gradient_norm"],
        [slow.norm(row) for row in slow.rows_of(net[0], leaf.grad)],
    )


def test_a_filter_without_gradient_has_no_shares():
    net = chain("wa")
    with torch.no_grad():
        net[2].gain[1] = 0.0
    with fw.diagnose.record(net, signals=GRADIENTS) as trace:
        net(pictures())[:, 1:].sum().backward()
    got = recorded(trace, "2")
    assert math.isnan(got["lipschitz_kept"][0])
    assert got["effective_gradient_norm"][0] == 0
    assert not math.isnan(got["lipschitz_kept"][1])  # a gain of zero has a gradient at W_hat
