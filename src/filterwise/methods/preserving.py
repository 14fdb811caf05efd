"""The gain and offset with which a method's effective weight is the raw weight."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from filterwise.kernel import Layer, eager
from filterwise.methods.equinorm import EquilibriumNormalization
from filterwise.methods.method import WeightMethod

if TYPE_CHECKING:
    from torch import Tensor

    from filterwise.filters import FilterLayout
    from filterwise.methods.method import Method

__all__ = ["preserving_values", "wide_dtype"]


def preserving_values(
    method: Method,
    weight: Tensor,
    layout: FilterLayout,
    input_mean: Tensor | None = None,
    geometry_factor: float | Tensor = 1.0,
) -> tuple[Tensor, Tensor | None]:
    r"""Return the gain and the offset that reproduce a raw weight.

    .. math:: g = 1 / (k\,f(m_2)), \qquad b = c\,\mu
        \qquad\Rightarrow\qquad g\,k\,f(m_2)\,(W - c\,\mu) + b = W

    per filter (specification, 7.4). Where a method's statistics are not those of the filter alone
    (cells, EquiNorm), they are the straight line through the effective and the raw weights of the
    filter, which is exact for EquiNorm and for filters of one cell, and the nearest (in squares)
    otherwise. Where the effective weight is 0 whatever the gain, the gain is the method's start.

    Args:
        method: The method.
        weight: Raw weight.
        layout: Where its filters lie.
        input_mean: EquiNorm's v, ``(channels,)``.
        geometry_factor: EquiNorm's phi.

    Returns:
        Two tensors ``(filters,)`` in float64 (float32 on devices without it); the offset is None
        for a method that takes nothing off its filters, as Weight Normalization.
    """
    wide = weight.detach().to(wide_dtype(weight.device))
    start = method.gain_start(layout.matrix(wide))
    if isinstance(method, WeightMethod) and not method.cells:
        family = method.family(layout.fan_in(weight.shape))
        _, statistics = eager.compute(Layer(wide, family, layout))
        divisor = statistics.divisor.flatten()
        gain = divisor * statistics.unit.flatten() / family.constant
        gain = torch.where(divisor == 0, start, gain)
        if not family.centre:
            return gain, None
        return gain, (statistics.pivot + statistics.unit * statistics.mean).flatten()
    if isinstance(method, EquilibriumNormalization):
        assert input_mean is not None
        plain = method.effective(wide, input_mean, geometry_factor=geometry_factor)
    else:
        assert isinstance(method, WeightMethod)
        plain = method.effective(wide, layout)
    return _line(layout.matrix(plain), layout.matrix(wide), start)


def _line(x: Tensor, y: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """Return slope and intercept of the line through the points of each row."""
    means = x.mean(1), y.mean(1)
    from_x, from_y = x - means[0].unsqueeze(1), y - means[1].unsqueeze(1)
    square = from_x.square().sum(1)
    flat = square == 0
    slope = torch.where(flat, start, (from_x * from_y).sum(1) / torch.where(flat, 1.0, square))
    return slope, means[1] - slope * means[0]


def wide_dtype(device: torch.device) -> torch.dtype:
    """Return float64, or the widest dtype of a device that has none."""
    return torch.float32 if device.type == "mps" else torch.float64
