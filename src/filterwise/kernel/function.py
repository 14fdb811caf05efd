"""One layer's effective weight as a node of autograd, whichever kernel computes it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from filterwise.kernel import choice, eager
from filterwise.kernel.family import Layer

if TYPE_CHECKING:
    from torch import Tensor

    from filterwise.filters import FilterLayout
    from filterwise.kernel.family import Family, Kernel

__all__ = ["is_plain", "is_traced", "is_watched", "serving", "standardize"]

PLAIN = (torch.nn.Parameter, torch.Tensor)


def standardize(
    weight: Tensor,
    family: Family,
    layout: FilterLayout,
    gain: Tensor | None = None,
    offset: Tensor | None = None,
    *,
    kernel: Kernel = "auto",
) -> Tensor:
    r"""Compute the effective weight of one layer, differentiably, twice if need be.

    .. math:: \hat W = g\,k\,f(m_2)\,(W - c\,\mu) + b

    Args:
        weight: Raw weight, any shape that `layout` reads, any floating dtype and strides.
        family: The method's place in the family, for this fan-in.
        layout: Where the filters lie.
        gain: g, one number per filter, any shape of that many elements; None is 1.
        offset: b, likewise; None is 0.
        kernel: Which implementation computes it. Under ``torch.func``, ``torch.compile``, tracing
            and for tensors of other classes (``DTensor``) plain operations do, whatever it says.

    Returns:
        Tensor of the weight's shape, dtype, device and, where that is dense, strides.

    Raises:
        ValueError: If there is no kernel of that name, it is not installed, or it does not run on
            the weight's device.
    """
    layer = Layer(weight, family, layout, gain, offset)
    if is_traced():
        return eager.compute(layer, smooth=True)[0]
    return _Standardize.apply(weight, gain, offset, family, layout, serving(layer, kernel))


def is_traced() -> bool:
    """Tell whether a transform, a compiler or a tracer must see every operation.

    They differentiate or record the formula themselves; a Function would hide it from them.
    """
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
    )


def is_watched() -> bool:
    """Tell whether anybody follows the operations, a dispatch mode included."""
    return bool(
        torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
        or torch.compiler.is_compiling()
    )


def is_plain(tensor: Tensor) -> bool:
    """Tell whether a tensor's numbers lie where its address and strides say.

    Not those of a subclass (`DTensor`), a batched tensor of ``is_grads_batched`` or a sparse one.
    """
    return type(tensor) in PLAIN and torch._C._has_storage(tensor) and not tensor.is_neg()


def serving(layer: Layer, kernel: Kernel) -> str:
    """Return the kernel that computes a layer: the one asked for, or eager where it cannot.

    While anybody follows the operations (`is_watched`) it is eager: a write by address is not seen.

    Raises:
        ValueError: If the kernel is not installed, or not for the weight's device.
    """
    weight, _, _, gain, offset = layer
    name = choice.resolve(kernel, weight.device)
    if (
        name == "eager"
        or not is_plain(weight)
        or (gain is not None and not is_plain(gain))
        or (offset is not None and not is_plain(offset))
        or is_watched()
    ):
        return "eager"
    return name if choice.module_of(name).serves(layer) else "eager"


class _Standardize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        gain: Tensor | None,
        offset: Tensor | None,
        family: Family,
        layout: FilterLayout,
        kernel: str,
    ) -> Tensor:
        layer = Layer(weight, family, layout, gain, offset)
        if kernel == "eager":
            out, ctx.kept = eager.compute(layer)
        else:
            out = torch.empty_like(weight)
            (ctx.kept,) = choice.module_of(kernel).forward((layer,), (out,))
        ctx.family, ctx.layout, ctx.kernel = family, layout, kernel
        ctx.save_for_backward(weight, gain, offset)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        weight, gain, offset = ctx.saved_tensors
        layer = Layer(weight, ctx.family, ctx.layout, gain, offset)
        (gradient,) = gradients
        if torch.is_grad_enabled() or is_watched() or not is_plain(gradient):
            # A second derivative passes through the statistics: they must be part of its graph.
            needs = ctx.needs_input_grad[:3]
            return *eager.differentiate(layer, None, gradient, needs), None, None, None
        kernel = choice.module_of(ctx.kernel)
        (done,) = kernel.backward((layer,), (ctx.kept,), (gradient,), in_place=False)
        return *done, None, None, None
