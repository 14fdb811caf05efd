"""torch.compile of the model: right in and out of a window, whole, and compiled once.

The backend "eager" traces as any other does and needs no compiler.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

import filterwise as fw
from support.deferral import (
    Net,
    accumulate,
    as_ever,
    assert_same_gradients,
    convert,
    gradients,
    loss,
    micro_batches,
    network,
    states,
)

THREE = micro_batches(2, 2, 2)
UNEVEN = micro_batches(2, 2, 1)


class Counter:
    """A backend that runs graphs as they are and counts them."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, inputs):
        del inputs
        self.graphs += 1
        return graph.forward


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def trained(model, defer, batches=THREE, steps=3):
    """Train; return the gradients and weights of the end."""
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        accumulate(model, batches, defer)
        optimizer.step()
    inner = getattr(model, "_orig_mod", model)
    return gradients(inner), states(inner)


@pytest.mark.parametrize("method", ["ws", "wa", "cwn", "sws"])
def test_compiled_model_in_and_out_of_a_window(method):
    counter = Counter()
    compiled = torch.compile(network(method), backend=counter, fullgraph=True)
    deferred = trained(compiled, fw.defer)
    assert counter.graphs == 1
    expected = trained(network(method), as_ever)
    for got, want in zip(deferred, expected, strict=True):
        assert_same_gradients(got, want, within=1e-11)
    loss(compiled, THREE[0])
    assert counter.graphs == 1, "the second way of calling was compiled again"


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_compiled_evaluation_follows_the_weights(mode):
    counter = Counter()
    model = network().eval()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for _ in range(3):
        with mode():
            model(THREE[0])
            got = compiled(THREE[0]).clone()
            fw.keep_weights(model, False)
            torch.testing.assert_close(got, model(THREE[0]), rtol=1e-12, atol=1e-12)
            fw.keep_weights(model, True)
        with torch.no_grad():
            model.first.weight.add_(torch.randn_like(model.first.weight))
    assert counter.graphs == 1


def test_compiled_and_plain_forwards_in_one_window():
    model, reference = network(), network()
    compiled = torch.compile(model, backend=Counter(), fullgraph=True)
    for i, x in enumerate(UNEVEN):
        with fw.defer(model, enabled=i < 2):
            loss(model, x).backward()
            loss(compiled, x).backward()
        for _ in range(2):
            loss(reference, x).backward()
    assert_same_gradients(gradients(model), gradients(reference), within=1e-11)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_layer_inside_a_plain_model():
    """Torch itself asks for that attribute of the layer's input."""
    model, reference = network(), network()
    model.second.compile(backend="eager", fullgraph=True)
    for _ in range(2):
        model.zero_grad()
        accumulate(model, UNEVEN, fw.defer)
    accumulate(reference, UNEVEN, as_ever)
    assert_same_gradients(gradients(model), gradients(reference), within=1e-11)


def test_step_compiled_as_a_whole():
    model, reference = network(), network()

    def step(x, last):
        with fw.defer(model, enabled=not last):
            return loss(model, x)

    compiled = torch.compile(step, backend="eager", fullgraph=True)
    for i, x in enumerate(THREE):
        compiled(x, i == 2).backward()
        loss(reference, x).backward()
    assert_same_gradients(gradients(model), gradients(reference), within=1e-11)


def test_a_compiled_model_computes_no_kept_weight_that_nobody_uses():
    torch.manual_seed(0)
    model = convert(nn.Sequential(nn.Conv2d(3, 4, 3)), "wa").double()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    accumulate(compiled, THREE, fw.defer)
    keeper = model[0].__dict__["_filterwise"].keeper
    assert keeper is None or keeper.gathering is None


def test_net_is_traced_with_all_its_layers():
    assert sum(isinstance(m, nn.Conv2d | nn.Linear) for m in Net().modules()) == 3
