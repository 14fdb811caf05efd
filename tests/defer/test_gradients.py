"""The same gradients for every option, host and mode; every method on every host: law 30."""

from __future__ import annotations

import pytest
import torch
from timm.layers.conv2d_same import Conv2dSame
from torch import nn

import filterwise as fw
from support.cases import CASES, PLAIN
from support.deferral import (
    accumulate,
    as_ever,
    both,
    convert,
    gradients,
    loss,
    micro_batches,
    network,
)


@pytest.mark.parametrize(
    "case",
    [case for case in CASES if case not in PLAIN and not case.method().uses_input],
    ids=lambda one: one.id,
)
def test_every_option(case):
    def build():
        torch.manual_seed(3)
        layer = nn.Conv2d(4, 6, 3)
        return convert(layer, case.method(layer.weight.shape)).double()

    parts = torch.randn(5, 4, 6, 6, dtype=torch.float64).split(2)
    both(lambda model, defer: accumulate(model, list(parts), defer), build)


def test_foreign_forward_runs_with_the_kept_weight():
    def build():
        torch.manual_seed(3)
        return convert(nn.Sequential(Conv2dSame(3, 6, 3, stride=2)), "wa").double()

    both(lambda model, defer: accumulate(model, micro_batches(2, 2, 1), defer), build)


def test_foreign_forward_that_assigns_to_the_weights_data_does_not_reach_the_kept_weight():
    class Clipped(nn.Conv2d):
        def forward(self, x):
            self.weight.data = self.weight.data.clamp(-0.5, 0.5) * 0.9
            return super().forward(x)

    def build():
        torch.manual_seed(3)
        return convert(nn.Sequential(Clipped(3, 6, 3)), "wa").double()

    def scenario(model, defer):
        accumulate(model, micro_batches(2, 2, 1), defer)
        with torch.no_grad():
            return [model.eval()(micro_batches(2)[0]) for _ in range(2)]

    expected, got = both(scenario, build)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("frozen", ["first", "second.weight", "second.gain", "first last", "gain"])
def test_frozen_weights_gains_and_layers(frozen):
    def build():
        model = network()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not any(word in name for word in frozen.split()))
        return model

    both(lambda model, defer: accumulate(model, micro_batches(2, 2, 1), defer), build)


def test_deferred_micro_batches_do_not_touch_the_raw_weights_graph():
    """Deferral does defer: a hook on a raw weight or gain fires once a step, on the whole sum."""
    model = network()
    fired = []
    for name, parameter in model.named_parameters():
        parameter.register_hook(lambda gradient, name=name: fired.append((name, gradient.clone())))
    accumulate(model, micro_batches(2, 2, 2, 1), fw.defer)
    ordinary = network()
    accumulate(ordinary, micro_batches(2, 2, 2, 1), as_ever)
    expected = gradients(ordinary)
    for layer in ("first", "second", "last"):
        for role in ("weight", "gain"):
            seen = [gradient for name, gradient in fired if name == f"{layer}.{role}"]
            assert len(seen) == 1, f"{layer}.{role}"
            torch.testing.assert_close(seen[0], expected[f"{layer}.{role}"], rtol=1e-11, atol=1e-11)
    assert sum(name == "last.bias" for name, _ in fired) == 4


def test_a_plain_model_and_one_with_nothing_trainable_pass_through():
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.LazyLinear(2)).double()
    plain(micro_batches(1)[0])
    both(lambda model, defer: accumulate(model, micro_batches(2, 1), defer), lambda: plain)
    assert not any("filterwise" in key for key in plain.__dict__)
    frozen = network().requires_grad_(False)
    for enabled in (True, False):
        with fw.defer(frozen, enabled=enabled):
            assert not loss(frozen, micro_batches(1)[0]).requires_grad
    assert all(p.grad is None for p in frozen.parameters())


def test_evaluation_mode_trains_alike():
    def scenario(model, defer):
        model.eval()
        with torch.no_grad():
            model(micro_batches(1)[0])
        accumulate(model, micro_batches(2, 2, 1), defer)

    both(scenario)


def test_strided_and_channels_last_weights():
    def build():
        return network().to(memory_format=torch.channels_last)

    def scenario(model, defer):
        accumulate(model, micro_batches(2, 2, 1), defer)
        return [p.grad.stride() for p in model.parameters()]

    expected, got = both(scenario, build)
    assert got == expected


def test_gradients_are_ready_layer_by_layer():
    """Nothing is held back until the end: a reduction can begin with the last layer."""
    model = network()
    order = []
    for name in ("last", "second", "first"):
        layer = model.get_submodule(name)
        layer.weight.register_post_accumulate_grad_hook(lambda _, name=name: order.append(name))
    model.norm.register_full_backward_hook(lambda *_: order.append("norm"))
    accumulate(model, micro_batches(2, 1), fw.defer)
    assert order == ["norm", "last", "second", "norm", "first"]
