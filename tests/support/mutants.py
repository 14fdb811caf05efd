"""Faulty kernels: each computes almost what its method says, and one law or more must see it.

Every mutant has the signature of `support.cases.product`. `tests/laws/test_meta.py` runs the laws
on them; a law that rejects none of its mutants is not a law.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from support.cases import product

MUTANTS: dict[str, Callable[..., Tensor]] = {}


def mutant(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Enter a faulty kernel under its name."""
    MUTANTS[function.__name__] = function
    return function


def _plain(
    method: Any,
    weight: Tensor,
    gain: Any,
    offset: Any,
    *,
    dtype: torch.dtype | None = None,
    mean: Callable[[Tensor], Tensor] = lambda w: w.mean(1, keepdim=True),
    second: Callable[[Tensor], Tensor] | None = None,
    eps: Callable[[Any], Any] = lambda place: place,
) -> Tensor:
    """The family formula as one would first write it, with a place for one fault."""
    place = eps(method.family(weight.shape[1]))
    wide = weight.to(dtype or torch.promote_types(weight.dtype, torch.float32))
    centre = mean(wide) if place.centre else 0.0
    kept = wide - centre
    if second is not None:
        moment = second(wide)
    else:
        about = wide - wide.mean(1, keepdim=True) if place.moment == "central" else wide
        moment = about.square().mean(1, keepdim=True)
    if place.ddof:
        moment = moment * (weight.shape[1] / (weight.shape[1] - 1))
    below = {
        "none": lambda: torch.ones_like(moment),
        "root": lambda: (moment + place.eps).sqrt(),
        "outside": lambda: moment.sqrt() + place.eps,
        "max": lambda: moment.clamp_min(place.eps).sqrt(),
    }[place.scale]()
    out = kept / below * place.constant
    if gain is not None:
        out = out * gain.to(out.dtype).view(-1, 1)
    if offset is not None:
        out = out + offset.to(out.dtype).view(-1, 1)
    return out.to(weight.dtype)


@mutant
def centred_once(method, weight, gain=None, offset=None, input_mean=None):
    """Subtracts a rounded mean and trusts it."""
    return _plain(method, weight, gain, offset)


@mutant
def mean_of_the_first_half(method, weight, gain=None, offset=None, input_mean=None):
    """Takes the mean over half of the filter."""
    half = weight.shape[1] // 2
    return _plain(method, weight, gain, offset, mean=lambda w: w[:, :half].mean(1, keepdim=True))


@mutant
def not_centred(method, weight, gain=None, offset=None, input_mean=None):
    """Leaves the mean in."""
    return _plain(method, weight, gain, offset, mean=lambda w: torch.zeros_like(w[:, :1]))


@mutant
def unbiased(method, weight, gain=None, offset=None, input_mean=None):
    """Divides the sum of squares by n - 1 where n is meant."""
    return _plain(
        method, weight, gain, offset, eps=lambda place: replace(place, ddof=1 - place.ddof)
    )


@mutant
def eps_moved(method, weight, gain=None, offset=None, input_mean=None):
    """Puts eps inside the root where it belongs outside, and the other way round."""
    swapped = {"outside": "root", "root": "outside", "max": "root", "none": "none"}
    return _plain(
        method, weight, gain, offset, eps=lambda place: replace(place, scale=swapped[place.scale])
    )


@mutant
def eps_forgotten(method, weight, gain=None, offset=None, input_mean=None):
    """Claims plain scale invariance."""
    return _plain(method, weight, gain, offset, eps=lambda place: replace(place, eps=0.0))


@mutant
def half_statistics(method, weight, gain=None, offset=None, input_mean=None):
    """Sums in the dtype of the weights."""
    return _plain(method, weight, gain, offset, dtype=weight.dtype)


@mutant
def plain_squares(method, weight, gain=None, offset=None, input_mean=None):
    """Takes E[w^2] - E[w]^2 for the variance; it overflows, and cancels."""

    def second(w: Tensor) -> Tensor:
        mean = w.mean(1, keepdim=True) if method.family(w.shape[1]).moment == "central" else 0.0
        return (w.square().mean(1, keepdim=True) - mean * mean).clamp_min(0.0)

    return _plain(method, weight, gain, offset, second=second)


@mutant
def wrong_axis(method, weight, gain=None, offset=None, input_mean=None):
    """Standardizes what one input feeds in place of what feeds one output."""
    return product(method, weight.T.contiguous()).T.contiguous()


@mutant
def gain_dropped(method, weight, gain=None, offset=None, input_mean=None):
    """Forgets the gain."""
    return product(method, weight, None, offset, input_mean)


@mutant
def gain_divided_out(method, weight, gain=None, offset=None, input_mean=None):
    """Computes dL/dgain as <G, E>/gain, which fails at a gain of 0."""

    class Faulty(torch.autograd.Function):
        @staticmethod
        def forward(ctx, w, g):
            out = product(method, w, g, offset, input_mean)
            ctx.save_for_backward(out, g)
            return out

        @staticmethod
        def backward(ctx, upstream):
            out, g = ctx.saved_tensors
            return None, (upstream * out).sum(1) / g

    if gain is None:
        return product(method, weight, gain, offset, input_mean)
    through_weight = product(method, weight, gain.detach(), offset, input_mean)
    through_gain = Faulty.apply(weight.detach(), gain)
    return through_weight + (through_gain - through_gain.detach())


@mutant
def one_scale_for_all(method, weight, gain=None, offset=None, input_mean=None):
    """Divides every filter by a power of two of the largest entry of the layer."""
    peak = weight.detach().abs().max()
    out = product(method, weight, gain, offset, input_mean)
    return out * (peak / peak)


@mutant
def statistics_detached(method, weight, gain=None, offset=None, input_mean=None):
    """Treats mean and divisor as constants in the backward."""
    frozen = product(method, weight.detach(), gain, offset, input_mean)
    place = method.family(weight.shape[1])
    divisor = weight.detach().double().std(1, unbiased=False, keepdim=True) + place.eps
    linear = weight / divisor.to(weight.dtype)
    return frozen + (linear - linear.detach())


@mutant
def first_order_only(method, weight, gain=None, offset=None, input_mean=None):
    """Has no second derivative."""

    class Faulty(torch.autograd.Function):
        @staticmethod
        def forward(ctx, w):
            with torch.enable_grad():
                leaf = w.detach().requires_grad_()
                out = product(method, leaf, gain, offset, input_mean)
            ctx.graph = (leaf, out)
            return out.detach()

        @staticmethod
        def backward(ctx, upstream):
            leaf, out = ctx.graph
            return torch.autograd.grad(out, leaf, upstream.detach(), retain_graph=True)

    return Faulty.apply(weight)


@mutant
def ordered(method, weight, gain=None, offset=None, input_mean=None):
    """Weighs the entries of a filter by their place."""
    place = torch.linspace(0.5, 1.5, weight.shape[1], dtype=torch.float64).to(weight.dtype)
    return product(method, weight * place, gain, offset, input_mean)


@mutant
def batched_statistics(method, weight, gain=None, offset=None, input_mean=None):
    """Adds a trace of the layer's other filters to each."""
    out = product(method, weight, gain, offset, input_mean)
    return out + 1e-3 * out.mean(0, keepdim=True)


@mutant
def rectified(method, weight, gain=None, offset=None, input_mean=None):
    """Treats a filter and its negative differently."""
    out = product(method, weight, gain, offset, input_mean)
    return torch.where(out > 0, out * 1.01, out)


@mutant
def constant_a_little_off(method, weight, gain=None, offset=None, input_mean=None):
    """Has a constant that is 1 % off."""
    return product(method, weight, gain, offset, input_mean) * 1.01


@mutant
def root_at_zero(method, weight, gain=None, offset=None, input_mean=None):
    """Differentiates the square root where it has no derivative."""
    centred = weight - weight.mean(1, keepdim=True)
    centred = centred - centred.mean(1, keepdim=True)
    return centred / (centred.square().mean(1, keepdim=True).sqrt() + 1e-5)


@mutant
def relaxed(method, weight, gain=None, offset=None, input_mean=None):
    """Goes half of the way from the raw weight to the effective one."""
    return (weight + product(method, weight, gain, offset, input_mean)) / 2
