"""Nothing stale: what changed is computed anew, or refused where gradients were gathered on it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import filterwise as fw
from filterwise.host import effective_weight
from support.deferral import (
    Net,
    accumulate,
    assert_same_gradients,
    gradients,
    loss,
    micro_batches,
    network,
    states,
)

THREE = micro_batches(2, 2, 1)


def in_place(model):
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5).add_(0.01 * torch.arange(p.numel(), dtype=p.dtype).view(p.shape).sin())


def in_inference_mode(model):
    with torch.inference_mode():
        for p in model.parameters():
            p.mul_(1.5).add_(0.01 * torch.arange(p.numel(), dtype=p.dtype).view(p.shape).sin())


def other_data(model):
    for p in model.parameters():
        p.data = p.data * 1.5 + 0.01


def other_data_at_an_address_that_comes_back(model):
    """Each new tensor lies where the one before the last lay, if nothing holds that."""
    for _ in range(2):
        for p in model.parameters():
            value = p.data * 1.5 + 0.01
            p.data = torch.empty(0, dtype=p.dtype)
            p.data = value


def initialized(model):
    torch.manual_seed(5)
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)


def detached(model):
    for p in model.parameters():
        p.detach().mul_(1.5).add_(0.3)


def loaded(model, **options):
    torch.manual_seed(6)
    state = {name: value + torch.randn_like(value) for name, value in model.state_dict().items()}
    metadata = model.state_dict()._metadata
    model.load_state_dict(_with_metadata(state, metadata), **options)


def _with_metadata(state, metadata):
    from collections import OrderedDict

    found = OrderedDict(state)
    found._metadata = metadata  # pyright: ignore[reportAttributeAccessIssue]
    return found


def loaded_by_assignment(model):
    loaded(model, assign=True)


def cast_there_and_back(model):
    model.float().double()


def swapped(model):
    other = copy.deepcopy(model)
    in_place(other)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.utils.swap_tensors(p, q)


def averaged(model):
    """Swap in the weights of an exponential average, as an evaluation of them does."""
    average = torch.optim.swa_utils.AveragedModel(network(seed=7))
    average.update_parameters(network(seed=8))
    with torch.no_grad():
        for p, q in zip(model.parameters(), average.module.parameters(), strict=True):
            p.copy_(q)


def gain_only(model):
    with torch.no_grad():
        model.second.gain.add_(0.5)


def stepped_by(**options):
    def change(model):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer = torch.optim.AdamW(model.parameters(), 0.1, **options)
        optimizer.step()
        optimizer.zero_grad()

    return change


def _words(name):
    return name.replace("_", " ").split()


CHANGES = {
    "in place": in_place,
    "inference mode": in_inference_mode,
    ".data": other_data,
    ".data at an old address": other_data_at_an_address_that_comes_back,
    "nn.init": initialized,
    "detach": detached,
    "load_state_dict": loaded,
    "assign=True": loaded_by_assignment,
    "float and double": cast_there_and_back,
    "swap_tensors": swapped,
    "EMA": averaged,
    "gain": gain_only,
    "step": stepped_by(),
    "fused step": stepped_by(fused=True),
}
# A step is itself refused, and whoever swaps tensors swaps their gradients with them.
REFUSED = {
    name: change for name, change in CHANGES.items() if not {"step", "swap"} & set(_words(name))
}


def fresh(model):
    """Return an equal model that never kept anything."""
    other = copy.deepcopy(model)
    other.zero_grad()
    return other


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_between_windows_everything_is_computed_anew(change):
    model = network()
    accumulate(model, THREE, fw.defer)
    model.zero_grad()
    change(model)
    reference = fresh(model)
    accumulate(model, THREE, fw.defer)
    for x in THREE:
        loss(reference, x).backward()
    assert_same_gradients(gradients(model), gradients(reference))


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_in_a_window_that_has_gathered_nothing_it_is_computed_anew(change):
    model = network()
    with fw.defer(model):
        loss(model, THREE[0])
        change(model)
        reference = fresh(model)
        loss(model, THREE[0]).backward()
    accumulate(model, THREE, fw.defer)
    for x in (THREE[0], *THREE):
        loss(reference, x).backward()
    assert_same_gradients(gradients(model), gradients(reference))


@pytest.mark.parametrize("use", ["deferred", "enabled=False", "bare", "closing by hand"])
@pytest.mark.parametrize("change", REFUSED.values(), ids=REFUSED)
def test_where_gradients_were_gathered_it_is_refused(change, use):
    model = network()
    for x in THREE[:2]:
        with fw.defer(model):
            loss(model, x).backward()
    change(model)
    after = states(model)
    with pytest.raises(fw.DeferralError) as raised:  # noqa: PT012
        if use == "bare":
            loss(model, THREE[2]).backward()
        else:
            with fw.defer(model, enabled=use == "deferred"):
                if use != "closing by hand":
                    loss(model, THREE[2]).backward()
    name = "second.gain" if change is gain_only else "first.weight"
    layer = name.partition(".")[0]
    assert str(raised.value) == (
        f"{name} changed inside defer(model) (after 2 micro-batches): their gradients belong to a"
        f" weight that is gone. Step the optimizer after the context, or leave {layer} out with"
        " exclude=. Gradients of this window were dropped; the next window starts clean."
    )
    assert_same_gradients(states(model), after, within=0.0)
    assert model.get_submodule(layer).weight.grad is None
    torch.optim.SGD([model.get_submodule(layer).weight], 0.1).step()
    model.zero_grad()
    reference = fresh(model)
    accumulate(model, THREE, fw.defer)
    for x in THREE:
        loss(reference, x).backward()
    assert_same_gradients(gradients(model), gradients(reference))


@pytest.mark.parametrize("inside", [True, False], ids=["defer", "hand over"])
@pytest.mark.parametrize("change", [in_place, gain_only, other_data])
def test_change_between_forward_and_backward_is_refused(change, inside):
    model = network()
    with fw.defer(model, enabled=inside):
        value = loss(model, THREE[0])
    change(model)
    with pytest.raises(RuntimeError, match=r"changed|inplace|in-place"):
        value.backward()
    model.zero_grad()
    reference = fresh(model)
    accumulate(model, THREE, fw.defer)
    for x in THREE:
        loss(reference, x).backward()
    assert_same_gradients(gradients(model), gradients(reference))


def test_change_of_what_no_layer_is_made_from_is_not_a_change():
    model = network()
    with fw.defer(model):
        loss(model, THREE[0]).backward()
        with torch.no_grad():
            model.last.bias.add_(0.1)
            model.norm.weight.add_(0.1)
        loss(model, THREE[1]).backward()
    loss(model, THREE[2]).backward()


def test_fused_step_inside_the_context_between_forward_and_backward_is_seen():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, fused=True)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with fw.defer(model):
        value = loss(model, THREE[0])
        optimizer.step()
        optimizer.zero_grad()
        with pytest.raises(RuntimeError):
            value.backward()
    model.zero_grad()
    reference = fresh(model)
    accumulate(model, THREE, fw.defer)
    for x in THREE:
        loss(reference, x).backward()
    assert_same_gradients(gradients(model), gradients(reference))


def test_step_with_a_closure():
    """A closure that gathers and hands over runs inside the step."""
    results = []
    for defer in (fw.defer, None):
        model = network()
        optimizer = torch.optim.LBFGS(model.parameters(), 0.01, max_iter=3)

        def closure(model=model, defer=defer, optimizer=optimizer):
            optimizer.zero_grad()
            if defer:
                accumulate(model, THREE, defer)
            else:
                for x in THREE:
                    loss(model, x).backward()
            return sum(loss(model, x) for x in THREE)

        optimizer.step(closure)
        results.append(states(model))
    assert_same_gradients(results[0], results[1], within=1e-9)


def test_fused_step_whose_closure_left_gradients_gathered_is_refused():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, fused=True)

    def closure():
        with fw.defer(model):
            value = loss(model, THREE[0])
            value.backward()
        return value

    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        fw.DeferralError, match="every micro-batch since the last step was deferred"
    ):
        optimizer.step(closure)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_change_of_a_layer_that_the_last_micro_batch_does_not_use():
    """It is found when the window closes, at the end of a backward that succeeds."""

    class Skipping(Net):
        skip = False

        def forward(self, x):
            x = torch.tanh(self.norm(self.first(x)))
            x = x if self.skip else torch.tanh(self.second(x))
            return self.last(x.mean((2, 3)))

    model = network(make=Skipping)
    with fw.defer(model):
        loss(model, THREE[0]).backward()
    with torch.no_grad():
        model.second.weight.add_(0.1)
    model.skip = True
    with pytest.raises(fw.DeferralError, match=r"second\.weight changed inside defer"):
        loss(model, THREE[1]).backward()
    assert model.second.weight.grad is None
    model.zero_grad()
    model.skip = False
    reference = fresh(model)
    accumulate(model, THREE, fw.defer)
    for x in THREE:
        loss(reference, x).backward()
    assert_same_gradients(gradients(model), gradients(reference))


def test_effective_weight_after_each_change_in_a_window():
    model = network()
    with fw.defer(model):
        for change in (in_place, initialized, gain_only, averaged):
            loss(model, THREE[0])
            change(model)
            for layer in (model.first, model.second, model.last):
                got = effective_weight(layer).detach()
                expected = effective_weight(copy.deepcopy(layer)).detach()
                assert torch.equal(got, expected)


def test_swapping_tensors_takes_the_gathered_gradient_away():
    model = network()
    with fw.defer(model):
        loss(model, THREE[0]).backward()
    swapped(model)
    reference = fresh(model)
    accumulate(model, THREE, fw.defer)
    for x in THREE:
        loss(reference, x).backward()
    for name in ("first", "second", "last"):
        got, expected = model.get_submodule(name), reference.get_submodule(name)
        torch.testing.assert_close(got.weight.grad, expected.weight.grad, rtol=1e-11, atol=1e-11)
