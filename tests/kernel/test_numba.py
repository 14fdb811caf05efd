"""The compiled CPU kernel against the published formulas, and against the eager kernel."""

from __future__ import annotations

import itertools
import threading

import pytest
import torch

pytest.importorskip("numba", reason="numba is not installed: pip install 'filterwise[fast]'")

from filterwise.filters import FilterLayout
from filterwise.kernel import Family, Layer, backward, cpu, forward, serving, standardize
from filterwise.kernel.cpu import pool
from kernel.cases import (
    LAYOUTS,
    METHODS,
    assert_as_eager,
    assert_right,
    assert_rules,
    case,
    mixed,
    run,
)
from support.compare import assert_close, assert_same
from support.tolerances import DTYPES

IDENTITY = Family(centre=False, scale="none")


@pytest.mark.parametrize("text", METHODS)
def test_equals_the_published_formula(text):
    shapes = [(5, 16), (3, 7, 3, 7), (1, 1031)]
    cases = [case(text, shape, mean=0.1 * i) for i, shape in enumerate(shapes)]
    outs, gradients = run(cpu, cases)
    for one, out, found in zip(cases, outs, gradients, strict=True):
        assert_right(one, out, found, 3e-7)


@pytest.mark.parametrize("shape", [(1, 40_000), (8192, 16), (3, 2048, 3, 3)])
def test_equals_the_published_formula_at_any_size(shape):
    one = case("ws(affine=true)", shape)
    (out,), (found,) = run(cpu, [one])
    assert_right(one, out, found, 3e-7)


@pytest.mark.parametrize("weight", DTYPES)
def test_any_size_in_every_dtype(weight):
    """Against the formula in float64, from the weights as they are stored."""
    dtype = DTYPES[weight]
    rounding = {torch.float64: 1e-14, torch.float32: 3e-7}.get(dtype, 2 * torch.finfo(dtype).eps)
    cases = [case("ws", shape, dtype, mean=0.2) for shape in ((1, 40_000), (8192, 16), (1, 16))]
    for one, out, found in zip(cases, *run(cpu, cases), strict=True):
        assert_right(one, out, found, rounding)
    assert_as_eager(cpu, cases, effective=2 * rounding, gradient=20 * rounding)


def test_a_mean_of_ten_million_deviations_costs_nothing():
    cases = [case(text, (4, 576), mean=1e4, std=1e-3) for text in METHODS]
    outs, gradients = run(cpu, cases)
    for one, out, found in zip(cases, outs, gradients, strict=True):
        assert_right(one, out, found, 1e-6)


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_squares_beyond_the_range_of_the_dtype(size):
    one = case("pws(gamma=none)", (4, 200))
    small = one._replace(layer=one.layer._replace(weight=one.layer.weight * size))
    assert_right(small, *(part[0] for part in run(cpu, [small])), 3e-7)


@pytest.mark.parametrize("weight", DTYPES)
def test_equals_eager_in_every_dtype(weight):
    """Weights, kept weights and gradients of all dtypes, every layout, many layers in one call."""
    dtype = DTYPES[weight]
    for kept, gradient in itertools.product(DTYPES.values(), repeat=2):
        cases = [one for one in mixed(dtype, gradient) if cpu.serves(one.layer)]
        assert len(cases) > 10
        wide = {kept, dtype} == {torch.float64}
        rounding = 4 * torch.finfo(kept).eps if kept.itemsize == 2 else 3e-6
        back = 4 * torch.finfo(dtype).eps if dtype.itemsize == 2 else 2e-5
        assert_as_eager(
            cpu,
            cases,
            kept,
            effective=1e-13 if wide else rounding,
            gradient=1e-12 if dtype == torch.float64 else back,
        )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_through_the_public_call(layout):
    """Where filters lie in no runs, the eager kernel serves and nobody notices."""
    one = case("ws(affine=true)", (6, 4, 3, 2), layout=layout)
    assert (serving(one.layer, "numba") == "numba") == (layout != "scattered")
    out = torch.empty_like(one.layer.weight)
    saved = forward([one.layer], [out], "numba")
    (found,) = backward([one.layer], saved, [one.gradient], "numba")
    assert_right(one, out, found, 1e-6)


def test_outs_and_gradients_that_lie_otherwise():
    """They are written through copies; in place means the tensor that came in."""
    one = case("pws", (6, 4, 3, 2), layout="channels_last")
    out = torch.full((6, 4, 3, 4), torch.nan)[..., ::2]
    saved = forward([one.layer], [out])
    gradient = one.gradient.clone()
    ((to_weight, *rest),) = backward([one.layer], saved, [gradient], in_place=True)
    assert to_weight is gradient
    assert_right(one, out, (to_weight, *rest), 3e-7)


def test_rules():
    assert_rules(cpu)


def test_half_precision_is_converted_as_torch_converts_it():
    """Every number of both halves, and float32 numbers at and between them."""
    for dtype in (torch.float16, torch.bfloat16):
        every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
        every = every[every.isfinite()].view(1, -1)
        wide = every.float()
        between = wide[:, :-1] + (wide[:, 1:] - wide[:, :-1]) * torch.rand(wide.shape[1] - 1)
        ties = torch.lerp(wide[:, :-1].double(), wide[:, 1:].double(), 0.5).float()
        limit = torch.finfo(dtype).max
        for weight in (every, wide, between, ties, torch.tensor([[3e38, -3e38, 65519.0, 7e-8]])):
            out = torch.empty_like(weight, dtype=dtype)
            cpu.forward([Layer(weight, IDENTITY, FilterLayout())], [out])
            assert_same(out, weight.float().clamp(-limit, limit).to(dtype))
        back = torch.empty_like(wide)
        cpu.forward([Layer(every, IDENTITY, FilterLayout())], [back])
        assert_same(back, wide)


def test_one_layer_alone_and_among_others_on_any_number_of_threads(monkeypatch):
    """The same bits: a filter's numbers depend on nothing but the filter."""
    cases = [case("ws(affine=true)", (40, 300)) for _ in range(12)]
    alone = [run(cpu, [one]) for one in cases]
    threads = torch.get_num_threads()
    try:
        for count, openmp in itertools.product((1, 3), (True, False)):
            torch.set_num_threads(count)
            if not openmp:
                monkeypatch.setattr(pool, "_openmp", lambda: None)
            outs, gradients = run(cpu, cases)
            for index, (out, found) in enumerate(alone):
                assert_same(outs[index], out[0])
                for part, other in zip(gradients[index], found[0], strict=True):
                    assert part is None or torch.equal(part, other)
            monkeypatch.undo()
    finally:
        torch.set_num_threads(threads)


def test_several_python_threads_at_once():
    cases = [case("pws", (64, 600)) for _ in range(4)]
    right = run(cpu, cases)[0]
    found = {}

    def work(number):
        for _ in range(20):
            found[number] = run(cpu, cases)[0]

    workers = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for outs in found.values():
        for out, other in zip(outs, right, strict=True):
            assert_same(out, other)


def test_what_is_written_by_address_moves_versions():
    one = case("ws", (5, 30))
    out, gradient = torch.empty(5, 30), one.gradient.clone()
    before = out._version
    saved = forward([one.layer], [out], "numba")
    assert out._version > before
    before = gradient._version
    backward([one.layer], saved, [gradient], "numba")
    assert gradient._version == before
    assert_same(gradient, one.gradient)
    ((to_weight, _, _),) = backward([one.layer], saved, [gradient], "numba", in_place=True)
    assert to_weight is gradient
    assert gradient._version > before
    with torch.inference_mode():
        forward([one.layer], [torch.empty(5, 30)], "numba")


def test_autograd_through_one_layer():
    """First derivatives by the kernel, second ones and functional transforms by operations."""
    weight, family, layout, gain, offset = case(
        "ws(affine=true)", (3, 4, 2, 2), DTYPES["f64"]
    ).layer
    inputs = [value.requires_grad_() for value in (weight, gain, offset)]

    def effective(w, g, b):
        return standardize(w, family, layout, g, b, kernel="numba")

    assert torch.autograd.gradcheck(effective, inputs)
    assert torch.autograd.gradgradcheck(effective, inputs)
    slope = torch.autograd.grad(effective(*inputs).square().sum(), weight)[0]
    other = torch.func.grad(lambda w: effective(w, gain, offset).square().sum())(weight)
    assert_close(other, slope, absolute=1e-12)
    batched = torch.autograd.grad(
        effective(*inputs), weight, torch.stack([weight.detach()] * 2), is_grads_batched=True
    )[0]
    single = torch.autograd.grad(effective(*inputs), weight, weight.detach())[0]
    assert_close(batched[1], single, absolute=1e-12)


def test_whoever_follows_operations_sees_them():
    """Under a dispatch mode and for meta tensors nothing is written behind anyone's back."""
    layer = case("ws", (5, 30)).layer
    fake = torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True)
    with fake:
        assert standardize(*layer, kernel="numba").shape == (5, 30)
    traced = torch.fx.experimental.proxy_tensor.make_fx(
        lambda w: standardize(w, layer.family, layer.layout, kernel="numba")
    )(layer.weight)
    other = torch.randn(5, 30)
    assert_close(traced(other), standardize(other, *layer[1:]), absolute=1e-6)
    assert standardize(layer.weight.to("meta"), *layer[1:], kernel="numba").is_meta
