"""The family kernel: effective weights and their gradients, forward and backward."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from filterwise.kernel import eager
from filterwise.kernel.choice import check_kernel, resolve
from filterwise.kernel.family import Family, Gradients, Kernel, Layer, Saved
from filterwise.kernel.function import standardize

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

__all__ = [
    "Family",
    "Gradients",
    "Kernel",
    "Layer",
    "Saved",
    "backward",
    "check_kernel",
    "forward",
    "resolve",
    "standardize",
]


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
    check_kernel(kernel)
    with torch.no_grad():
        return eager.forward(layers, outs)


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
        kernel: The kernel that `forward` was called with.
        in_place: Write a weight's gradient into the tensor that came in, where that has the
            weight's dtype. For tensors that the caller owns.

    Returns:
        For each layer the gradients of its weight, gain and offset, in their dtypes and shapes;
        None for a gain or offset that it does not have.

    Raises:
        ValueError: If the kernel cannot serve (`standardize`).
    """
    check_kernel(kernel)
    with torch.no_grad():
        return eager.backward(layers, saved, gradients, in_place=in_place)
