"""One raw weight, several ways to it: shared and tied layers, penalties, models and contexts."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import filterwise as fw
from support.deferral import Net, accumulate, both, convert, loss, micro_batches, network

THREE = micro_batches(2, 2, 1)


class Twice(Net):
    """Uses its second layer twice in one forward."""

    def forward(self, x):
        x = torch.tanh(self.norm(self.first(x)))
        x = torch.tanh(self.second(x))
        return self.last(torch.tanh(self.second(x)).mean((2, 3)))


class Tied(nn.Module):
    """Two layers on one raw weight, with a gain each; `plain` is a third that is not converted."""

    def __init__(self, plain=False):
        super().__init__()
        self.one = nn.Conv2d(3, 3, 3, padding=1)
        self.other = nn.Conv2d(3, 3, 3, padding=1)
        self.other.weight = self.one.weight
        self.third = nn.Conv2d(3, 3, 3, padding=1) if plain else None
        if self.third is not None:
            self.third.weight = self.one.weight
        self.skip = set()

    def forward(self, x):
        for name in ("one", "other", "third"):
            layer = getattr(self, name)
            if layer is not None and name not in self.skip:
                x = torch.tanh(layer(x))
        return x.flatten(1)


def tied(plain=False):
    torch.manual_seed(0)
    return convert(Tied(plain), "wa", ["one", "other"]).double()


def test_layer_used_twice_in_one_forward():
    both(lambda m, defer: accumulate(m, THREE, defer), lambda: network(make=Twice))


@pytest.mark.parametrize("plain", [False, True], ids=["two converted", "and a plain one"])
def test_layers_tied_to_one_raw_weight(plain):
    both(lambda m, defer: accumulate(m, THREE, defer), lambda: tied(plain))


@pytest.mark.parametrize("layers", ["one", "other", "third", "one other", "other third"])
@pytest.mark.parametrize("micro_batch", [0, 1, 2])
def test_tied_layer_that_one_micro_batch_does_not_use(layers, micro_batch):
    def scenario(model, defer):
        for i, x in enumerate(THREE):
            model.skip = set(layers.split()) if i == micro_batch else set()
            with defer(model, enabled=i < 2):
                loss(model, x).backward()

    both(scenario, lambda: tied(plain=True))


@pytest.mark.parametrize("to_none", [True, False])
def test_zero_grad_between_micro_batches_reaches_tied_layers(to_none):
    def scenario(model, defer):
        with defer(model):
            loss(model, THREE[0]).backward()
        model.zero_grad(set_to_none=to_none)
        accumulate(model, THREE, defer)

    both(scenario, lambda: tied(plain=True))


@pytest.mark.parametrize("factor", [0.1, 0.0], ids=["penalty", "penalty without gradient"])
@pytest.mark.parametrize("existing", [False, True])
def test_penalty_on_raw_weights_in_every_loss(factor, existing):
    def scenario(model, defer):
        if existing:
            loss(model, THREE[1]).backward()
        for i, x in enumerate(THREE):
            with defer(model, enabled=i < 2):
                penalty = sum(p.square().sum() for p in model.parameters())
                (loss(model, x) + factor * penalty).backward()

    both(scenario)


@pytest.mark.parametrize("to_none", [True, False])
def test_penalty_then_zero_grad(to_none):
    def scenario(model, defer):
        with defer(model):
            (loss(model, THREE[0]) + model.first.weight.square().sum()).backward()
            model.second.weight.square().sum().backward()
        model.zero_grad(set_to_none=to_none)
        with defer(model):
            model.second.weight.square().sum().backward()
            loss(model, THREE[0]).backward()
        model.zero_grad(set_to_none=to_none)
        accumulate(model, THREE, defer)

    both(scenario)


def test_gradient_of_a_raw_weight_asked_for_between_micro_batches():
    """`autograd.grad` runs hooks on the weight and adds nothing to its gradient."""

    def scenario(model, defer):
        with defer(model):
            loss(model, THREE[0]).backward()
        weight = model.first.weight
        (asked,) = torch.autograd.grad(weight.square().sum(), weight)
        accumulate(model, THREE, defer)
        return asked

    expected, got = both(scenario)
    torch.testing.assert_close(got, expected)


def test_gradient_that_was_there_before_the_window():
    def scenario(model, defer):
        loss(model, THREE[1]).backward()
        before = {name: p.grad for name, p in model.named_parameters()}
        accumulate(model, THREE, defer)
        return [p.grad is before[name] for name, p in model.named_parameters()]

    expected, got = both(scenario)
    assert got == expected


def test_several_models_in_one_loss_and_out_of_step():
    def build():
        return nn.ModuleDict({"a": network(seed=1), "b": network("ws", seed=2)}).double()

    def scenario(models, defer):
        a, b = models["a"], models["b"]
        with defer(a), defer(b):
            (loss(a, THREE[0]) * loss(b, THREE[1])).backward()
        with defer(a):
            loss(a, THREE[1]).backward()
        with defer(b, enabled=False):
            (loss(b, THREE[2]) * loss(a, THREE[0])).backward()
        with defer(a, enabled=False):
            loss(a, THREE[2]).backward()

    both(scenario, build)


def test_one_models_step_does_not_end_another_models_window():
    """A generator and its critic, accumulating over different numbers of micro-batches."""

    def build():
        return nn.ModuleDict({"a": network(seed=1), "b": network(seed=2)}).double()

    def scenario(models, defer):
        a, b = models["a"], models["b"]
        stepper = torch.optim.SGD(b.parameters(), 0.1, fused=True)
        for x in THREE:
            with defer(a):
                loss(a, x).backward()
            accumulate(b, THREE[:2], defer)
            stepper.step()
            stepper.zero_grad()
        with defer(a, enabled=False):
            loss(a, THREE[0]).backward()

    both(scenario, build)


def test_critic_frozen_between_its_micro_batches():
    def scenario(critic, defer):
        x = THREE[1].clone().requires_grad_()
        with defer(critic):
            loss(critic, THREE[0]).backward()
        critic.requires_grad_(False)
        loss(critic, x).backward()
        with defer(critic):
            loss(critic, x).backward()
        critic.requires_grad_(True)
        with defer(critic):
            loss(critic, THREE[1]).backward()
        accumulate(critic, THREE, defer)
        return x.grad

    expected, got = both(scenario)
    torch.testing.assert_close(got, expected)


def test_closing_while_frozen():
    def scenario(model, defer):
        with defer(model):
            loss(model, THREE[0]).backward()
        model.requires_grad_(False)
        with defer(model, enabled=False):
            pass

    both(scenario)


def test_raw_weight_that_two_models_share():
    def build():
        models = nn.ModuleDict({"a": network(seed=1), "b": network(seed=2)}).double()
        torch.manual_seed(0)
        a, b = Net().double(), Net().double()
        b.second.weight = a.second.weight
        return nn.ModuleDict({"a": convert(a, "wa"), "b": convert(b, "cwn"), **models})

    def scenario(models, defer):
        a, b = models["a"], models["b"]
        with defer(a):
            loss(a, THREE[0]).backward()
        with defer(b):
            loss(b, THREE[0]).backward()
        with defer(a):
            loss(a, THREE[1]).backward()
        with defer(a, enabled=False):
            loss(a, THREE[2]).backward()
        with defer(b):
            loss(b, THREE[1]).backward()
        with defer(b, enabled=False):
            loss(b, THREE[2]).backward()

    both(scenario, build)


def test_a_submodule_deferred():
    def build():
        torch.manual_seed(0)
        return nn.Sequential(convert(Tied(), "wa"), nn.Linear(75, 2)).double()

    def scenario(model, defer):
        for i, x in enumerate(THREE):
            with defer(model[0], enabled=i < 2):
                loss(model, x).backward()

    both(scenario, build)


@pytest.mark.parametrize("closer", ["model", "part", "bare", "empty model", "empty part"])
def test_a_part_and_the_whole_take_turns(closer):
    def scenario(model, defer):
        with defer(model.second):
            loss(model, THREE[0]).backward()
        with defer(model):
            loss(model, THREE[1]).backward()
            with defer(model.second, enabled=False):
                loss(model, THREE[2]).backward()
            loss(model, THREE[0]).backward()
        with defer(model.first):
            loss(model, THREE[0]).backward()
        if closer == "bare":
            return loss(model, THREE[2]).backward()
        with defer(model.second if "part" in closer else model, enabled=False):
            if "empty" not in closer:
                loss(model, THREE[2]).backward()
        with defer(model, enabled=False):
            pass
        return None

    both(scenario)


def test_contexts_nest_and_put_back_what_they_found():
    def scenario(model, defer):
        with defer(model):
            with defer(model, enabled=False):
                loss(model, THREE[0]).backward()
            loss(model, THREE[1]).backward()
            with defer(model):
                loss(model, THREE[2]).backward()
            loss(model, THREE[0]).backward()
        loss(model, THREE[1]).backward()

    both(scenario)


def test_inner_context_counts():
    model = network()
    fired = []
    model.first.weight.register_hook(fired.append)
    with fw.defer(model):
        with fw.defer(model, enabled=False):
            loss(model, THREE[0]).backward()
        assert len(fired) == 1
        loss(model, THREE[1]).backward()
        assert len(fired) == 1
    loss(model, THREE[1]).backward()
    assert len(fired) == 2


def test_one_context_object_can_be_entered_again():
    model, reference = network(), network()
    context = fw.defer(model)
    for x in THREE[:2]:
        with context:
            loss(model, x).backward()
    loss(model, THREE[2]).backward()
    for x in THREE:
        loss(reference, x).backward()
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-11, atol=1e-11)


def test_layer_converted_after_the_first_window_joins_the_next():
    torch.manual_seed(0)
    model = nn.Sequential(convert(nn.Conv2d(3, 4, 3), "wa")).double()
    accumulate(model, THREE, fw.defer)
    model.append(convert(nn.Conv2d(4, 4, 3), "wa").double())
    model.zero_grad()
    fired = []
    model[1].weight.register_hook(fired.append)
    accumulate(model, THREE, fw.defer)
    assert len(fired) == 1


def test_fold_and_unconvert_in_the_middle():
    def scenario(model, defer):
        with defer(model):
            loss(model, THREE[0]).backward()
        plain = fw.fold(model)
        assert not any("filterwise" in key for m in plain.modules() for key in m.__dict__)
        accumulate(model, THREE, defer)

    both(scenario)

    def undone(model, defer):
        with defer(model):
            loss(model, THREE[0]).backward()
        fw.unconvert_(model)
        loss(model, THREE[1]).backward()
        assert not any("filterwise" in key for m in model.modules() for key in m.__dict__)

    both(undone, lambda: network("ws"))


@pytest.mark.parametrize("closer", ["model", "empty"])
@pytest.mark.parametrize("thawed", [True, False])
def test_gain_frozen_or_thawed_between_micro_batches(thawed, closer):
    def scenario(model, defer):
        model.second.gain.requires_grad_(not thawed)
        with defer(model):
            loss(model, THREE[0]).backward()
        model.second.gain.requires_grad_(thawed)
        with defer(model):
            loss(model, THREE[1]).backward()
        with defer(model, enabled=False):
            if closer == "model":
                loss(model, THREE[2]).backward()

    both(scenario)


@pytest.mark.parametrize("last", ["bare", "later"])
@pytest.mark.parametrize("to_none", [True, False])
def test_zero_grad_is_seen_by_a_tied_layer_that_what_follows_does_not_use(to_none, last):
    """The gradient that comes next must not hide it."""

    def scenario(model, defer):
        with defer(model):
            pending = loss(model, THREE[1])
            loss(model, THREE[0]).backward()
        model.zero_grad(set_to_none=to_none)
        if last == "later":
            pending.backward()
            with defer(model, enabled=False):
                pass
        else:
            model.skip = {"other"}
            loss(model, THREE[2]).backward()

    both(scenario, lambda: tied(plain=True))


def test_zero_grad_leaves_zeros_of_gains_too():
    """A step with gradients of zero decays weights; one without gradients does not."""

    def scenario(model, defer):
        optimizer = torch.optim.AdamW(model.parameters(), 0.1)
        with defer(model):
            loss(model, THREE[0]).backward()
        model.zero_grad(set_to_none=False)
        optimizer.step()

    both(scenario)


def test_gain_frozen_between_micro_batches_of_tied_layers():
    """What one layer hands over then reaches the raw weight on its own, as a backward's root."""

    def scenario(model, defer):
        with defer(model):
            loss(model, THREE[0]).backward()
        model.one.gain.requires_grad_(False)
        accumulate(model, THREE, defer)

    both(scenario, tied)


def test_weight_frozen_between_forward_and_backward():
    def scenario(model, defer):
        with defer(model):
            value = loss(model, THREE[0])
        model.second.weight.requires_grad_(False)
        value.backward()
        with defer(model, enabled=False):
            pass

    both(scenario)
