"""When a window opens and closes, what hands over, and what stays when something goes wrong."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import filterwise as fw
from support.deferral import (
    Net,
    accumulate,
    as_ever,
    both,
    convert,
    gradients,
    loss,
    micro_batches,
    network,
    raw_weights,
    states,
)

THREE = micro_batches(2, 2, 1)


class Skipping(Net):
    """Leaves its second layer out when told to."""

    skip = False

    def forward(self, x):
        x = torch.tanh(self.norm(self.first(x)))
        x = x if self.skip else torch.tanh(self.second(x))
        return self.last(x.mean((2, 3)))


@pytest.mark.parametrize("last", ["outside", "enabled=False", "closed by hand"])
@pytest.mark.parametrize("skipped", [(0,), (2,), (0, 1), (0, 1, 2)], ids=str)
def test_layer_that_a_micro_batch_does_not_use(last, skipped):
    def scenario(model, defer):
        fired = []
        model.second.weight.register_post_accumulate_grad_hook(lambda p: fired.append(p.grad))
        for i, x in enumerate(THREE):
            model.skip = i in skipped
            bare = i == 2 and last == "outside"
            enabled = i < 2 or last == "closed by hand"
            with as_ever(model) if bare else defer(model, enabled=enabled):
                loss(model, x).backward()
        if last == "closed by hand":
            with defer(model, enabled=False):
                pass
        return len(fired)

    ordinary, deferred = both(scenario, lambda: network(make=Skipping))
    assert deferred == min(ordinary, 1)


@pytest.mark.parametrize("kind", ["SGD", "SGD fused", "AdamW fused", "AdamW", "foreach"])
@pytest.mark.parametrize("to_none", [True, False])
def test_steps_of_every_optimizer(kind, to_none):
    """Fused ones move no version counter: the next window must see the step all the same."""

    def scenario(model, defer):
        cls = torch.optim.AdamW if "AdamW" in kind else torch.optim.SGD
        options = {"fused": True} if "fused" in kind else {"foreach": "foreach" in kind}
        optimizer = cls(model.parameters(), 0.01, **options)
        for _ in range(3):
            accumulate(model, THREE, defer)
            optimizer.step()
            optimizer.zero_grad(set_to_none=to_none)

    both(scenario, within=1e-10)


def test_steps_by_hand_through_data_between_windows():
    """No counter sees such a step; a new window computes everything anew."""

    def scenario(model, defer):
        for _ in range(3):
            accumulate(model, THREE, defer)
            for p in model.parameters():
                p.data.add_(p.grad, alpha=-0.01)
            model.zero_grad()
        with defer(model, enabled=False):
            loss(model, THREE[0]).backward()

    both(scenario)


def test_optimizer_fused_into_the_backward():
    def scenario(model, defer):
        optimizers = {p: torch.optim.SGD([p], 0.01) for p in model.parameters()}

        def step(parameter):
            optimizers[parameter].step()
            optimizers[parameter].zero_grad()

        # Only what deferral hands over once may step in the backward; the rest steps at the end.
        for layer in (model.first, model.second, model.last):
            layer.weight.register_post_accumulate_grad_hook(step if defer is fw.defer else _nothing)
        accumulate(model, THREE, defer)
        for p in model.parameters():
            optimizers[p].step()
            optimizers[p].zero_grad()

    both(scenario)


def _nothing(_):
    return None


def test_clipping_sees_the_whole_gradient():
    def scenario(model, defer):
        accumulate(model, THREE, defer)
        return nn.utils.clip_grad_norm_(model.parameters(), 0.1)

    expected, got = both(scenario)
    torch.testing.assert_close(got, expected)


def every_micro_batch_deferred(model):
    for x in THREE:
        with fw.defer(model):
            loss(model, x).backward()


@pytest.mark.parametrize("inside", [True, False])
def test_step_is_refused_when_every_micro_batch_was_deferred(inside):
    model = network()
    before = states(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    every_micro_batch_deferred(model)
    with pytest.raises(fw.DeferralError) as raised, fw.defer(model, enabled=inside):
        optimizer.step()
    text = str(raised.value)
    assert text == (
        "an optimizer step while first holds the gathered gradient of 3 micro-batches: every"
        " micro-batch since the last step was deferred. Run the last one outside defer(model), or"
        " close the window with `with defer(model, enabled=False): pass` before clipping (under"
        " DDP only the former is reduced over processes). No parameter has moved."
    )
    for name, value in states(model).items():
        assert torch.equal(value, before[name])
    with fw.defer(model, enabled=False):
        pass
    reference = network()
    for x in THREE:
        loss(reference, x).backward()
    optimizer.step()
    torch.optim.SGD(reference.parameters(), 0.1).step()
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("by_name", [False, True], ids=["positional", "closure="])
def test_last_micro_batch_in_the_closure_of_a_step(by_name):
    """Trainers run the last forward and backward inside `optimizer.step`."""

    def scenario(model, defer):
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        for _ in range(2):
            for x in THREE[:-1]:
                with defer(model):
                    loss(model, x).backward()

            def closure():
                value = loss(model, THREE[-1])
                value.backward()
                return value

            value = optimizer.step(closure=closure) if by_name else optimizer.step(closure)
            assert isinstance(value, torch.Tensor)
            optimizer.zero_grad()

    both(scenario, network)


def test_step_is_refused_when_its_closure_was_deferred_too():
    model = network()
    before = states(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def closure():
        with fw.defer(model):
            loss(model, THREE[0]).backward()

    closure()
    with pytest.raises(fw.DeferralError, match="gathered gradient of 2 micro-batches"):
        optimizer.step(closure)
    for name, value in states(model).items():
        assert torch.equal(value, before[name])


def test_step_of_other_parameters_is_not_refused():
    model = network()
    every_micro_batch_deferred(model)
    torch.optim.SGD([model.norm.weight, model.last.bias], 0.1).step()
    torch.optim.SGD(network().parameters(), 0.1).step()
    with pytest.raises(fw.DeferralError):
        torch.optim.SGD([model.second.gain], 0.1).step()


@pytest.mark.parametrize("where", ["forward", "backward", "deferred backward", "last forward"])
@pytest.mark.parametrize("again", ["repeat", "to none", "to zero"])
def test_exception_in_the_middle(where, again):
    class Broken(RuntimeError):
        pass

    def fail(*_):
        raise Broken

    def scenario(model, defer):
        def one(i, broken):
            with defer(model, enabled=i < 2):
                if broken and "forward" in where:
                    handle = model.second.register_forward_hook(fail)
                    try:
                        loss(model, THREE[i]).backward()
                    finally:
                        handle.remove()
                value = loss(model, THREE[i])
                if broken:
                    # Fails before any parameter has got its part.
                    value = value * torch.ones((), dtype=value.dtype, requires_grad=True)
                    value.register_hook(fail)
                value.backward()

        for i in range(3):
            if i == (2 if where in ("backward", "last forward") else 1):
                with pytest.raises(Broken):
                    one(i, broken=True)
                if again != "repeat":
                    model.zero_grad(set_to_none=again == "to none")
            one(i, broken=False)

    both(scenario)


def test_backward_that_breaks_half_way_keeps_what_was_there():
    """What was gathered before stays, and can still be handed over; of the broken one all or none.

    Layers of a group go back together, so one that the break came before may have none of it.
    """

    class Broken(RuntimeError):
        pass

    def fail(*_):
        raise Broken

    def scenario(model, defer, broken):
        with defer(model):
            loss(model, THREE[0]).backward()
        if broken:
            handle = model.norm.register_full_backward_hook(fail)
            with defer(model, enabled=False), pytest.raises(Broken):
                loss(model, THREE[1]).backward()
            handle.remove()
        loss(model, THREE[2]).backward()
        return {name: weight.grad for name, weight in raw_weights(model)}

    without, partly = (scenario(network(), as_ever, broken) for broken in (False, True))
    deferred = scenario(network(), fw.defer, True)
    assert not torch.allclose(without["second"], partly["second"])
    for name, gradient in deferred.items():
        close = [torch.allclose(gradient, one[name], rtol=1e-12) for one in (without, partly)]
        assert any(close), name


@pytest.mark.parametrize("to_none", [True, False])
@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("when", ["between", "forward first"])
def test_zero_grad_in_the_middle_starts_anew(to_none, existing, when):
    def scenario(model, defer):
        if existing:
            loss(model, THREE[1]).backward()
        with defer(model):
            loss(model, THREE[0]).backward()
        with defer(model):
            if when == "forward first":
                value = loss(model, THREE[1])
            model.zero_grad(set_to_none=to_none)
            if when == "between":
                value = loss(model, THREE[1])
            value.backward()
        loss(model, THREE[2]).backward()

    both(scenario)


@pytest.mark.parametrize("to_none", [True, False])
def test_zero_grad_in_the_middle_and_a_step_without_backward(to_none):
    def scenario(model, defer):
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=0.1)
        accumulate(model, THREE, defer)
        optimizer.step()
        optimizer.zero_grad(set_to_none=to_none)
        with defer(model):
            loss(model, THREE[0]).backward()
        optimizer.zero_grad(set_to_none=to_none)
        optimizer.step()
        with defer(model):
            loss(model, THREE[0])
        optimizer.step()
        accumulate(model, THREE, defer)

    both(scenario)


def test_zero_grad_of_some_parameters_only():
    def scenario(model, defer):
        with defer(model):
            loss(model, THREE[0]).backward()
        model.second.zero_grad()
        model.first.weight.grad.zero_()
        model.last.weight.grad = torch.zeros_like(model.last.weight)
        accumulate(model, THREE, defer)

    # A gain's part cannot be told from its weight's, so methods without one are compared.
    both(scenario, lambda: network("ws"))


def test_gradient_rescaled_by_hand_between_micro_batches_is_refused():
    model = network()
    with fw.defer(model):
        loss(model, THREE[0]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        with pytest.raises(fw.DeferralError, match=r"first\.weight\.grad was changed .* defer"):
            loss(model, THREE[1])
    model.zero_grad()
    accumulate(model, THREE, fw.defer)
    reference = network()
    accumulate(reference, THREE, fw.defer)
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_window_without_a_backward_changes_nothing():
    def scenario(model, defer):
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        for _ in range(2):
            with defer(model):
                loss(model, THREE[0])
            with defer(model, enabled=False):
                pass
            optimizer.step()
        accumulate(model, THREE, defer)
        optimizer.step()

    both(scenario)


def test_closing_by_hand_fires_hooks_once_and_costs_nothing_when_there_is_nothing():
    model = network()
    fired = []
    model.first.weight.register_post_accumulate_grad_hook(lambda _: fired.append(1))
    with fw.defer(model, enabled=False):
        pass
    assert fired == []
    every_micro_batch_deferred(model)
    for _ in range(2):
        with fw.defer(model, enabled=False):
            pass
    assert fired == [1]


def test_evaluation_in_between():
    def scenario(model, defer):
        seen = []
        for i, x in enumerate(THREE):
            with defer(model, enabled=i < 2):
                loss(model, x).backward()
                with torch.no_grad():
                    seen.append(model(x))
            model.eval()
            with torch.inference_mode():
                seen.append(model(x).clone())
            model.train()
        return [one.clone() for one in seen]

    expected, got = both(scenario)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_equinorm_is_left_out_and_said_once():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).double()
    convert(model[0], "wa")
    convert(model[2], "equinorm")
    both_parts = copy.deepcopy(model)
    x = [part.abs() for part in THREE]
    with pytest.warns(fw.FilterwiseWarning) as told:
        accumulate(model, x, lambda *args, **kwargs: fw.defer(*args, **kwargs))
    texts = [str(one.message) for one in told if "deferral" in str(one.message)]
    assert texts == [
        "1 converted layer takes no part in deferral and computes as ever (first: 2; EquiNorm"
        " depends on the micro-batch)."
    ]
    with pytest.warns(fw.FilterwiseWarning, match="deferral") as told:
        fw.defer(copy.deepcopy(model)).__enter__()
    assert told[0].filename == __file__
    for part in x:
        loss(both_parts, part).backward()
    for name, gradient in gradients(both_parts).items():
        torch.testing.assert_close(gradients(model)[name], gradient, rtol=1e-11, atol=1e-11)
    accumulate(model, x, fw.defer)
