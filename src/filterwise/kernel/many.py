"""Many layers in one call, whichever kernels serve them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from filterwise.kernel import choice
from filterwise.kernel.choice import check_kernel
from filterwise.kernel.family import Saved
from filterwise.kernel.function import is_plain, is_watched, serving

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from filterwise.kernel.family import Gradients, Kernel, Layer

__all__ = ["Call", "backward", "forward"]


def forward(
    layers: Sequence[Layer], outs: Sequence[Tensor], kernel: Kernel = "auto"
) -> list[Saved]:
    """Compute the effective weights of many layers in one call, outside any graph.

    Args:
        layers: What is to be computed; devices and dtypes may differ.
        outs: Where each effective weight is written: a tensor of the weight's shape and device,
            any floating dtype and strides, best the weight's. Its version counter moves.
        kernel: Which implementation computes them.

    Returns:
        For each layer what `backward` needs beside the weight: a few numbers per filter.

    Raises:
        ValueError: If the kernel cannot serve (`standardize`).
    """
    names = [
        serving(layer, kernel) if is_plain(out) else "eager"
        for layer, out in zip(layers, outs, strict=True)
    ]
    saved: dict[int, Saved] = {}
    with torch.no_grad():
        for name, places in _by_kernel(names):
            some = [layers[i] for i in places], [outs[i] for i in places]
            kept = choice.module_of(name).forward(*some)
            for place, numbers in zip(places, kept, strict=True):
                saved[place] = Saved(name, numbers)
    _moved(outs)
    return [saved[place] for place in range(len(layers))]


def backward(
    layers: Sequence[Layer],
    saved: Sequence[Saved],
    gradients: Sequence[Tensor],
    kernel: Kernel = "auto",
    *,
    in_place: bool = False,
) -> list[Gradients]:
    """Take the gradients of many effective weights to weights, gains and offsets, in one call.

    Args:
        layers: As they were given to `forward`, their weights and gains unchanged since.
        saved: What `forward` gave.
        gradients: Gradient of each effective weight, any floating dtype and strides.
        kernel: As it was given to `forward`; which one served a layer stands in `saved`.
        in_place: Write a weight's gradient into the tensor that came in, where that has the
            weight's dtype. For tensors that the caller owns.

    Returns:
        For each layer the gradients of its weight, gain and offset, in their dtypes and shapes;
        None for a gain or offset that it does not have.

    Raises:
        ValueError: If the kernel cannot serve (`standardize`).
    """
    check_kernel(kernel)
    done: dict[int, Gradients] = {}
    watched = is_watched()
    with torch.no_grad():
        names = [
            one.kernel if is_plain(gradient) and not watched else "eager"
            for one, gradient in zip(saved, gradients, strict=True)
        ]
        for name, places in _by_kernel(names):
            found = choice.module_of(name).backward(
                [layers[i] for i in places],
                [saved[i].kept if saved[i].kernel == name else None for i in places],
                [gradients[i] for i in places],
                in_place=in_place,
            )
            for place, one in zip(places, found, strict=True):
                done[place] = one
    if in_place:
        _moved(gradients)
    return [done[place] for place in range(len(layers))]


def _by_kernel(names: Sequence[str]) -> Iterator[tuple[str, Sequence[int]]]:
    """Yield each kernel that serves, and which layers it serves."""
    for name in dict.fromkeys(names):
        yield name, [place for place, one in enumerate(names) if one == name]


def _moved(tensors: Sequence[Tensor]) -> None:
    """Say that tensors were written to: what is written by pointer moves no version counter."""
    torch.autograd.graph.increment_version([one for one in tensors if not one.is_inference()])


class Call:
    """Many layers' work that is written down once and done at every optimizer step.

    The layers' tensors and where the effective weights are written must stay where they are:
    whoever holds the call looks at their addresses before. A kernel that has nothing to gain from
    this, or cannot serve all of the layers alone, is called as ever.
    """

    def __init__(self, layers: Sequence[Layer], outs: Sequence[Tensor], kernel: Kernel) -> None:
        """Get ready; arguments as those of `forward`."""
        self._layers, self._outs = tuple(layers), tuple(outs)
        self._kernel: Kernel = kernel
        names = {serving(layer, kernel) for layer in layers}
        self._name = names.pop() if len(names) == 1 else "eager"
        # What a tracer, a dispatch mode or another device's kernel computes is not ready.
        make: Any = getattr(choice.module_of(self._name), "get_ready", None)
        self._ready = None if make is None else make(self._layers, self._outs)

    def forward(self) -> list[Saved]:
        """Write the effective weights, as `forward` does."""
        if self._ready is None or is_watched():
            return forward(self._layers, self._outs, self._kernel)
        kept = self._ready.forward()
        _moved(self._outs)
        return [Saved(self._name, one) for one in kept]

    def backward(
        self, saved: Sequence[Saved], gradients: Sequence[Tensor], *, in_place: bool
    ) -> list[Gradients]:
        """Return the gradients of all layers, as `backward` does."""
        done = None
        if self._ready is not None and not is_watched():
            done = self._ready.backward([one.kept for one in saved], gradients, in_place=in_place)
        if done is None:
            return backward(self._layers, saved, gradients, self._kernel, in_place=in_place)
        if in_place:
            _moved(gradients)
        return done
