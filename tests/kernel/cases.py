"""What the kernels' tests share: every member of the family, layers of many kinds, comparisons."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from filterwise.filters import FilterLayout
from filterwise.kernel import Layer, eager
from filterwise.methods.method import WeightMethod
from filterwise.recipe import Recipe
from support import references
from support.compare import assert_close, assert_same, per_row

METHODS = (
    "ws",
    "ws(eps_inside=true)",
    "ws(ddof=1, affine=true)",
    "ws(centre=false)",
    "ws(centre=false, moment=central, affine=true)",
    "wa",
    "wa(centre=false)",
    "pws",
    "pws(gamma=none)",
    "wn",
    "cwn",
    "centered",
    "sws",
)
"""Each form of f, each moment, with and without gain and offset."""

LAYOUTS = ("contiguous", "channels_last", "transposed", "sliced", "swapped", "scattered")
"""How a weight can lie in memory; the filters of the last in no runs of equal length."""


class Case(NamedTuple):
    """One layer, what comes in from above, and the method that says what is right."""

    method: WeightMethod
    layer: Layer
    gradient: Tensor


def case(
    text: str,
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    *,
    layout: str = "contiguous",
    mean: float = 0.1,
    std: float = 0.5,
    gradient_dtype: torch.dtype | None = None,
) -> Case:
    """Make a layer of random weights; the gradient from above lies contiguously."""
    method = Recipe.parse(text).method
    assert isinstance(method, WeightMethod)
    weight = lay((torch.randn(shape, dtype=torch.float64) * std + mean).to(dtype), layout)
    order = FilterLayout(1, 2) if layout in ("transposed", "scattered") else FilterLayout()
    filters = order.filters(weight.shape)
    gain = torch.rand(filters, 1, 1).to(dtype) + 0.5 if method.has_gain else None
    offset = torch.randn(filters).to(dtype) if method.has_offset else None
    layer = Layer(weight, method.family(order.fan_in(weight.shape)), order, gain, offset)
    return Case(method, layer, torch.randn(shape).to(gradient_dtype or dtype))


def lay(weight: Tensor, layout: str) -> Tensor:
    """Return the same values in another storage order."""
    if layout == "channels_last":
        return weight.contiguous(memory_format=torch.channels_last)
    if layout == "sliced":
        return torch.stack([weight, weight], -1)[..., 0]
    if layout == "swapped":
        return weight.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "scattered":
        return weight.permute(2, 0, 3, 1).contiguous().permute(1, 3, 0, 2)
    return weight


def mixed(dtype: torch.dtype, gradient_dtype: torch.dtype) -> list[Case]:
    """Return a layer of every method and layout, for one call."""
    found = []
    for index, text in enumerate(METHODS):
        layout = LAYOUTS[index % len(LAYOUTS)]
        shape = (4, 3, 5, 3) if index % 2 else (6, 2, 2, 2)
        found.append(case(text, shape, dtype, layout=layout, gradient_dtype=gradient_dtype))
    return found


def run(
    kernel, cases: list[Case], dtype: torch.dtype | None = None, *, in_place: bool = False
) -> tuple[list[Tensor], list]:
    """Run a kernel's module forward and backward on all cases in one call each."""
    layers = [one.layer for one in cases]
    outs = [torch.empty_like(layer.weight, dtype=dtype) for layer in layers]
    saved = kernel.forward(layers, outs)
    gradients = [one.gradient.clone() for one in cases]
    return outs, kernel.backward(layers, saved, gradients, in_place=in_place)


def assert_right(one: Case, out: Tensor, gradients, tolerance: float) -> None:
    """Compare with the published formula, filter by filter, relative to the largest entry."""
    weight, _, layout, gain, offset = one.layer
    matrix, upstream = layout.matrix(weight), layout.matrix(one.gradient)
    wanted = references.effective(one.method, matrix, gain, offset)
    scale = tolerance * per_row(wanted)
    assert_close(layout.matrix(out), wanted, absolute=scale, what=f"{one.method}: effective")
    to_weight, to_gain, to_offset = references.gradient(one.method, matrix, upstream, gain)
    # Weights may cancel out of a gradient: it is as exact as the terms that it is made of.
    size = per_row(upstream) * (per_row(wanted) / per_row(matrix)).clamp_min(1e-30)
    absolute = tolerance * torch.maximum(per_row(to_weight), size)
    assert_close(layout.matrix(gradients[0]), to_weight, absolute=absolute, what="gradient")
    terms = tolerance * (upstream.double().abs() * wanted.abs()).sum(1)
    if gain is not None:
        apart = 2 * terms / gain.double().flatten()
        assert_close(gradients[1].flatten(), to_gain, absolute=apart, what="gain's gradient")
    if offset is not None:
        apart = tolerance * upstream.double().abs().sum(1)
        assert_close(gradients[2].flatten(), to_offset, absolute=apart, what="offset's gradient")


def assert_as_eager(
    kernel, cases: list[Case], dtype: torch.dtype | None = None, **tolerance: float
) -> None:
    """Compare with the eager kernel: values, dtypes, shapes, and what is NaN.

    Args:
        kernel: The module under test.
        cases: All layers of one call.
        dtype: The effective weights'; None is the weights'.
        tolerance: `effective` and `gradient`, relative to a filter's largest entry.
    """
    outs, gradients = run(kernel, cases, dtype)
    wanted, wanted_gradients = run(eager, cases, dtype)
    for one, out, right, found, expected in zip(
        cases, outs, wanted, gradients, wanted_gradients, strict=True
    ):
        layout, name = one.layer.layout, str(one.method)
        right = layout.matrix(right)
        apart = tolerance["effective"] * torch.nan_to_num(per_row(right))
        assert_close(layout.matrix(out), right, absolute=apart, what=f"{name}: effective")
        assert out.stride() == torch.empty_like(one.layer.weight).stride()
        assert [part is None for part in found] == [part is None for part in expected]
        for part, other in zip(found, expected, strict=True):
            if part is None:
                continue
            assert part.dtype == other.dtype
            assert part.shape == other.shape
            apart = tolerance["gradient"] * float(torch.nan_to_num(other.double()).abs().max())
            assert_close(part, other, absolute=apart, what=f"{name}: gradient")


def assert_rules(kernel, methods=METHODS) -> None:
    """Check the rules: a divisor of 0, a constant filter, and a number that is not finite."""
    cases = [case(text, (4, 33)) for text in methods]
    outs, gradients = run(kernel, cases)
    spoilt = []
    for one in cases:
        weight = one.layer.weight.clone()
        weight[1, 7], weight[3] = torch.nan, torch.inf
        spoilt.append(one._replace(layer=one.layer._replace(weight=weight)))
    bad_outs, bad_gradients = run(kernel, spoilt)
    for good, bad in zip(outs, bad_outs, strict=True):
        assert_same(bad[[0, 2]], good[[0, 2]])
        assert bad[[1, 3]].isnan().all()
    for good, bad in zip(gradients, bad_gradients, strict=True):
        assert_same(bad[0][[0, 2]], good[0][[0, 2]])
        assert bad[0][[1, 3]].isnan().all()
    constant = case("pws(gamma=none)", (2, 33))
    constant.layer.weight[1] = 0.3
    (out,), ((to_weight, _, _),) = run(kernel, [constant])
    assert out[1].count_nonzero() == to_weight[1].count_nonzero() == 0
