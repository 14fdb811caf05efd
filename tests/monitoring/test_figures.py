"""Each figure against its definition, filter by filter in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import filterwise as fw
from filterwise.monitoring.figures import figures_of, watched_layers


def nets():
    plain = nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Conv2d(6, 3, 3))
    converted = fw.convert_(nn.Sequential(nn.Conv2d(4, 6, 3), nn.Conv2d(6, 3, 3)), "wa")
    del converted
    wa = nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Conv2d(6, 3, 3))
    fw.convert_(wa, "wa", select="*")
    transposed = nn.Sequential(nn.ConvTranspose2d(8, 6, 3, groups=2), nn.Conv2d(6, 3, 3))
    fw.convert_(transposed, "wn", select="*")
    return {"plain": plain, "wa": wa, "transposed wn": transposed}


def filters(module, weight):
    """Return the filters as lists of numbers, by the definition of each layer."""
    weight = weight.double()
    if isinstance(module, nn.ConvTranspose2d):
        inputs, outputs = weight.shape[0] // module.groups, weight.shape[1]
        return [
            weight[q * inputs : (q + 1) * inputs, j].flatten().tolist()
            for q in range(module.groups)
            for j in range(outputs)
        ]
    return [row.flatten().tolist() for row in weight]


def middle(values):
    return sorted(values)[(len(values) - 1) // 2]


def spread(values):
    mean = math.fsum(values) / len(values)
    return math.fsum((v - mean) ** 2 for v in values) / len(values)


def angle(one, other):
    dot = math.fsum(a * b for a, b in zip(one, other, strict=True))
    lengths = math.sqrt(math.fsum(a * a for a in one) * math.fsum(b * b for b in other))
    return math.degrees(math.acos(max(-1.0, min(1.0, dot / lengths))))


def less_mean(row):
    mean = math.fsum(row) / len(row)
    return [v - mean for v in row]


@pytest.mark.parametrize("name", ["plain", "wa", "transposed wn"])
def test_figures_are_their_definitions(name):
    torch.manual_seed(0)
    net = nets()[name]
    layers = watched_layers(net)
    assert [one.name for one in layers] == [
        n for n, m in net.named_modules() if n and hasattr(m, "weight")
    ]
    before = [one.weight.detach().clone() for one in layers]
    matrices = [one.rows().clone() for one in layers]
    with torch.no_grad():
        for one in layers:
            one.weight.add_(0.05 * torch.randn_like(one.weight) + 0.01)
        layers[0].weight.data[0].abs_()
    for one, old, figures in zip(layers, before, figures_of(layers, matrices), strict=True):
        rows, olds = filters(one.module, one.weight.detach()), filters(one.module, old)
        n = len(rows[0])
        centred = name == "wa"
        variances = [spread(row) for row in rows]
        moments = variances if centred else [math.fsum(v * v for v in row) / n for row in rows]
        prepare = less_mean if centred else list
        turns = [angle(prepare(a), prepare(b)) for a, b in zip(rows, olds, strict=True)]
        shifts = [math.fsum(a) - math.fsum(b) for a, b in zip(rows, olds, strict=True)]
        signs = sum(min(row) > 0 or max(row) < 0 for row in rows)
        expected = (1.0, min(variances), middle(moments), middle(turns), spread(shifts), signs)
        assert tuple(figures) == pytest.approx(expected, rel=2e-5)


def test_small_turns_are_seen():
    net = nn.Sequential(nn.Conv2d(4, 6, 3))
    layers = watched_layers(net)
    old = layers[0].rows().clone()
    across = torch.randn_like(old)
    across -= old * (across * old).sum(1, keepdim=True) / old.square().sum(1, keepdim=True)
    across *= 1e-4 * old.norm(dim=1, keepdim=True) / across.norm(dim=1, keepdim=True)
    with torch.no_grad():
        layers[0].weight.add_(across.view_as(layers[0].weight))
    (figures,) = figures_of(layers, [old])
    assert figures.turn == pytest.approx(math.degrees(math.atan(1e-4)), rel=1e-2)


def test_damage_and_constant_filters():
    net = nn.Sequential(nn.Conv2d(4, 6, 3))
    fw.convert_(net, "wa", select="*")
    layers = watched_layers(net)
    old = layers[0].rows().clone()
    with torch.no_grad():
        net[0].weight[0] = 0.5
    (figures,) = figures_of(layers, [old])
    assert figures.finite == 1
    assert figures.least_variance > 0
    with torch.no_grad():
        net[0].weight[1, 0, 0, 0] = math.nan
    assert figures_of(layers, [old])[0].finite == 0


def test_what_is_watched():
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.Conv2d(4, 4, 3),
        nn.Conv2d(4, 4, 3, groups=4),
        nn.Flatten(),
        nn.Linear(64, 2),
    )
    net[1].weight.requires_grad_(False)
    assert [(one.name, one.last) for one in watched_layers(net)] == [("4", True)]
    fw.convert_(net, "wa", select="[02]")
    found = watched_layers(net)
    assert [one.name for one in found] == ["0", "2", "4"]
    assert [one.is_centred for one in found] == [True, True, False]
    with torch.device("meta"):
        assert watched_layers(nn.Sequential(nn.Conv2d(4, 4, 3))) == []
