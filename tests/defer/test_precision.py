"""Half precision, autocast and loss scaling: sums in float32, and the weights that are computed."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import filterwise as fw
from support.deferral import (
    accumulate,
    as_ever,
    assert_same_gradients,
    both,
    convert,
    gradients,
    loss,
    micro_batches,
    network,
)

THREE = [x.float() for x in micro_batches(2, 2, 1)]


def single(method="wa"):
    return network(method).float()


def test_float32():
    both(lambda m, defer: accumulate(m, THREE, defer), single, within=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("to_none", [None, True, False])
def test_half_weights(dtype, to_none):
    parts = [x.to(dtype) for x in THREE]

    def scenario(model, defer):
        if to_none is not None:
            with defer(model):
                loss(model, parts[0]).backward()
            model.zero_grad(set_to_none=to_none)
        accumulate(model, parts, defer)

    both(scenario, lambda: single().to(dtype), within=8 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_weights_gather_in_float32(dtype):
    """64 equal gradients: a sum in the weight's own dtype stops growing or drifts."""
    model = convert(nn.Sequential(nn.Linear(16, 4, bias=False)), "centered")
    model.to(dtype)
    x = torch.randn(1, 16).to(dtype)
    alone = copy.deepcopy(model)
    alone(x).sum().backward()
    count = 64
    for i in range(count):
        with fw.defer(model, enabled=i < count - 1):
            model(x).sum().backward()
    expected = count * alone[0].weight.grad.double()
    error = (model[0].weight.grad.double() - expected).abs().max() / expected.abs().max()
    assert error <= 1.5 * torch.finfo(dtype).eps
    drift = torch.zeros_like(alone[0].weight)
    for _ in range(count):
        drift += alone[0].weight.grad
    assert (drift.double() - expected).abs().max() / expected.abs().max() > 0 or dtype
    assert model[0].weight.grad.dtype == dtype


@pytest.mark.parametrize("around", ["forward", "steps"])
def test_autocast(around):
    """Autocast keeps casts of leaves while it lasts: a new step must not find the old one's."""

    def scenario(model, defer):
        optimizer = torch.optim.SGD(model.parameters(), 0.5)
        with torch.autocast("cpu", torch.bfloat16, enabled=around == "steps"):
            for _ in range(2):
                optimizer.zero_grad()
                for i, x in enumerate(THREE):
                    with defer(model, enabled=i < 2):
                        with torch.autocast("cpu", torch.bfloat16):
                            value = loss(model, x)
                        value.backward()
                optimizer.step()

    both(scenario, single, within=2e-2)


def test_autocast_gathers_in_float32():
    model = convert(nn.Sequential(nn.Linear(16, 4, bias=False)), "centered")
    x = torch.randn(1, 16)
    alone = copy.deepcopy(model)
    count = 64
    for i in range(count):
        with fw.defer(model, enabled=i < count - 1):
            with torch.autocast("cpu", torch.bfloat16):
                value = model(x).sum()
            value.backward()
    with torch.autocast("cpu", torch.bfloat16):
        value = alone(x).sum()
    value.backward()
    expected = count * alone[0].weight.grad
    assert (model[0].weight.grad - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("overflow", [False, True])
def test_loss_scaling(overflow):
    def scenario(model, defer):
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for step in range(3):
            for i, x in enumerate(THREE):
                with defer(model, enabled=i < 2):
                    value = loss(model, x)
                    if overflow and step == 1 and i == 0:
                        value = value * torch.inf
                    scaler.scale(value).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        return scaler.get_scale()

    expected, got = both(scenario, single, within=1e-4)
    assert got == expected == (512.0 if overflow else 1024.0)


def test_scaled_step_with_everything_deferred_is_refused_and_can_be_mended():
    model, reference = single(), single()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for x in THREE:
        with fw.defer(model):
            scaler.scale(loss(model, x)).backward()
    with pytest.raises(fw.DeferralError, match="No parameter has moved"):
        scaler.step(optimizer)
    model.zero_grad()
    accumulate(model, THREE, fw.defer)
    accumulate(reference, THREE, as_ever)
    assert_same_gradients(gradients(model), gradients(reference), within=1e-5)
