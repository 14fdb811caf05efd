"""Parameter groups: every parameter once, gains without decay by role."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn
from torch.nn.utils import parametrizations

import filterwise as fw

pytestmark = pytest.mark.filterwarnings("ignore::filterwise.NormalizationWarning")


def names_of(net, group):
    by_id = {id(value): name for name, value in net.named_parameters()}
    return {by_id[id(value)] for value in group["params"]}


@pytest.mark.parametrize("recipe", ["gn+ws(affine=true)", "wa", "pws", "equinorm", "wn", "sws"])
def test_every_parameter_once_and_only_weights_decay(recipe):
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), nn.Linear(8, 2))
    fw.convert_(net, recipe, select=["0", "2"])
    net[0].weight.requires_grad_(False)
    decayed, free = fw.param_groups(net, 0.01)
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.01, 0.0)
    assert names_of(net, decayed) == {"0.weight", "2.weight", "3.weight"}
    assert len(decayed["params"]) + len(free["params"]) == len(list(net.parameters()))
    torch.optim.SGD(fw.param_groups(net, 0.01), lr=0.1)


def test_gains_of_other_libraries_are_not_decayed():
    net = timm.create_model("nf_resnet50")
    decayed, free = fw.param_groups(net, 1.0)
    gains = {name for name, _ in net.named_parameters() if name.endswith("gain")}
    assert gains <= names_of(net, free)
    assert sum(name.endswith("weight") for name in names_of(net, decayed)) > 50
    weight_norm = parametrizations.weight_norm(nn.Conv2d(8, 8, 3))
    decayed, free = fw.param_groups(weight_norm, 1.0)
    assert names_of(weight_norm, decayed) == {"parametrizations.weight.original1"}


def test_tied_parameter_is_in_one_group_and_layer_norm_in_none_that_decays():
    net = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3), nn.LayerNorm([8, 4, 4]))
    net[1].weight = net[0].weight
    decayed, free = fw.param_groups(net, 1.0)
    assert names_of(net, decayed) == {"0.weight"}
    assert {"2.weight", "2.bias"} <= names_of(net, free)


def test_negative_decay_is_refused():
    with pytest.raises(ValueError, match="weight_decay"):
        fw.param_groups(nn.Linear(2, 2), -1)
