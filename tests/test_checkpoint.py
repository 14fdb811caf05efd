"""Checkpoints: plain keys both ways, options in the metadata, one warning where they differ."""

from __future__ import annotations

import copy
import io
import warnings

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import filterwise as fw

METHODS = ["ws", "wa", "pws", "equinorm", "wn", "cwn", "centered", "sws", "ws(affine=true)"]


def plain():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=2),
        nn.BatchNorm2d(8),
        nn.Flatten(),
        nn.Linear(8 * 16, 4),
    )


def converted(method):
    net = plain()
    fw.convert_(net, f"bn+{method}")
    return net


def perturbed(net):
    with torch.no_grad():
        for value in net.parameters():
            value.add_(0.1 * torch.randn_like(value))
    net(torch.rand(4, 3, 8, 8))
    return net


def saved(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def same(net, other):
    x = torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(net.eval()(x), other.eval()(x), rtol=0, atol=0)


@pytest.mark.parametrize("method", METHODS)
def test_converted_to_converted_is_silent_and_exact(method):
    net, other = perturbed(converted(method)), converted(method)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other.load_state_dict(saved(net.state_dict()), strict=True)
    same(net, other)


@pytest.mark.parametrize("method", METHODS)
def test_plain_to_converted_starts_the_gains_and_says_so_once(method):
    source, net = perturbed(plain()), perturbed(converted(method))
    with pytest.warns(fw.CheckpointWarning, match="plain model") as got:
        net.load_state_dict(saved(source.state_dict()), strict=True)
    assert len(got) == 1
    fresh = copy.deepcopy(source)
    fw.convert_(fresh, f"keep+{method}")
    for (name, value), (_, expected) in zip(
        net.state_dict().items(), fresh.state_dict().items(), strict=True
    ):
        assert torch.equal(value, expected), name


@pytest.mark.parametrize("method", METHODS)
def test_raw_weights_of_a_converted_model_load_into_a_plain_one(method):
    net = perturbed(converted(method))
    other = copy.deepcopy(net)
    fw.unconvert_(other)
    target = plain()
    target.load_state_dict(saved(other.state_dict()), strict=True)
    assert torch.equal(target[0].weight, net[0].weight)
    result = plain().load_state_dict(net.state_dict(), strict=False)
    assert not result.missing_keys
    assert all(
        key.split(".")[-1] in ("gain", "offset", "input_mean", "num_batches_tracked")
        for key in result.unexpected_keys
    )


def test_a_method_that_starts_plain_says_that_the_function_is_kept():
    net, source = converted("wn"), perturbed(plain())
    with pytest.warns(fw.CheckpointWarning, match="computes what a plain layer would"):
        net.load_state_dict(source.state_dict())
    x = torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(net.eval()(x), source.eval()(x))


def test_other_options_are_both_named():
    net = converted("ws(eps=1e-10, eps_inside=true)")
    with pytest.warns(fw.CheckpointWarning) as got:
        net.load_state_dict(saved(converted("ws").state_dict()))
    text = str(got[0].message)
    assert len(got) == 1
    for words in (
        "0: it was saved as ws",
        "eps 1e-05 -> 1e-10",
        "eps_inside False -> True",
        "2 of 2",
    ):
        assert words in text


def test_another_method_is_named():
    with pytest.warns(fw.CheckpointWarning, match="saved as wa and is loaded into ws"):
        converted("ws").load_state_dict(converted("wa").state_dict(), strict=False)


def test_lost_metadata_is_said():
    with pytest.warns(fw.CheckpointWarning, match="options are unknown"):
        converted("ws").load_state_dict(dict(converted("ws").state_dict()))


def test_metadata_is_flat_text_and_numbers():
    state = converted("pws(gamma=0.2*2/n)").state_dict()
    record = saved(state)._metadata["0"]["filterwise"]
    assert record == {"method": "pws", "format": 1, "gamma": "0.2*2/n"}
    assert "filterwise" not in str(list(state))


def test_averaged_model_is_independent_and_keeps_the_options():
    net = converted("wa")
    average = AveragedModel(net)
    assert average.module[0].gain is not net[0].gain
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    net(torch.rand(4, 3, 8, 8)).square().sum().backward()
    before = average.module[0].weight.detach().clone()
    optimizer.step()
    assert torch.equal(average.module[0].weight, before)
    average.update_parameters(net)
    assert average.state_dict()._metadata["module.0"]["filterwise"]["method"] == "wa"


def test_hook_is_gone_after_unconverting_and_in_copies_of_the_plain_model():
    net = converted("ws")
    copied = copy.deepcopy(net)
    fw.unconvert_(copied)
    assert not copied._load_state_dict_post_hooks
    assert net._load_state_dict_post_hooks


def test_converted_part_of_a_model_says_it_too():
    whole = nn.ModuleDict({"backbone": converted("ws"), "other": nn.Linear(2, 2)})
    source = nn.ModuleDict({"backbone": plain(), "other": nn.Linear(2, 2)})
    with pytest.warns(fw.CheckpointWarning, match="plain model"):
        whole.load_state_dict(source.state_dict())


def nested():
    model = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Sequential(nn.Conv2d(8, 8, 3))),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 8, 3),
        nn.BatchNorm2d(8),
    )
    fw.convert_(model, "bn+wa", select="*")
    return model


@pytest.mark.parametrize("name", ["0", "0.2", "0.2.0", "2"])
def test_a_part_that_is_loaded_by_itself_speaks_once(name):
    part, plain_part = (model.get_submodule(name) for model in (nested(), fw.fold(nested())))
    with pytest.warns(fw.CheckpointWarning, match="plain model") as told:
        part.load_state_dict(plain_part.state_dict())
    assert len(told) == 1
    assert told[0].filename == __file__
    own = copy.deepcopy(part)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        part.load_state_dict(own.state_dict())


def test_the_whole_speaks_for_its_parts():
    plain_state = fw.fold(nested()).state_dict()
    for model in (nested(), nn.ModuleDict({"inner": nested()})):
        prefix = "inner." if isinstance(model, nn.ModuleDict) else ""
        state = type(plain_state)((prefix + key, value) for key, value in plain_state.items())
        with pytest.warns(fw.CheckpointWarning, match="for 3 of 3 converted layers") as told:
            model.load_state_dict(state)
        assert len(told) == 1


def test_nothing_of_it_stays_on_what_was_unconverted_or_folded():
    model = nested()
    folded = fw.fold(model)
    fw.unconvert_(model)
    for module in (*model.modules(), *folded.modules()):
        assert not module._load_state_dict_post_hooks
