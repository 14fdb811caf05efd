"""Checkpoints of preserved models, both ways."""

from __future__ import annotations

import copy
import io
import warnings

import pytest
import torch

import filterwise as fw
from preserve.nets import answer, gap, pictures, small


def through_a_file(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def converted(recipe, *, preserve=True, change=0.0):
    net = small()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(1 + change)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fw.FilterwiseWarning)
        fw.convert_(net, recipe, preserve=preserve)
    return net


@pytest.mark.parametrize("recipe", ["keep+ws", "wa", "gn+pws", "keep+wn"])
def test_preserved_to_preserved_is_strict_silent_and_exact(recipe):
    net, other = converted(recipe, change=0.3), converted(recipe)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other.load_state_dict(through_a_file(net.state_dict()), strict=True)
    assert torch.equal(answer(other, pictures()), answer(net, pictures()))


@pytest.mark.parametrize("recipe", ["keep+ws", "keep+wa", "keep+pws", "keep+centered"])
def test_a_plain_checkpoint_keeps_its_function(recipe):
    """As ConvAWS's loading hook does: gain and offset are those of the weights that came."""
    source = small()
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.mul_(1.7)
    net = converted(recipe)
    with pytest.warns(fw.CheckpointWarning, match="computes what a plain layer would") as got:
        net.load_state_dict(through_a_file(source.state_dict()), strict=True)
    assert len(got) == 1
    assert gap(answer(net, pictures()), answer(source, pictures())) <= 1e-12


def test_lost_metadata_is_taken_for_a_plain_checkpoint():
    source, net = small(), converted("keep+ws", change=0.4)
    with pytest.warns(fw.CheckpointWarning, match="lost its metadata"):
        net.load_state_dict(dict(source.state_dict()), strict=True)
    assert gap(answer(net, pictures()), answer(source, pictures())) <= 1e-12


@pytest.mark.parametrize("recipe", ["keep+ws", "keep+wa", "keep+wn", "keep+pws"])
def test_a_checkpoint_of_the_method_alone_keeps_its_own_function(recipe):
    source, net = converted(recipe, preserve=False, change=0.2), converted(recipe)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net.load_state_dict(through_a_file(source.state_dict()), strict=True)
    assert gap(answer(net, pictures()), answer(source, pictures())) <= 1e-12


@pytest.mark.parametrize("recipe", ["keep+ws", "keep+wa"])
def test_a_preserved_checkpoint_in_a_layer_that_cannot_hold_it_says_so(recipe):
    source, net = converted(recipe), converted(recipe, preserve=False)
    state = through_a_file(source.state_dict())
    with (
        pytest.warns(fw.CheckpointWarning, match="convert with preserve=True, then load"),
        pytest.raises(RuntimeError, match=r"stem\.gain|stem\.offset"),
    ):
        net.load_state_dict(state, strict=True)
    with pytest.warns(fw.CheckpointWarning, match="convert with preserve=True, then load"):
        net.load_state_dict(state, strict=False)


def test_options_travel_with_the_word():
    record = through_a_file(converted("keep+ws").state_dict())._metadata["stem"]["filterwise"]
    assert record["method"] == "ws"
    assert record["preserve"] is True
    plain = converted("keep+ws", preserve=False).state_dict()._metadata["stem"]["filterwise"]
    assert "preserve" not in plain
    with pytest.warns(fw.CheckpointWarning, match="eps 1e-05 -> 0.001"):
        converted("keep+ws(eps=1e-3)").load_state_dict(converted("keep+ws").state_dict())


def test_copies_and_moves_keep_the_function():
    net = converted("wa")
    expected = answer(net, pictures())
    other = copy.deepcopy(net)
    assert torch.equal(answer(other, pictures()), expected)
    single = copy.deepcopy(net).float()
    assert single.stem.offset.dtype == torch.float32
    assert gap(answer(single, pictures(torch.float32)).double(), expected) < 1e-5
