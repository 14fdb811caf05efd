"""Every method as a pure function of a tensor whose first axis is the filters.

Options are those of the method's class, by name; ``gain=None`` is the gain a converted layer starts
with. All functions keep dtype, device and strides, compute statistics in float32 or wider, can be
differentiated twice, and raise ValueError for a fan-in of 1 or an option out of range.

Example:
    >>> import torch
    >>> weight_standardization(torch.tensor([[1.0, 3.0, 5.0, 7.0]]), eps=0.0)
    tensor([[-1.3416, -0.4472,  0.4472,  1.3416]])
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from filterwise.filters import FilterLayout
from filterwise.kernel import check_kernel
from filterwise.methods.centered_weight_normalization import CenteredWeightNormalization
from filterwise.methods.equinorm import EquilibriumNormalization
from filterwise.methods.equivariant_weight_standardization import EquivariantWeightStandardization
from filterwise.methods.parametric_weight_standardization import ParametricWeightStandardization
from filterwise.methods.scaled_weight_standardization import ScaledWeightStandardization
from filterwise.methods.weight_align import WeightAlign
from filterwise.methods.weight_centering import WeightCentering
from filterwise.methods.weight_normalization import WeightNormalization
from filterwise.methods.weight_standardization import WeightStandardization

if TYPE_CHECKING:
    from torch import Tensor

    from filterwise.kernel import Kernel
    from filterwise.methods.method import Method, WeightMethod

__all__ = [
    "centered_weight_normalization",
    "equilibrium_normalization",
    "equivariant_weight_standardization",
    "parametric_weight_standardization",
    "scaled_weight_standardization",
    "weight_align",
    "weight_centering",
    "weight_normalization",
    "weight_standardization",
]

ROWS = FilterLayout()


def _check(method: Method, weight: Tensor) -> None:
    if not isinstance(weight, torch.Tensor):
        raise TypeError(f"weight must be a tensor, got {type(weight).__name__}")
    if weight.dim() < 2 or not weight.is_floating_point():
        raise ValueError(
            f"weight must be a floating tensor (filters, ...) of two or more dimensions,"
            f" got {weight.dtype} of shape {tuple(weight.shape)}"
        )
    reason = method.refuses(tuple(weight.shape), ROWS)
    if reason:
        raise ValueError(f"a weight of shape {tuple(weight.shape)} {reason}")


def _effective(
    method: WeightMethod,
    weight: Tensor,
    gain: Tensor | None,
    kernel: Kernel,
    offset: Tensor | None = None,
) -> Tensor:
    _check(method, weight)
    for name, values in (("gain", gain), ("offset", offset)):
        if values is not None and values.numel() != len(weight):
            raise ValueError(
                f"{name} must hold one number per filter ({len(weight)}), got {values.numel()}"
            )
    if gain is None and method.has_gain:
        gain = method.gain_start(weight.detach().flatten(1))
    return method.effective(weight, ROWS, gain, offset, kernel)


def weight_standardization(
    weight: Tensor,
    gain: Tensor | None = None,
    *,
    offset: Tensor | None = None,
    kernel: Kernel = "auto",
    **options: Any,
) -> Tensor:
    """Return ``(W - mean) / (std + eps)``, times gain plus offset where they are given.

    Options and source: `WeightStandardization`.
    """
    return _effective(WeightStandardization(**options), weight, gain, kernel, offset)


def weight_align(
    weight: Tensor, gain: Tensor | None = None, *, kernel: Kernel = "auto", **options: Any
) -> Tensor:
    """Return ``gain * (w - mean) / sqrt(n/2 * (var + eps))``; options: `WeightAlign`."""
    return _effective(WeightAlign(**options), weight, gain, kernel)


def parametric_weight_standardization(
    weight: Tensor, gain: Tensor | None = None, *, kernel: Kernel = "auto", **options: Any
) -> Tensor:
    """Return ``alpha * sqrt(2/n) * (W - mean) / sqrt(var + gamma)``.

    The gain is alpha; options: `ParametricWeightStandardization`.
    """
    return _effective(ParametricWeightStandardization(**options), weight, gain, kernel)


def weight_normalization(
    weight: Tensor, gain: Tensor | None = None, *, kernel: Kernel = "auto", **options: Any
) -> Tensor:
    """Return ``gain * v / |v|``; options: `WeightNormalization`."""
    return _effective(WeightNormalization(**options), weight, gain, kernel)


def centered_weight_normalization(
    weight: Tensor, gain: Tensor | None = None, *, kernel: Kernel = "auto", **options: Any
) -> Tensor:
    """Return ``gain * (W - mean) / |W - mean|``; options: `CenteredWeightNormalization`."""
    return _effective(CenteredWeightNormalization(**options), weight, gain, kernel)


def weight_centering(
    weight: Tensor, gain: Tensor | None = None, *, kernel: Kernel = "auto", **options: Any
) -> Tensor:
    """Return ``W - mean``, times gain where it is given; options: `WeightCentering`."""
    return _effective(WeightCentering(**options), weight, gain, kernel)


def scaled_weight_standardization(
    weight: Tensor, gain: Tensor | None = None, *, kernel: Kernel = "auto", **options: Any
) -> Tensor:
    """Return ``gain * gamma * (W - mean) / sqrt(max(n * var, eps))``.

    Options: `ScaledWeightStandardization`.
    """
    return _effective(ScaledWeightStandardization(**options), weight, gain, kernel)


def equivariant_weight_standardization(
    weight: Tensor, gain: Tensor | None = None, *, kernel: Kernel = "auto", **options: Any
) -> Tensor:
    """Return ``(W - mean) / (std + eps)`` over cells; options: `EquivariantWeightStandardization`.

    Raises:
        ValueError: If a gain is given; the method has none.
    """
    if gain is not None:
        raise ValueError("equivariant weight standardization has no gain")
    return _effective(EquivariantWeightStandardization(**options), weight, None, kernel)


def equilibrium_normalization(
    weight: Tensor,
    input_mean: Tensor,
    gain: Tensor | None = None,
    *,
    kernel: Kernel = "auto",
    geometry_factor: float = 1.0,
    **options: Any,
) -> Tensor:
    """Return the weight balanced against the mean of its input, times gain where it is given.

    Args:
        weight: Raw weight ``(O, C/g, taps...)``.
        input_mean: Mean of each input channel, ``(C,)``; C over ``weight.shape[1]`` is the groups.
        gain: The affine's a, ``(O,)``.
        kernel: Has no choice here; the method is plain torch on every device.
        geometry_factor: phi.
        **options: Those of `EquilibriumNormalization`.

    Raises:
        ValueError: If the number of input means does not fit the weight.
    """
    check_kernel(kernel)
    method = EquilibriumNormalization(**options)
    _check(method, weight)
    channels = weight.shape[1]
    groups, rest = divmod(input_mean.numel(), channels)
    if input_mean.dim() != 1 or rest or not groups or weight.shape[0] % groups:
        raise ValueError(
            f"input_mean must hold one number per input channel, a multiple of {channels} that"
            f" divides into {weight.shape[0]} filters, got shape {tuple(input_mean.shape)}"
        )
    return method.effective(weight, input_mean, gain, geometry_factor=geometry_factor)
