"""`identify` names the formula that a layer computes, by its numbers and not by its name."""

from __future__ import annotations

import warnings

import pytest
import torch
from timm.layers import (
    Conv2dSame,
    ScaledStdConv2d,
    ScaledStdConv2dSame,
    StdConv2d,
    StdConv2dSame,
)
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import filterwise as fw
from support import foreign
from support.fingerprint import fingerprint

SILU = 1.7881293296813965


def composer():
    layer = nn.Conv2d(4, 6, 3)
    parametrize.register_parametrization(layer, "weight", foreign.WeightStandardizer())
    return layer


def hooked():
    with warnings.catch_warnings(action="ignore"):
        return nn.utils.weight_norm(nn.Conv2d(4, 6, 3))


INSIDE = {"eps_inside": True, "ddof": 0}
LAYERS = {
    "official": (lambda: foreign.Conv2d(4, 6, 3), "ws", {"eps": 1e-5, "ddof": 1}, "authors"),
    "mmcv": (lambda: foreign.ConvWS2d(4, 6, 3), "ws", {"eps_inside": False, "ddof": 1}, "mmcv"),
    "mmcv_aws": (lambda: foreign.ConvAWS2d(4, 6, 3), "ws", {"eps_inside": True, "ddof": 1}, "AWS"),
    "timm": (lambda: StdConv2d(4, 6, 3), "ws", {"eps": 1e-6, **INSIDE}, "timm"),
    "timm, one filter": (lambda: StdConv2d(4, 1, 3), "ws", {"eps": 1e-6, **INSIDE}, "timm"),
    "timm, own eps": (lambda: StdConv2d(4, 6, 3, eps=3e-4), "ws", {"eps": 3e-4}, "Qiao"),
    "timm_bit, grouped": (
        lambda: StdConv2dSame(4, 6, 3, stride=2, groups=2, eps=1e-8), "ws", {"eps": 1e-8}, "BiT"
    ),
    "transformers": (
        lambda: foreign.WeightStandardizedConv2d(4, 6, 3, eps=1e-8), "ws", {"eps": 1e-8}, "BiT"
    ),
    "composer": (composer, "ws", {"eps": 1e-10, **INSIDE}, "Composer"),
    "timm NF": (
        lambda: ScaledStdConv2d(4, 6, 3, gamma=SILU, eps=1e-5),
        "sws",
        {"activation": "silu", "public": True, "eps": 1e-5, "floor": False},
        "timm",
    ),
    "timm, own gamma": (
        lambda: ScaledStdConv2dSame(4, 6, 3, gamma=1.37), "sws", {"activation": 1.37}, "Brock"
    ),
    "nfnets_pytorch": (
        lambda: foreign.WSConv2d(4, 6, 3),
        "sws",
        {"activation": "identity", "eps": 1e-4, "floor": True, "ddof": 1},
        "nfnets-pytorch",
    ),
    "nfnets_pytorch 1d": (
        lambda: foreign.WSConv1d(4, 16, 3), "sws", {"activation": 0.25}, "nfnets-pytorch WSConv1d"
    ),
    "nfnets_pytorch, eps outside": (
        lambda: foreign.OutsideScaledConv2d(4, 6, 3), "sws", {"eps": 1e-5}, "nfnets-pytorch"
    ),
    "pws": (lambda: foreign.PWSConv2d(4, 6, 3), "pws", {"gamma": 1e-5}, "PWS authors"),
    "pws, CIFAR": (lambda: foreign.PWSConv2d(4, 6, 3, 1e-3), "pws", {"gamma": 1e-3}, "TensorFlow"),
    "cwn": (lambda: foreign.CWNConv2d(4, 6, 3), "cwn", {"eps": 1e-5}, "CenteredWN"),
    "weight_norm": (
        lambda: parametrizations.weight_norm(nn.Linear(9, 4)), "wn", {}, "Salimans"
    ),
    "weight_norm by hook": (hooked, "wn", {}, "Salimans"),
    "inverted": (lambda: foreign.InvertedConv2d(4, 6, 3), "ws", {"eps": 1e-5}, "diffusion"),
    "by the variance": (lambda: foreign.VarianceConv2d(4, 6, 3), "ws", {"eps": 1e-5}, "GroupNorm"),
    "eps by dtype": (lambda: foreign.DtypeConv2d(4, 6, 3), "ws", {"eps": 1e-5}, "Qiao"),
    "eps by dtype, double": (
        lambda: foreign.DtypeConv2d(4, 6, 3).double(), "ws", {"eps": 1e-3}, "Qiao"
    ),
    "floor by dtype": (lambda: foreign.FlooredConv2d(4, 6, 3), "ws", {"eps": 1e-5}, "diffusion"),
    "on the meta device": (
        lambda: StdConv2d(4, 6, 3, device="meta"), "ws", {"eps": 1e-6}, "timm"
    ),
    "half precision": (lambda: StdConv2d(4, 6, 3, eps=1e-8).half(), "ws", {"eps": 1e-8}, "BiT"),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYERS)
def test_formula_options_and_whose(name):
    make, method, options, whose = LAYERS[name]
    info = fw.identify(make())
    assert info is not None
    assert info.name == method
    assert {key: info.options[key] for key in options} == options
    assert whose in info.source


def test_inverted_form_says_so():
    info = fw.identify(foreign.InvertedConv2d(4, 6, 3))
    assert "inverted" in info.title
    assert "* sqrt" in info.formula


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 6, 3),
        Conv2dSame(4, 6, 3, stride=2),
        nn.Linear(4, 3),
        nn.ReLU(),
        foreign.LowRankConv2d(4, 6, 3),
        foreign.EqualizedConv2d(4, 6, 3),
        foreign.SAConv2d(4, 6, 3),
        parametrizations.spectral_norm(nn.Conv2d(4, 6, 3)),
        parametrizations.weight_norm(nn.Linear(4, 3), dim=None),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_others_are_none(layer):
    assert fw.identify(layer) is None


def test_a_converted_layer_is_its_method():
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Conv2d(6, 2, 3))
    fw.convert_(model, "pws(gamma=0.02)")
    assert fw.identify(model[0]).options == {"gamma": 0.02}


def test_the_layer_and_the_random_state_are_left_alone():
    layer = StdConv2d(4, 6, 3).train()
    seen = []
    layer.register_forward_hook(lambda *_: seen.append(1))
    before, state = fingerprint(layer), torch.random.get_rng_state()
    fw.identify(layer)
    assert fingerprint(layer) == before
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not seen
    with torch.inference_mode():
        assert fw.identify(layer).name == "ws"


def test_a_layer_that_fails_on_the_probe_is_none():
    class Broken(nn.Conv2d):
        def forward(self, _x):
            raise OSError("no such file")

    assert fw.identify(Broken(4, 6, 3)) is None
