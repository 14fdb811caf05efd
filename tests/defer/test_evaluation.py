"""Kept weights in evaluation: kept while nothing changes, never longer, and never copied."""

from __future__ import annotations

import copy
import pickle
import threading
import warnings

import pytest
import torch
from torch import nn

import filterwise as fw
from filterwise.host import effective_weight, state_of
from support.deferral import (
    accumulate,
    as_ever,
    assert_same_gradients,
    convert,
    gradients,
    micro_batches,
    network,
)
from support.hosts import HOSTS
from support.models import host_cases

X = micro_batches(2)[0]
MODES = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}


def at_rest(layer, mode="no_grad"):
    with MODES[mode]():
        return effective_weight(layer)


def changed_in_place(layer):
    with torch.no_grad():
        layer.weight.add_(0.1 * torch.randn_like(layer.weight))


def changed_by_data(layer):
    layer.weight.data = layer.weight.data * torch.rand_like(layer.weight)


def changed_by_data_twice(layer):
    for _ in range(2):
        value = layer.weight.data * torch.rand_like(layer.weight)
        layer.weight.data = torch.empty(0, dtype=value.dtype)
        layer.weight.data = value


def changed_gain(layer):
    with torch.inference_mode():
        layer.gain.mul_(1.3)


def changed_by_init(layer):
    nn.init.uniform_(layer.weight)


def changed_by_loading(layer):
    other = {name: value + 0.1 * torch.rand_like(value) for name, value in _state(layer).items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fw.CheckpointWarning)
        layer.load_state_dict(other)


def changed_by_assignment(layer):
    other = {name: value + 0.1 * torch.rand_like(value) for name, value in _state(layer).items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fw.CheckpointWarning)
        layer.load_state_dict(other, assign=True)


def _state(layer):
    return {name: value.clone() for name, value in layer.state_dict().items()}


def changed_by_cast(layer):
    layer.half().double()


def changed_by_step(**options):
    def change(layer):
        layer.weight.grad = torch.randn_like(layer.weight)
        torch.optim.SGD([layer.weight], 0.1, **options).step()

    return change


def changed_by_fused_adam(layer):
    layer.weight.grad = torch.randn_like(layer.weight)
    torch.optim.AdamW([layer.weight], 0.1, fused=True).step()


CHANGES = {
    "in place": changed_in_place,
    ".data": changed_by_data,
    ".data at an old address": changed_by_data_twice,
    "gain": changed_gain,
    "init": changed_by_init,
    "load": changed_by_loading,
    "assign": changed_by_assignment,
    "cast": changed_by_cast,
    "step": changed_by_step(),
    "foreach": changed_by_step(foreach=True),
    "fused": changed_by_step(fused=True),
    "fused AdamW": changed_by_fused_adam,
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_law29_kept_until_anything_changes(change, mode):
    model = network().eval()
    layer = model.first
    before = at_rest(layer, mode)
    assert at_rest(layer, mode) is before
    value = before.clone()
    change(layer)
    after = at_rest(layer, mode)
    assert torch.equal(after, at_rest(copy.deepcopy(layer), mode))
    assert not torch.equal(after, value)
    assert torch.equal(before, value), "what was handed out earlier has changed"
    assert at_rest(layer, mode) is after


@pytest.mark.parametrize("mode", MODES)
def test_tensor_kept_in_one_mode_serves_the_other_and_can_be_trained_with(mode):
    model = network().eval()
    with MODES[mode]():
        expected = model(X).clone()
    assert not at_rest(model.first).is_inference()
    torch.testing.assert_close(model(X), expected, rtol=1e-12, atol=1e-12)
    model(X).sum().backward()


KEPT = [*host_cases(("f64",))]
KEPT += [case for case in host_cases(("bf16",)) if case.case.id == "wn"]


@pytest.mark.parametrize("hosted", KEPT, ids=lambda one: one.id)
def test_kept_output_equals_the_computed_one(hosted):
    layer = hosted.layer()
    x = hosted.x()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fw.FilterwiseWarning)
        with torch.no_grad():
            first, second = layer(x), layer(x)
        fw.keep_weights(layer, False)
        with torch.no_grad():
            computed = layer(x)
    assert torch.equal(first, computed)
    assert torch.equal(second, computed)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_one_copy_in_the_weights_dtype_and_only_when_used(dtype):
    model = network().to(dtype).eval()
    layer = model.first
    assert held_bytes(model) == 0
    model(X.to(dtype))
    assert held_bytes(model) == 0
    with torch.no_grad():
        model(X.to(dtype))
    converted = (model.first, model.second, model.last)
    bytes_of_weights = sum(one.weight.nbytes for one in converted)
    assert held_bytes(model) == bytes_of_weights
    assert at_rest(layer).dtype == dtype
    model.train()
    assert held_bytes(model) == 0
    with torch.no_grad():
        model(X.to(dtype))
    assert held_bytes(model) == 0


def held_bytes(model):
    """Return the bytes of all tensors of a weight's size that the layers' states hold."""
    found = {}
    for module in model.modules():
        if "_filterwise" in module.__dict__:
            own = {p.data_ptr() for p in module.parameters()}
            for tensor in _tensors(module.__dict__["_filterwise"], set()):
                if tensor.numel() >= module.weight.numel() and tensor.data_ptr() not in own:
                    found[tensor.data_ptr()] = tensor.nbytes
    return sum(found.values())


def _tensors(value, seen):
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for one in value:
            yield from _tensors(one, seen)
    elif type(value).__module__.startswith("filterwise"):
        names = [name for cls in type(value).__mro__ for name in getattr(cls, "__slots__", ())]
        for one in (*vars(value).values(),) if hasattr(value, "__dict__") else ():
            yield from _tensors(one, seen)
        for name in names:
            yield from _tensors(getattr(value, name, None), seen)


def test_keeping_is_switched_off_and_on():
    model = network().eval()
    first = at_rest(model.first)
    fw.keep_weights(model, False)
    assert held_bytes(model) == 0
    assert at_rest(model.first) is not at_rest(model.first)
    assert torch.equal(at_rest(model.first), first)
    fw.keep_weights(model, True)
    assert at_rest(model.first) is at_rest(model.first)
    fw.keep_weights(nn.Linear(2, 2), False)


def test_law28_copies_pickles_and_states_hold_nothing_kept():
    model = network().eval()
    size = len(pickle.dumps(model))
    with torch.no_grad():
        model(X)
    with fw.defer(model):
        model(X).sum().backward()
    model.zero_grad()
    assert len(pickle.dumps(model)) == size
    other = copy.deepcopy(model)
    assert held_bytes(model) > 0
    assert held_bytes(other) == held_bytes(pickle.loads(pickle.dumps(model))) == 0
    before = model(X).detach()
    with torch.no_grad():
        other(X)
        other.first.weight.mul_(2.0).add_(0.1)
        other(X)
    torch.testing.assert_close(model(X).detach(), before, rtol=0, atol=0)
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}


def test_whoever_writes_into_what_it_was_given_does_not_change_the_next_answer():
    model = network().eval()
    value = at_rest(model.first).clone()
    with torch.no_grad():
        effective_weight(model.first).mul_(2.0)
        assert torch.equal(effective_weight(model.first), value)


def test_threads_that_evaluate_one_model():
    model = network().eval()
    with torch.no_grad():
        expected = model(X)
    wrong, stop = [], threading.Event()

    def evaluate():
        try:
            while not stop.is_set():
                model.eval()
                with torch.no_grad():
                    if not torch.equal(model(X), expected):
                        wrong.append("values")
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=evaluate) for _ in range(3)]
    for thread in threads:
        thread.start()
    stop.wait(0.7)
    stop.set()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_weights_made_in_inference_mode_are_not_kept():
    with torch.inference_mode():
        torch.manual_seed(0)
        model = convert(nn.Sequential(nn.Conv2d(3, 4, 3)), "ws").double().eval()
        first = model(X)
        model[0].weight.mul_(2.0).add_(0.5)
        assert not torch.equal(model(X), first)


def test_equinorm_in_evaluation_follows_its_running_mean():
    torch.manual_seed(0)
    model = convert(nn.Sequential(nn.Conv2d(3, 4, 3)), "equinorm").double()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fw.FilterwiseWarning)
        model(X.abs())
        model.eval()
        before = at_rest(model[0]).clone()
        at_rest(model[0])
        model.train()
        with torch.no_grad():
            model(3 * X.abs() + 1)
        model.eval()
        assert not torch.equal(at_rest(model[0]), before)
        kept = at_rest(model[0])
        assert at_rest(model[0]) is kept
        with torch.no_grad():
            model[0].input_mean.mul_(2.0)
        assert not torch.equal(at_rest(model[0]), kept)


def test_traced_model_follows_its_weights():
    model = network().eval()
    with torch.no_grad():
        model(X)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            traced = torch.jit.trace(model, X, check_trace=False)
        model.first.weight.add_(torch.randn_like(model.first.weight))
        torch.testing.assert_close(traced(X), model(X), rtol=1e-12, atol=1e-12)


def test_weights_that_other_processes_may_write_are_not_kept():
    """Versions are counted per process: what another one writes into shared memory is unseen."""
    model = network().eval()
    with torch.no_grad():
        model(X)
    model.share_memory()
    with torch.no_grad():
        before = model(X)
        # As another process would: no counter of this one moves.
        model.first.weight.data.mul_(2.0).add_(0.3 * torch.randn_like(model.first.weight))
        assert not torch.equal(model(X), before)
    assert held_bytes(model) == 0
    with pytest.warns(fw.FilterwiseWarning, match=r"first: first; its weight is in shared memory"):
        accumulate(model, [X, X], fw.defer)
    reference = network()
    reference.load_state_dict(model.state_dict())
    accumulate(reference, [X, X], as_ever)
    assert_same_gradients(gradients(model), gradients(reference))


def test_hosts_cover_more_than_convolutions():
    assert {"named", "Linear", "ConvTranspose2d[g=2]"} <= {host.id for host in HOSTS}


def test_state_of_a_layer_shows_nothing_kept_in_its_repr():
    model = network().eval()
    before = repr(model)
    with torch.no_grad():
        model(X)
    assert repr(model) == before
    assert "kept" not in repr(model)
    assert state_of(model.first).keeps


def test_under_autocast_it_is_kept_in_the_dtype_of_the_convolution():
    model = network().float().eval()
    x = X.float()
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            first = model(x)
            bytes_of_weights = sum(m.weight.nbytes for m in (model.first, model.second, model.last))
            assert held_bytes(model) == bytes_of_weights // 2
            assert torch.equal(model(x), first)
        assert at_rest(model.first).dtype == torch.float32
        fw.keep_weights(model, False)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(model(x), first)


def test_streams_of_a_gpu_do_not_share_what_is_kept(monkeypatch):
    """One may read what another has not yet written."""
    from filterwise.keeping import keeper

    monkeypatch.setattr(keeper.Keeper, "unmoved", lambda *_: None)  # which is for the CPU alone
    model = network().eval()
    before = at_rest(model.first)
    assert at_rest(model.first) is before
    monkeypatch.setattr(keeper, "_stream", lambda _: 7)
    assert at_rest(model.first) is not before


def test_nothing_is_kept_in_a_cuda_graph(monkeypatch):
    """A replay would read the kept weight's address and never look whether it is stale."""
    model = network().eval()
    before = at_rest(model.first)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    captured = at_rest(model.first)
    assert captured is not before
    assert at_rest(model.first) is not captured
    torch.testing.assert_close(captured, before, rtol=1e-12, atol=1e-12)
