"""What a kernel moves in memory: no copies, one writing in the dtype of use, buffers used again."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile

import filterwise as fw
from filterwise.host import effective_weight
from filterwise.kernel import choice
from support.deferral import accumulate, convert, loss, micro_batches, network

COPIES = {"aten::copy_", "aten::clone", "aten::contiguous", "aten::_to_copy"}
LAYERS = {
    "convolution": nn.Conv2d(8, 6, 3),
    "channels_last": nn.Conv2d(8, 6, 3).to(memory_format=torch.channels_last),
    "grouped": nn.Conv2d(8, 6, 3, groups=2),
    "transposed": nn.ConvTranspose2d(8, 6, 3),
    "transposed, grouped": nn.ConvTranspose2d(8, 6, 3, groups=2),
    "linear": nn.Linear(8, 6),
}

FUNCTIONS = {
    "convolution": functional.conv2d,
    "transposed, grouped": partial(functional.conv_transpose2d, groups=2),
    "linear": functional.linear,
}


@pytest.fixture(autouse=True)
def _needs_numba():
    if choice.resolve("auto", "cpu") != "numba":
        pytest.skip("numba is not installed: pip install 'filterwise[fast]'")


def copies(work):
    """Return how many tensors a piece of work copies, once it is warm."""
    work()
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        work()
    return sum(event.name in COPIES for event in seen.events())


def training(model, x, autocast):
    def work():
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = model(x)
        out.float().square().sum().backward()

    return work


def evaluating(model, x, autocast):
    def work():
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            model(x)

    return work


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_a_converted_layer_copies_nothing(name, autocast):
    """Under autocast less than the plain layer, whose weight is cast there and back."""
    plain = copy.deepcopy(LAYERS[name])
    layer = convert(copy.deepcopy(plain), "ws(affine=true)")
    x = torch.randn(2, 8) if name == "linear" else torch.randn(2, 8, 5, 5)
    if name == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    assert copies(training(layer, x, autocast)) <= copies(training(plain, x, autocast)) - autocast
    layer.eval()
    plain.eval()
    saved = copies(evaluating(plain, x, autocast)) - copies(evaluating(layer, x, autocast))
    assert saved >= autocast


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_under_autocast_gradients_are_those_of_a_cast_weight(name, dtype):
    layer = convert(copy.deepcopy(LAYERS[name]), "wa")
    x = torch.randn(2, 8) if name == "linear" else torch.randn(2, 8, 5, 5)
    found = []
    for direct in (True, False):
        layer.zero_grad()
        with torch.autocast("cpu", dtype):
            if direct:
                out = layer(x)
            else:  # written in float32, and cast by autocast
                weight = effective_weight(layer)
                assert weight.dtype == torch.float32
                out = FUNCTIONS[name](x, weight, layer.bias)
        assert out.dtype == dtype
        out.float().square().sum().backward()
        found.append([p.grad.clone() for p in layer.parameters()])
    for one, other in zip(*found, strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6 * float(other.abs().max()))


def test_buffers_serve_again_in_the_next_window():
    model, parts = network(), micro_batches(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    addresses = []
    for _ in range(3):
        accumulate(model, parts, fw.defer)
        optimizer.step()
        optimizer.zero_grad()
        kept = model.first._filterwise.keeper.gathering
        addresses.append(kept.values.data_ptr())
    assert len(set(addresses)) == 1


def test_gradients_that_others_hold_are_not_written_to():
    """Of the two gradients that meet in a handing over only the library's own is."""
    model, parts = network(), micro_batches(2, 1)
    held = []
    with fw.defer(model):
        loss(model, parts[0]).backward()
    out = model.last(torch.ones(2, 8, dtype=torch.float64))
    upstream = torch.randn_like(out)
    before = upstream.clone()
    out.register_hook(lambda gradient: held.append((gradient, gradient.clone())))
    out.backward(upstream)
    assert torch.equal(upstream, before)
    for gradient, copied in held:
        assert torch.equal(gradient, copied)


WITHOUT_NUMBA = """
import sys
sys.modules["numba"] = None
import torch
import filterwise as fw
from filterwise.kernel import resolve
assert resolve("auto", "cpu") == "eager"
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(8, 8, 3))
fw.convert_(model, "keep+wa", select="*")
x = torch.randn(4, 3, 8, 8)
for i, part in enumerate(x.split(2)):
    with fw.defer(model, enabled=i < 1):
        model(part).square().sum().backward()
print([float(p.grad.double().square().sum()) for p in model.parameters()])
"""


def test_a_machine_without_numba_gets_the_same_numbers():
    found = []
    for script in (WITHOUT_NUMBA, _with_numba(WITHOUT_NUMBA)):
        out = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True
        )
        assert out.returncode == 0, out.stderr
        found.append(torch.tensor(json.loads(out.stdout)))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-7)


def _with_numba(script):
    script = script.replace('sys.modules["numba"] = None\n', "")
    return script.replace('== "eager"', '== "numba"')
