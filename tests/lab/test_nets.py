"""The lab's networks: as many layers as they say, and the start that the recipes need."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import filterwise as fw
from filterwise.filters import is_weight_layer
from filterwise.lab.errors import UsageError
from filterwise.lab.nets import build


@pytest.mark.parametrize(
    ("net", "layers"), [("plain", 6), ("plain12", 12), ("plain30", 30), ("residual", 50)]
)
def test_number_of_weight_layers(net, layers):
    model, _ = build(net, "none", 1, 10)
    assert sum(is_weight_layer(module) for module in model.modules()) == layers


@pytest.mark.parametrize("net", ["plain", "residual"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("side", [8, 28, 33])
def test_pictures_of_any_size(net, channels, side):
    model, _ = build(net, "bn", channels, 7)
    assert model(torch.randn(2, channels, side, side)).shape == (2, 7)


@pytest.mark.parametrize("net", ["plain", "residual"])
def test_all_recipes_of_a_seed_start_from_the_same_raw_weights(net):
    found = []
    for recipe in ("none", "bn", "gn+ws", "wa"):
        torch.manual_seed(3)
        model, _ = build(net, recipe, 1, 10)
        found.append([p for name, p in model.named_parameters() if name.endswith("weight")])
        found[-1] = [p for p in found[-1] if p.dim() > 1]
    for weights in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(weights, found[0], strict=True))


def test_first_weights_have_he_scale():
    torch.manual_seed(0)
    model, _ = build("plain", "none", 1, 10)
    wide = model.features[12]
    assert isinstance(wide, nn.Conv2d)
    assert float(wide.weight.detach().std()) == pytest.approx(math.sqrt(2 / (64 * 9)), rel=0.01)


def test_gains_at_the_end_of_branches():
    model, _ = build("residual", "wa", 1, 10)
    gains = {name: p for name, p in model.named_parameters() if name.endswith(".gain")}
    ends = [p for name, p in gains.items() if ".branch.4." in name]
    assert len(ends) == 24
    assert len(gains) == 48
    for gain in ends:
        torch.testing.assert_close(gain, torch.full_like(gain, 24**-0.5))
    for name, gain in gains.items():
        if ".branch.4." not in name:
            torch.testing.assert_close(gain, torch.ones_like(gain))


def test_no_branch_gains_behind_a_norm():
    model, _ = build("residual", "gn+wa", 1, 10)
    gains = [p for name, p in model.named_parameters() if name.endswith(".gain")]
    assert all(torch.equal(gain, torch.ones_like(gain)) for gain in gains)


@pytest.mark.parametrize("net", ["plain", "residual"])
@pytest.mark.parametrize("name", [info.name for info in fw.methods() if info.name != "ews"])
def test_every_method_can_be_compared(net, name):
    model, report = build(net, f"gn+{name}", 1, 10)
    assert len(report.converted) == {"plain": 4, "residual": 48}[net]
    loss = model(torch.randn(4, 1, 8, 8)).square().sum()
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_torchvision_models_see_grey_pictures():
    model, report = build("resnet18", "gn+ws", 1, 10)
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 10)
    assert len(report.converted) == 20


def test_an_unknown_net_names_the_nearest():
    with pytest.raises(UsageError, match="Nearest: residual"):
        build("rezidual", "none", 1, 10)
