"""Signals of activations, against loops over Python's own floats."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import filterwise as fw
from support import slow_signals as slow


class Net(nn.Module):
    """A ReLU that is no module, and a linear layer behind a mean over positions."""

    def __init__(self, repeats=None):
        super().__init__()
        torch.manual_seed(5)
        self.first = nn.Conv2d(3, 4, 3, stride=2)
        self.second = nn.ConvTranspose2d(4, 6, 3, groups=2)
        self.head = nn.Linear(6, 5)
        self.repeats = repeats
        with torch.no_grad():
            self.first.bias[2] = -100.0

    def forward(self, x):
        if self.repeats is not None:
            x = checkpoint(self.first, x, use_reentrant=self.repeats).relu()
        else:
            x = self.first(x).relu()
        return self.head(self.second(x).mean((2, 3)))


def pictures(count=5):
    generator = torch.Generator().manual_seed(6)
    return torch.randn(count, 3, 9, 9, generator=generator, dtype=torch.float64) + 0.5


def channels(tensor, axis=1):
    return [part.flatten().tolist() for part in tensor.detach().double().unbind(axis)]


def expected(input, output):
    inputs, outputs = channels(input), channels(output)
    means = [slow.mean(row) for row in outputs]
    everything = [value for row in outputs for value in row]
    entering = [value for row in inputs for value in row]
    return {
        "channel_mean": means,
        "channel_variance": [slow.variance(row) for row in outputs],
        "between_channel_share": slow.variance(means) / slow.variance(everything),
        "input_mean": slow.mean(entering),
        "input_mean_share": slow.mean(entering) ** 2 / (slow.norm(entering) ** 2 / len(entering)),
        "dead_inputs": sum(not any(row) for row in inputs) / len(inputs),
    }


def recorded(trace, layer):
    return {record["signal"]: record["value"] for record in trace.records(layer=layer)}


def seen(net, batches):
    with fw.diagnose.record(net, signals="activations") as trace:
        for x in batches:
            net(x)
    return trace


def check(trace, net, x, rel=1e-10):
    first = net.first(x)
    second = net.second(first.relu())
    mean = second.mean((2, 3))
    for layer, pair in {
        "first": (x, first),
        "second": (first.relu(), second),
        "head": (mean, net.head(mean)),
    }.items():
        got = recorded(trace, layer)
        wanted = expected(*pair)
        assert got.keys() == wanted.keys()
        for name, value in wanted.items():
            assert got[name] == pytest.approx(value, rel=rel, abs=rel), (layer, name)


@pytest.mark.parametrize("sizes", [(5,), (2, 1, 2)])
def test_every_channel_against_a_loop(sizes):
    net = Net().double()
    x = pictures()
    trace = seen(net, x.split(sizes))
    check(trace, net, x)
    assert recorded(trace, "second")["dead_inputs"] == 0.25


def test_channels_last_and_float32():
    net = Net().to(memory_format=torch.channels_last)
    x = pictures().float()
    trace = seen(net, [x.to(memory_format=torch.channels_last)])
    check(trace, net.double(), x.double(), rel=1e-4)


def test_a_mean_far_above_the_deviation():
    net = nn.Sequential(nn.Conv2d(1, 2, 1)).double()
    x = torch.randn(4, 1, 5, 5, dtype=torch.float64) * 1e-3
    with torch.no_grad():
        net[0].bias.fill_(1e5)
    trace = seen(net.float(), [x.float()[:1], x.float()[1:]])
    got = recorded(trace, "0")
    outputs = channels(net(x.float()))
    assert got["channel_variance"] == pytest.approx([slow.variance(row) for row in outputs], 1e-3)


def test_one_picture_without_a_batch_axis():
    net = nn.Sequential(nn.Conv2d(3, 4, 3)).double()
    x = pictures(1)
    trace = seen(net, [x[0]])
    got = recorded(trace, "0")
    assert got["channel_mean"] == pytest.approx(expected(x, net(x))["channel_mean"])


def test_sequences_have_their_channels_last():
    net = nn.Sequential(nn.Linear(3, 4)).double()
    x = torch.randn(2, 7, 3, dtype=torch.float64)
    got = recorded(seen(net, [x]), "0")
    outputs = channels(net(x), 2)
    assert got["channel_variance"] == pytest.approx([slow.variance(row) for row in outputs])


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_a_checkpoint_repeats_is_counted_once(reentrant):
    net = Net(reentrant).double()
    x = pictures().requires_grad_()
    with fw.diagnose.record(net, signals=["channel_histogram", "activations"]) as trace:
        net(x).sum().backward()
    check_first = recorded(trace, "first")
    counts = [sum(row[2:]) for row in check_first["channel_histogram"]]
    assert counts == [5 * 4 * 4] * 4
    assert check_first["channel_mean"] == pytest.approx(expected(x, net.first(x))["channel_mean"])


def test_forwards_in_the_other_mode_do_not_count():
    net = Net().double()
    x = pictures()
    with fw.diagnose.record(net, signals="activations") as trace:
        net(x)
        net.eval()
        net(100 * x)
        net.train()
    check(trace, net, x)


def test_histograms_count_every_value_in_bins_of_the_first_micro_batch():
    net = nn.Sequential(nn.Conv2d(3, 4, 3)).double()
    x = pictures()
    with fw.diagnose.record(net, signals="channel_histogram") as trace:
        net(x[:2])
        net(3 * x[2:])
    first, both = channels(net(x[:2])), channels(torch.cat([net(x[:2]), net(3 * x[2:])]))
    got = recorded(trace, "0")["channel_histogram"]
    for row, start, values in zip(got, first, both, strict=True):
        low, high, *counts = row
        spread = 5 * math.sqrt(slow.variance(start))
        assert low == pytest.approx(slow.mean(start) - spread)
        assert high == pytest.approx(slow.mean(start) + spread)
        assert sum(counts) == len(values)
        wanted = slow.count_between(values, low, high)
        assert sum(abs(a - b) for a, b in zip(counts, wanted, strict=True)) <= 2
