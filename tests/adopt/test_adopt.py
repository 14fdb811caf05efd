"""`adopt_`: other libraries' layers compute, load, save, fold and go back as before."""

from __future__ import annotations

import copy
import io
import pickle
import sys
import warnings
from unittest.mock import patch

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
from filterwise import adopt, host
from support import foreign
from support.fingerprint import fingerprint

SILU = 1.7881293296813965


def composer(layer):
    parametrize.register_parametrization(layer, "weight", foreign.WeightStandardizer())
    return layer


def hooked(layer, dim=0):
    with warnings.catch_warnings(action="ignore"):
        return nn.utils.weight_norm(layer, dim=dim)


def normed(layer, dim=0):
    return parametrizations.weight_norm(layer, dim=dim)


LAYERS = {
    "StdConv2d": (lambda: StdConv2d(4, 6, 3, stride=2, bias=True), nn.Conv2d),
    "StdConv2d grouped": (lambda: StdConv2d(4, 6, 3, groups=2, eps=1e-8), nn.Conv2d),
    "StdConv2dSame": (lambda: StdConv2dSame(4, 6, 3, stride=2), Conv2dSame),
    "StdConv2dSame static": (lambda: StdConv2dSame(4, 6, 3), nn.Conv2d),
    "ScaledStdConv2d": (lambda: ScaledStdConv2d(4, 6, 3, gamma=SILU, eps=1e-5), nn.Conv2d),
    "ScaledStdConv2dSame": (lambda: ScaledStdConv2dSame(4, 6, 3, stride=2, gamma=1.3), Conv2dSame),
    "official": (lambda: foreign.Conv2d(4, 6, 3, dilation=2), nn.Conv2d),
    "ConvWS2d": (lambda: foreign.ConvWS2d(4, 6, 3, padding=1), nn.Conv2d),
    "ConvAWS2d": (lambda: foreign.ConvAWS2d(4, 6, 3), nn.Conv2d),
    "transformers": (lambda: foreign.WeightStandardizedConv2d(4, 6, 3, eps=1e-8), nn.Conv2d),
    "transformers, SAME": (
        lambda: foreign.WeightStandardizedConv2d(4, 6, 3, stride=2, same=True),
        Conv2dSame,
    ),
    "WSConv2d": (lambda: foreign.WSConv2d(4, 6, 3), nn.Conv2d),
    "WSConv1d": (lambda: foreign.WSConv1d(4, 6, 3), nn.Conv1d),
    "WSConvTranspose2d": (lambda: foreign.WSConvTranspose2d(4, 6, 3), nn.ConvTranspose2d),
    "Composer": (lambda: composer(nn.Conv3d(4, 6, 2)), nn.Conv3d),
    "Composer on SAME": (lambda: composer(Conv2dSame(4, 6, 3, stride=2)), Conv2dSame),
    "weight_norm": (lambda: normed(nn.Conv1d(4, 6, 3)), nn.Conv1d),
    "weight_norm, linear": (lambda: normed(nn.Linear(4, 6)), nn.Linear),
    "weight_norm, axis 1": (lambda: normed(nn.Linear(4, 6), 1), nn.Linear),
    "weight_norm, transposed": (
        lambda: normed(nn.ConvTranspose1d(4, 6, 3, groups=2)),
        nn.ConvTranspose1d,
    ),
    "weight_norm, transposed, axis 1": (
        lambda: normed(nn.ConvTranspose1d(4, 6, 3, groups=2), 1),
        nn.ConvTranspose1d,
    ),
    "hook": (lambda: hooked(nn.Conv2d(4, 6, 3)), nn.Conv2d),
    "hook, transposed, axis 1": (
        lambda: hooked(nn.ConvTranspose2d(4, 6, 3), 1),
        nn.ConvTranspose2d,
    ),
}


def made(name, dtype=torch.float32):
    """Return a model of one such layer, away from its start, and an input."""
    torch.manual_seed(3)
    with torch.device("cpu"):
        layer = LAYERS[name][0]()
    with torch.no_grad():
        for tensor in (*layer.parameters(), *layer.buffers()):
            tensor.add_(0.3 * torch.randn_like(tensor))
    weight = next(p for p in layer.parameters() if p.dim() > 1)
    x = torch.randn(2, 4, *[9] * (weight.dim() - 2)).to(dtype)
    if isinstance(layer, nn.Linear):
        x = x[:, :4]
    return nn.Sequential(layer).to(dtype), x


def relative(found, expected):
    return float((found - expected).detach().abs().max() / expected.detach().abs().max())


@pytest.mark.parametrize("name", LAYERS)
def test_same_outputs_gradients_and_way_back(name):
    for dtype, limit in ((torch.float32, 1e-6), (torch.float64, 1e-12)):
        model, x = made(name, dtype)
        parameters = {id(p) for p in model.parameters()}
        shapes = {k: v.shape for k, v in model.state_dict().items()}
        expected = model(x)
        upstream = torch.randn_like(expected)
        theirs = dict(zip(map(id, model.parameters()),
            torch.autograd.grad(expected, list(model.parameters()), upstream), strict=True,
        ))  # fmt: skip
        report = fw.adopt_(model)
        assert report.converted == ["0"]
        assert {id(p) for p in model.parameters()} == parameters
        found = model(x)
        assert relative(found, expected) < limit
        ours = torch.autograd.grad(found, list(model.parameters()), upstream)
        for parameter, gradient in zip(model.parameters(), ours, strict=True):
            assert relative(gradient, theirs[id(parameter)]) < 20 * limit
        back = fw.unconvert_(model)
        assert back[0].action == "remove"
        assert {id(p) for p in model.parameters()} == parameters
        assert {k: v.shape for k, v in model.state_dict().items()} == shapes
        assert torch.equal(model(x), expected)


@pytest.mark.parametrize("name", LAYERS)
def test_folds_to_the_plain_class(name):
    model, x = made(name)
    expected = model(x)
    fw.adopt_(model)
    plain = fw.fold(model, example_input=x)
    assert type(plain[0]) is LAYERS[name][1]
    assert set(dict(plain[0].named_parameters())) <= {"weight", "bias"}
    assert not list(plain[0].buffers())
    assert relative(plain(x), expected) < 2e-6
    assert relative(plain(x[..., :8]), model(x[..., :8])) < 2e-6 or x.dim() == 2


@pytest.mark.parametrize("name", LAYERS)
def test_keys_stay_and_checkpoints_load_both_ways(name):
    model, x = made(name)
    theirs, expected = copied_state(model), model(x)
    other, _ = made(name)
    fw.adopt_(model)
    fw.adopt_(other)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5).add_(0.1)
    with warnings.catch_warnings(action="error"):
        other.load_state_dict(theirs)
        assert relative(other(x), expected) < 1e-6
        other.load_state_dict(dict(theirs))
        file = io.BytesIO()
        torch.save(model.state_dict(), file)
        file.seek(0)
        other.load_state_dict(torch.load(file, weights_only=True))
    ours = copied_state(model)
    if "parametrizations" in "".join(theirs) or "weight_v" in "".join(theirs):
        assert set(ours) <= {"0.weight", "0.gain", "0.bias"}
        fw.unconvert_(model)
        model.load_state_dict(theirs)
    else:
        assert list(ours) == list(theirs)
        fresh, _ = made(name)
        fresh.load_state_dict(ours)
        assert torch.equal(fresh(x), expected)


def copied_state(model):
    state = model.state_dict()
    for key in list(state):
        state[key] = state[key].clone()
    return state


@pytest.mark.parametrize("name", ["ScaledStdConv2d", "ConvAWS2d", "weight_norm", "hook"])
def test_copies_pickles_deferral_and_evaluation(name):
    model, x = made(name, torch.float64)
    fw.adopt_(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), model(x))
        assert relative(fw.fold(other)(x), model(x)) < 1e-12
        fw.unconvert_(other)
        assert relative(other(x), model(x)) < 1e-12
    whole = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    for place in range(2):
        with fw.defer(model, enabled=not place):
            model(x[place : place + 1]).square().sum().backward()
    for parameter, gradient in zip(model.parameters(), whole, strict=True):
        assert relative(parameter.grad, gradient) < 1e-11
    with torch.no_grad():
        model.eval()
        first = model(x)
        model[0].weight.mul_(2).add_(0.1)
        assert not torch.equal(model(x), first)


def test_gains_of_either_shape_load():
    model, x = made("ScaledStdConv2d", torch.float64)
    expected = model(x)
    plain = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1)).double()
    fw.convert_(plain, "sws(activation=silu, like=timm)", select="*")
    with pytest.warns(fw.CheckpointWarning, match="lost its metadata"):
        plain.load_state_dict(dict(model.state_dict()))
    assert plain[0].gain.shape == (6,)
    assert relative(plain(x), expected) < 1e-12
    fw.adopt_(model)
    model.load_state_dict(plain.state_dict())
    assert model[0].gain.shape == (6, 1, 1, 1)


def test_old_and_new_keys_of_weight_norm_load():
    by_hook, x = made("hook", torch.float64)
    expected = by_hook(x)
    model = nn.Sequential(normed(nn.Conv2d(4, 6, 3))).double()
    fw.adopt_(model)
    model.load_state_dict(by_hook.state_dict())
    assert relative(model(x), expected) < 1e-12
    wrong = dict(by_hook.state_dict())
    wrong["0.weight_x"] = wrong.pop("0.weight_g")
    missing = pytest.warns(fw.CheckpointWarning, match="no gain")
    with missing, pytest.raises(RuntimeError, match="weight_x"):
        model.load_state_dict(wrong)


def test_report_says_whose_and_what_became_of_the_keys():
    model = nn.Sequential(
        StdConv2d(3, 8, 3), nn.GroupNorm(2, 8), normed(nn.Conv2d(8, 8, 3)), nn.Conv2d(8, 8, 3)
    )
    report = fw.adopt_(model)
    first, second = report
    assert (first.name, first.kind, first.action) == ("0", "StdConv2d", "convert")
    assert (first.method, first.fan_in, first.filters) == ("ws(eps=1e-06, eps_inside=true)", 27, 8)
    assert "timm" in first.reason
    assert second.kind == "ParametrizedConv2d"
    text = str(report)
    assert "2 adopted" in text
    assert "Loading takes the old keys" in text
    assert fw.describe(model) == {"0": first.method, "2": "wn"}
    assert "FilterwiseConv2d" in repr(model)
    assert isinstance(model[0], nn.Conv2d)


def test_nothing_to_adopt_is_an_empty_report():
    for model in (nn.Sequential(nn.Conv2d(4, 6, 3), Conv2dSame(6, 6, 3)), nn.ReLU()):
        before = fingerprint(model)
        assert len(fw.adopt_(model)) == 0
        assert fingerprint(model) == before
    model = nn.Sequential(StdConv2d(4, 6, 3))
    assert len(fw.adopt_(model)) == 1
    assert len(fw.adopt_(model)) == 0
    model.load_state_dict(model.state_dict())
    assert len(model._load_state_dict_post_hooks) == 1


def test_unknown_layers_are_left_alone_and_named():
    model = nn.Sequential(StdConv2d(4, 6, 3), foreign.LowRankConv2d(6, 6, 3))
    report = fw.adopt_(model)
    assert report.converted == ["0"]
    assert any("1 (LowRankConv2d)" in note for note in report.notes)
    assert type(model[1]) is foreign.LowRankConv2d
    for other in (foreign.LowRankConv2d, foreign.EqualizedConv2d):
        plain = nn.Sequential(other(4, 8, 3), nn.GroupNorm(2, 8), nn.Conv2d(8, 2, 1))
        assert fw.convert_(plain, "keep+ws").converted == ["0"]


REFUSED = {
    "inverted": (foreign.InvertedConv2d, "multiplies by the standard deviation"),
    "variance": (foreign.VarianceConv2d, "divides by the variance"),
    "dtype": (foreign.DtypeConv2d, r"depends on the input's dtype \(1e-05 in float32, else 0.001"),
    "outside": (foreign.OutsideScaledConv2d, "added to the divisor"),
    "two": (foreign.SAConv2d, "numbers are those of no published formula"),
    "whole": (lambda *a: normed(nn.Conv2d(*a), None), "dim=None"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_method_computes_is_refused_whole(name):
    make, reason = REFUSED[name]
    model = nn.Sequential(StdConv2d(4, 6, 3), make(6, 6, 3))
    before = fingerprint(model)
    with pytest.raises(
        fw.ConversionError, match=rf"1 \(.*\) cannot be adopted: .*{reason}"
    ) as error:
        fw.adopt_(model)
    assert "The model is unchanged." in str(error.value)
    assert fingerprint(model) == before
    fw.adopt_(model[0])


def test_dynamic_padding_without_a_plain_class_is_refused():
    model = nn.Sequential(foreign.WeightStandardizedConv2d(4, 6, 3, stride=2, same=True))
    with patch.dict("sys.modules"):
        del sys.modules["timm.layers"]
        with pytest.raises(fw.ConversionError, match="import timm first"):
            fw.adopt_(model)


def test_wrapped_and_read_behind_its_back_are_refused():
    model = nn.DataParallel(nn.Sequential(StdConv2d(4, 6, 3)))
    with pytest.raises(fw.ConversionError, match="DataParallel"):
        fw.adopt_(model)
    assert type(model.module[0]) is StdConv2d
    block = nn.TransformerEncoderLayer(8, 2, 8)
    normed(block.linear1)
    with pytest.raises(fw.ConversionError, match=r"linear1.*read by TransformerEncoderLayer"):
        fw.adopt_(block)
    taken = nn.Sequential(normed(nn.Conv2d(4, 6, 3)))
    taken[0].gain = 3
    with pytest.raises(fw.ConversionError, match="attribute gain"):
        fw.adopt_(taken)


@pytest.mark.parametrize("last", [1, 2, 3, 4])
def test_a_fault_halfway_leaves_everything_as_it_was(last):
    def build():
        torch.manual_seed(0)
        return nn.Sequential(
            ScaledStdConv2d(4, 4, 3),
            hooked(nn.Conv2d(4, 4, 3)),
            normed(nn.Conv2d(4, 4, 3)),
            composer(nn.Conv2d(4, 4, 3)),
        )

    model, x = build(), torch.randn(1, 4, 12, 12)
    expected, keys, ids = model(x), list(model.state_dict()), {id(p) for p in model.parameters()}
    right, calls = host.install_state, []

    def failing(module, state):
        if module in set(model.modules()):
            calls.append(module)
            if len(calls) == last:
                raise KeyboardInterrupt
        right(module, state)

    with patch.object(host, "install_state", failing), pytest.raises(KeyboardInterrupt):
        adopt.adopt_(model)
    assert list(model.state_dict()) == keys
    assert {id(p) for p in model.parameters()} == ids
    assert torch.equal(model(x), expected)
    assert not any(host.is_converted(module) for module in model.modules())
    assert not model._load_state_dict_post_hooks


def test_a_model_on_the_meta_device_is_adopted_and_filled():
    with torch.device("meta"):
        model = nn.Sequential(ScaledStdConv2d(4, 6, 3, gamma=SILU, eps=1e-5))
    fw.adopt_(model)
    assert model[0].weight.is_meta
    source, x = made("ScaledStdConv2d", torch.float64)
    model.to_empty(device="cpu").double().load_state_dict(source.state_dict())
    assert relative(model(x), source(x)) < 1e-12


def test_initialization_knows_gains_of_every_shape():
    model, x = made("ScaledStdConv2d")
    fw.adopt_(model)
    fw.initialize_(model, "kaiming")
    assert model[0].gain.shape == (6, 1, 1, 1)
    assert any(p is model[0].gain for p in fw.param_groups(model, 0.1)[1]["params"])
    assert model(x).isfinite().all()


def test_convert_names_the_way_and_check_finds_them():
    model = nn.Sequential(
        foreign.Conv2d(4, 16, 3), nn.GroupNorm(2, 16), nn.ReLU(), nn.Conv2d(16, 2, 1)
    )
    with pytest.raises(fw.ConversionError, match=r"itself \(Conv2d\).*adopt_\(model\)"):
        fw.convert_(model, "wa")
    found = [finding for finding in fw.check(model) if "adopt_" in finding.fix]
    assert [finding.layer for finding in found] == ["0"]
    assert "ddof=1" in found[0].what
    fw.adopt_(model)
    assert not [finding for finding in fw.check(model) if "adopt_" in finding.fix]
    with pytest.raises(fw.ConversionError, match=r"adopted layers.*fold"):
        fw.convert_(model, "wa")
    fw.convert_(fw.fold(model), "keep+ws")
    wrong = nn.Sequential(foreign.InvertedConv2d(4, 16, 3), nn.GroupNorm(2, 16))
    levels = {finding.level for finding in fw.check(wrong) if "multiplies" in finding.why}
    assert levels == {"warning"}
