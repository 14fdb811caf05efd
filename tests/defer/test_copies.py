"""What deferral leaves behind: no second gradient, nothing in copies, nothing alive after it."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

import filterwise as fw
from support.deferral import accumulate, gradients, loss, micro_batches, network

THREE = micro_batches(2, 2, 1)


def test_gathered_gradient_is_the_gradient_between_micro_batches_and_costs_no_memory():
    model = network()
    with fw.defer(model):
        loss(model, THREE[0]).backward()
    shown = model.first.weight.grad
    address = shown.data_ptr()
    with fw.defer(model):
        loss(model, THREE[1]).backward()
    assert model.first.weight.grad is shown
    del shown
    loss(model, THREE[2]).backward()
    assert model.first.weight.grad.data_ptr() == address


def test_copies_in_the_middle_are_independent():
    model = network()
    with fw.defer(model):
        loss(model, THREE[0]).backward()
        other = copy.deepcopy(model)
        loss(other, THREE[1]).backward()
    alone = network()
    loss(alone, THREE[1]).backward()
    for name, gradient in gradients(alone).items():
        torch.testing.assert_close(gradients(other)[name], gradient, rtol=1e-11, atol=1e-11)
    torch.optim.SGD(other.parameters(), 0.1).step()
    loss(model, THREE[1]).backward()
    reference = network()
    for x in THREE[:2]:
        loss(reference, x).backward()
    for name, gradient in gradients(reference).items():
        torch.testing.assert_close(gradients(model)[name], gradient, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("middle", [True, False])
def test_model_and_what_it_kept_are_freed(middle):
    model = network()
    if middle:
        with fw.defer(model):
            loss(model, THREE[0]).backward()
    else:
        accumulate(model, THREE, fw.defer)
        with torch.no_grad():
            model.eval()(THREE[0])
    seen = []
    for module in model.modules():
        state = module.__dict__.get("_filterwise")
        if state is not None:
            seen += [weakref.ref(value) for value in vars(state).values() if _is_ours(value)]
    assert seen
    alive = weakref.ref(model)
    del model, module, state
    gc.collect()  # the model and, with it, what is known of it; then what that held
    gc.collect()
    assert alive() is None
    assert [ref() for ref in seen if ref() is not None] == []


def _is_ours(value):
    return (
        type(value).__module__.startswith("filterwise")
        and not hasattr(value, "options")
        and (type(value).__name__ != "FilterLayout")
    )


def test_without_converted_layers_nothing_is_left_on_the_model():
    plain = nn.Sequential(nn.Linear(3, 2))
    with fw.defer(plain):
        plain(torch.zeros(1, 3)).sum().backward()
    assert not any("filterwise" in key for key in plain.__dict__)
