"""Graphs that are kept, walked twice, differentiated again, recomputed or built elsewhere."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad
from torch.utils.checkpoint import checkpoint

import filterwise as fw
from support.deferral import (
    Net,
    accumulate,
    assert_same_gradients,
    both,
    gradients,
    loss,
    micro_batches,
    network,
)

THREE = micro_batches(2, 2, 1)


def penalty(model, x):
    """Return the squared gradient with respect to the input, as a critic's penalty has it."""
    x = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(loss(model, x), x, create_graph=True)
    return slope.square().sum()


@pytest.mark.parametrize("shared", [True, False], ids=["one graph", "two graphs"])
def test_two_losses(shared):
    def scenario(model, defer):
        for i, x in enumerate(THREE):
            with defer(model, enabled=i < 2):
                if shared:
                    out = model(x)
                    out.square().sum().backward(retain_graph=True)
                    out.sin().sum().backward()
                else:
                    loss(model, x).backward()
                    loss(model, x + 1).backward()

    both(scenario)


def test_retained_graph_walked_again_inside_and_outside():
    def scenario(model, defer):
        with defer(model):
            inside = loss(model, THREE[0])
            inside.backward(retain_graph=True)
            inside.backward(retain_graph=True)
        with defer(model, enabled=False):
            outside = loss(model, THREE[1])
            outside.backward(retain_graph=True)
            outside.backward(retain_graph=True)
        outside.backward()
        with defer(model, enabled=False):
            inside.backward()

    both(scenario)


def test_backward_after_the_context_and_in_any_order():
    def scenario(model, defer):
        pending = []
        for x in THREE:
            with defer(model):
                pending.append(loss(model, x))
        with defer(model, enabled=False):
            last = loss(model, THREE[0])
        pending[1].backward()
        pending[0].backward()
        last.backward()
        pending[2].backward()
        with defer(model, enabled=False):
            pass

    both(scenario)


def test_one_backward_for_all_micro_batches():
    def scenario(model, defer):
        total = 0.0
        for i, x in enumerate(THREE):
            with defer(model, enabled=i < 2):
                total = total + loss(model, x)
        total.backward()
        with defer(model, enabled=False):
            pass

    both(scenario)


@pytest.mark.parametrize("between", ["eval", "train", "to", "evaluated", "state", "zero_grad"])
def test_something_else_between_forward_and_backward(between):
    def scenario(model, defer):
        for i, x in enumerate(THREE):
            with defer(model, enabled=i < 2):
                value = loss(model, x)
            if between in ("eval", "evaluated"):
                model.eval()
            if between == "evaluated":
                with torch.no_grad():
                    model(x)
                model.train()
            if between == "train":
                model.train()
            if between == "to":
                model.to(torch.float64).cpu()
            if between == "state":
                model.state_dict()
            if between == "zero_grad" and i < 2:
                model.zero_grad()
            value.backward()
        with defer(model, enabled=False):
            pass

    both(scenario)


def test_backward_of_a_window_that_was_closed_meanwhile():
    def scenario(model, defer):
        with defer(model):
            early = loss(model, THREE[0])
        with defer(model, enabled=False):
            loss(model, THREE[1]).backward()
        early.backward()
        with defer(model, enabled=False):
            pass

    both(scenario)


def test_input_gradient_penalty_inside_and_outside():
    def scenario(model, defer):
        for i, x in enumerate(THREE):
            with defer(model, enabled=i < 2):
                (loss(model, x) + penalty(model, x)).backward()

    both(scenario, within=1e-11)


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph")
def test_second_derivative_of_the_last_micro_batch():
    """The gathered part is a constant there, as what lies in `.grad` is."""

    def scenario(model, defer):
        for x in THREE[:2]:
            with defer(model):
                loss(model, x).backward()
        loss(model, THREE[2]).backward(create_graph=True)
        squared = sum(p.grad.square().sum() for p in model.parameters())
        found = torch.autograd.grad(squared, list(model.parameters()))
        for p in model.parameters():
            p.grad = p.grad.detach()
        return found

    expected, got = both(scenario)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10 * float(other.abs().max()))


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph")
def test_second_derivative_inside_is_refused():
    model = network()
    with fw.defer(model), pytest.raises(fw.DeferralError, match=r"create_graph.*outside defer"):
        loss(model, THREE[0]).backward(create_graph=True)


@pytest.mark.parametrize("create_graph", [False, True])
def test_asking_for_gradients_takes_nothing_from_the_window(create_graph):
    def scenario(model, defer):
        with defer(model):
            loss(model, THREE[0]).backward()
        asked = torch.autograd.grad(
            loss(model, THREE[1]), list(model.parameters()), create_graph=create_graph
        )
        with defer(model):
            loss(model, THREE[0]).backward()
        loss(model, THREE[2]).backward(inputs=[model.last.bias, model.norm.weight])
        accumulate(model, THREE, defer)
        return [one.detach() for one in asked]

    expected, got = both(scenario)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


class Checkpointed(Net):
    """Recomputes its first and second layers; `reentrant` is set by the test."""

    reentrant = False

    def forward(self, x):
        def head(x):
            return torch.tanh(self.norm(self.first(x)))

        def tail(x):
            return torch.tanh(self.second(x))

        x = checkpoint(head, x.requires_grad_(), use_reentrant=self.reentrant)
        x = checkpoint(tail, x, use_reentrant=self.reentrant)
        x = checkpoint(tail, x, use_reentrant=self.reentrant)
        return self.last(x.mean((2, 3)))


@pytest.mark.parametrize("where", ["inside", "bare", "backward outside"])
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not"])
def test_gradient_checkpointing(reentrant, where):
    def build():
        model = network(make=Checkpointed)
        model.reentrant = reentrant
        return model

    def scenario(model, defer):
        for i, x in enumerate(THREE):
            if where == "bare" and i == 2:
                loss(model, x).backward()
                continue
            with defer(model, enabled=i < 2):
                value = loss(model, x)
                if where != "backward outside":
                    value.backward()
            if where == "backward outside":
                value.backward()
        with defer(model, enabled=False):
            pass

    both(scenario, build)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not"])
def test_hooks_fire_once_a_step_under_checkpointing(reentrant):
    model = network(make=Checkpointed)
    model.reentrant = reentrant
    fired = dict.fromkeys(("first", "last"), 0)
    for name in fired:

        def count(parameter, name=name):
            del parameter
            fired[name] += 1

        model.get_submodule(name).weight.register_post_accumulate_grad_hook(count)
    accumulate(model, THREE, fw.defer)
    assert fired == {"first": 1, "last": 1}


def test_retained_checkpointed_graph_walked_again():
    def scenario(model, defer):
        with defer(model):
            loss(model, THREE[0]).backward()
        value = loss(model, THREE[1])
        value.backward(retain_graph=True)
        value.backward()

    both(scenario, lambda: network(make=Checkpointed))


def test_functional_call_takes_the_ordinary_way():
    def scenario(model, defer):
        other = {name: p.detach() * 1.1 for name, p in model.named_parameters()}
        leaves = {name: p.requires_grad_() for name, p in other.items()}
        parameters = {name: nn.Parameter(p.detach()) for name, p in other.items()}
        for i, x in enumerate(THREE):
            with defer(model, enabled=i < 2):
                loss(model, x).backward()
                functional_call(model, leaves, x).sin().sum().backward()
                functional_call(model, parameters, x).sin().sum().backward()
                with torch.no_grad():
                    functional_call(model, parameters, x)
        found = grad(lambda p: functional_call(model, p, THREE[0]).sin().sum())(other)
        return [p.grad for p in (*leaves.values(), *parameters.values())] + list(found.values())

    expected, got = both(scenario)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


def test_functional_call_with_another_gain():
    def scenario(model, defer):
        gain = (model.first.gain.detach() * 2).requires_grad_()
        half = gain * 0.5
        for i, x in enumerate(THREE):
            with defer(model, enabled=i < 2):
                loss(model, x).backward()
                out = functional_call(model, {"first.gain": half}, x)
                out.sin().sum().backward(retain_graph=True)
        return gain.grad

    expected, got = both(scenario)
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)


def test_torch_func_over_a_deferred_model():
    model = network()
    with fw.defer(model):
        loss(model, THREE[0]).backward()
        before = gradients(model)
        parameters = dict(model.named_parameters())
        found = grad(lambda p: functional_call(model, p, THREE[1]).sin().sum())(parameters)
    assert all(torch.isfinite(gradient).all() for gradient in found.values())
    assert_same_gradients(gradients(model), before, within=0.0)


@pytest.mark.parametrize("early_deferred", [True, False])
def test_backward_when_another_window_has_opened_meanwhile(early_deferred):
    """Its effective weights are the same numbers, written again: what was saved stays valid."""

    def scenario(model, defer):
        with defer(model, enabled=early_deferred):
            early = loss(model, THREE[0])
        with defer(model, enabled=False):
            pass
        with defer(model):
            loss(model, THREE[1]).backward()
        with defer(model, enabled=False):
            (early + loss(model, THREE[2])).backward()
        with defer(model, enabled=False):
            pass

    both(scenario)


@pytest.mark.parametrize("kind", ["in place", "fused step"])
def test_backward_of_weights_that_are_gone_is_refused_by_torch(kind):
    model = network()
    with fw.defer(model):
        early = loss(model, THREE[0])
    with torch.no_grad():
        if kind == "in place":
            model.second.weight.add_(0.1)
        else:
            for p in model.parameters():
                p.grad = torch.ones_like(p)
            torch.optim.SGD(model.parameters(), 0.1, fused=True).step()
            model.zero_grad()
    accumulate(model, THREE, fw.defer)
    with pytest.raises(RuntimeError):
        early.backward()


def test_two_losses_under_checkpointing_inside_a_window():
    """The second backward repeats forwards when the first has closed the window."""

    def scenario(model, defer):
        with defer(model):
            loss(model, THREE[0]).backward()
        with defer(model, enabled=False):
            out = model(THREE[1])
            out.square().sum().backward(retain_graph=True)
            out.sin().sum().backward()

    both(scenario, lambda: network(make=Checkpointed))


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not"])
def test_fused_step_then_a_bare_micro_batch_under_checkpointing(reentrant):
    """No counter sees the step, and a reentrant forward runs without gradient at first."""

    def build():
        model = network(make=Checkpointed)
        model.reentrant = reentrant
        return model

    def scenario(model, defer):
        optimizer = torch.optim.AdamW(model.parameters(), 0.05, fused=True)
        accumulate(model, THREE, defer)
        optimizer.step()
        optimizer.zero_grad()
        loss(model, THREE[0]).backward()

    both(scenario, build, within=1e-10)
