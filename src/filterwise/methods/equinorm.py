"""Equilibrium Normalization: filters balanced against the statistics of their own input."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import distributed

from filterwise.methods import options
from filterwise.methods.method import Method

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from filterwise.filters import FilterLayout

__all__ = ["EquilibriumNormalization"]

LEAST_SHARE = 0.1
LEAST_MEAN = 0.05  # of the root mean square; a ReLU's output has 0.56, pictures in [0, 1] 0.9
MOST_POSITIVE = 2.0
ROUNDINGS = 16  # a channel mean below this many roundings of the channel's mean size counts as 0


@dataclass(frozen=True)
class EquilibriumNormalization(Method):
    r"""Shift and scale every filter so that its positive and negative parts weigh the same.

    .. math::
        w' = w - \frac{\sum_j v_j w_j}{\sum_j v_j}, \quad
        w'' = \varphi\,\frac{w'}{\sum_j v_j \max(w'_j, 0)}, \quad
        y_d = a_d\,(x * w''_d) + c_d

    with j over the weights of a filter and :math:`v_j` the mean of the input channel that the
    weight sees, over samples and positions. In training v comes from the batch, and the gradient
    passes through it; in evaluation it is a running mean, so that a sample's output depends
    neither on the batch nor on the resolution.

    Attributes:
        single_pass: Sum the positive part over weights that were positive before the shift, as in
            the paper's runs. A filter of one sign takes the two-pass divisor.
        fraction: Statistics from the first ceil(fraction * N) samples; the paper's fix is 1/4.
        affine: Learnable a (the gain, starts at 1) and c (the bias, at the layer's own or 0).
        geometry: :math:`\varphi` is 1 ("exact"), or prod(S_out * stride / S_in) as in "paper".
        momentum: Weight of a new batch in the running mean; the first batch sets it.
        synchronize: Sum the statistics over the processes of the default group.

    Raises:
        ValueError: If an option is out of range.

    Source: Defazio and Bottou, *Controlling Covariate Shift using Equilibrium Normalization of
    Weights*, arXiv 1812.04549, sections 3 to 5. The paper's v is a sum; here it is the mean per
    element, so that evaluation depends neither on batch size nor on resolution.
    """

    name: ClassVar = "equinorm"
    title: ClassVar = "Equilibrium Normalization"
    source: ClassVar = "Defazio and Bottou 2018, arXiv 1812.04549"
    formula: ClassVar = "w' = w - sum(v w)/sum(v);  gain * w' / sum(v * max(w', 0))"
    uses_input: ClassVar = True

    single_pass: bool = False
    fraction: float = 1.0
    affine: bool = True
    geometry: Literal["exact", "paper"] = "exact"
    momentum: float = 0.1
    synchronize: bool = False

    def __post_init__(self) -> None:
        """Check the options."""
        for name in ("single_pass", "affine", "synchronize"):
            options.flag(name, getattr(self, name))
        options.choice("geometry", self.geometry, ("exact", "paper"))
        fraction = options.number("fraction", self.fraction, above=True, maximum=1.0)
        object.__setattr__(self, "fraction", fraction)
        momentum = options.number("momentum", self.momentum, above=True, maximum=1.0)
        object.__setattr__(self, "momentum", momentum)

    @property
    def centred(self) -> bool:
        """The mean weighted with the input's is zero, not the plain one."""
        return False

    @property
    def shifts(self) -> bool:
        """That weighted mean is taken off."""
        return True

    @property
    def scale_free(self) -> bool:
        """There is no eps."""
        return True

    @property
    def has_gain(self) -> bool:
        """The affine's a is the gain."""
        return self.affine

    def refuses(self, shape: Sequence[int], layout: FilterLayout) -> str | None:
        """Return why a weight of this shape cannot take the method, or None."""
        if layout.axis != 0:
            return (
                "is a transposed convolution; each of its output phases meets another part of the"
                " filter, so no one shift balances them, and the paper defines none"
            )
        return super().refuses(shape, layout)

    def input_mean(self, x: Tensor, channel_axis: int) -> Tensor:
        """Return v, the mean of each input channel per element, ``(channels,)``.

        Args:
            x: The layer's input, batch first.
            channel_axis: 1 for a convolution; -1 for a linear layer.

        Returns:
            Tensor in float32 or wider, part of the graph.
        """
        samples = max(1, math.ceil(self.fraction * x.shape[0]))
        part = x[:samples].to(torch.promote_types(x.dtype, torch.float32)).movedim(channel_axis, 0)
        part = part.flatten(1)
        sums = torch.cat([part.sum(1), part.detach().abs().sum(1)])
        count = part.new_full((1,), part.shape[1])
        if self.synchronize and distributed.is_available() and distributed.is_initialized():
            from torch.distributed.nn import functional as distributed_functional

            sums, count = distributed_functional.all_reduce(torch.cat([sums, count])).split(
                [len(sums), 1]
            )
        mean, size = (sums / count).chunk(2)
        # A mean that rounding alone explains is none: dividing by it would blow the filters up.
        own = torch.finfo(x.dtype).eps / math.sqrt(part.shape[1])
        noise = ROUNDINGS * max(torch.finfo(part.dtype).eps, own)
        return torch.where(mean.detach().abs() > noise * size, mean, 0.0)

    def effective(
        self,
        weight: Tensor,
        input_mean: Tensor,
        gain: Tensor | None = None,
        *,
        geometry_factor: float | Tensor = 1.0,
        offset: Tensor | None = None,
    ) -> Tensor:
        """Compute the effective weight for given input statistics.

        Args:
            weight: Raw weight ``(O, C/g, taps...)`` of any floating dtype; a linear layer's has no
                taps.
            input_mean: v, ``(C,)``.
            gain: a, ``(O,)``; None is 1.
            geometry_factor: phi.
            offset: Added to all weights of a filter, ``(O,)``; None is 0.

        Returns:
            Tensor of the weight's shape, dtype and strides; 0, but for the offset, for a constant
            filter, and for one whose channels are all 0.
        """
        dtype = torch.promote_types(weight.dtype, torch.float32)
        dtype = torch.promote_types(dtype, input_mean.dtype)
        wide, v = weight.to(dtype), _per_weight(input_mean.to(dtype), weight)
        dims = tuple(range(1, weight.dim()))
        deviation = _deviation(wide, dims)
        rounding = torch.finfo(dtype).eps
        spread = v.expand_as(wide)
        total = spread.sum(dims, keepdim=True)
        unbalanced = total.abs() <= rounding * spread.abs().sum(dims, keepdim=True)
        shift = (v * deviation).sum(dims, keepdim=True) / torch.where(unbalanced, 1.0, total)
        shift = torch.where(unbalanced, deviation.mean(dims, keepdim=True), shift)
        balanced = deviation - shift
        positive = _positive(wide, balanced, dims) if self.single_pass else balanced > 0
        divisor = (v * balanced * positive).sum(dims, keepdim=True)
        empty = divisor.abs() <= rounding * (v * balanced).abs().sum(dims, keepdim=True)
        out = balanced * torch.where(empty, 0.0, geometry_factor / torch.where(empty, 1.0, divisor))
        if gain is not None:
            out = out * gain.to(dtype).reshape(-1, *[1] * (weight.dim() - 1))
        if offset is not None:
            out = out + offset.to(dtype).reshape(-1, *[1] * (weight.dim() - 1))
        return out.to(weight.dtype)

    def problems(
        self, weight: Tensor, input_mean: Tensor, input_size: Tensor | None = None
    ) -> list[tuple[str, str]]:
        """Return what keeps these statistics from balancing this weight, as (level, words).

        Levels are ``"error"`` and ``"warning"``. Values are read back from the device.

        Args:
            weight: Raw weight.
            input_mean: v, ``(C,)``.
            input_size: Root mean square of each input channel, where it is known.
        """
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        v = input_mean.to(wide.dtype)
        words = _input_problem(v.view(-1, weight.shape[1]), input_size)
        found = [("error", words)] if words else []
        balanced = self.effective(wide, v)
        dims = tuple(range(1, weight.dim()))
        positive = (_per_weight(v, weight) * balanced.clamp_min(0)).sum(dims)
        dead = int((balanced == 0).flatten(1).all(1).sum())
        if dead:
            words = f"has {dead} filters that are constant or see channels of mean 0 only"
            found.append(("warning", words))
        large = int((positive > MOST_POSITIVE).sum())
        if self.single_pass and large:
            words = (
                f"has {large} filters whose positive part weighs more than {MOST_POSITIVE:g} after"
                " the single pass; use equinorm(single_pass=false)"
            )
            found.append(("warning", words))
        if not self.single_pass and bool((positive < 0).any()):
            found.append(("warning", "has filters whose positive part weighs less than 0"))
        return found


def _input_problem(grouped: Tensor, size: Tensor | None) -> str:
    """Return why channel means, ``(groups, C/g)``, cannot balance filters; empty if they can."""
    share = float((grouped.sum(1).abs() / grouped.abs().sum(1).clamp_min(1e-38)).min())
    if share < LEAST_SHARE:
        return (
            f"has an input without a positive mean: its channel means add up to {share:.2g} of the"
            f" sum of their sizes, and below {LEAST_SHARE} the shift has no bound; feed pictures"
            " that are not normalized to mean zero"
        )
    share = 1.0 if size is None else float(grouped.sum().abs() / size.sum().clamp_min(1e-38))
    if share < LEAST_MEAN:
        return (
            f"has an input whose mean is {share:.2g} of its size, so that filters are divided by"
            " next to nothing and change with every batch; feed pictures that are not normalized to"
            " mean zero, or leave this layer out"
        )
    return ""


def _per_weight(values: Tensor, weight: Tensor) -> Tensor:
    """Spread one value per input channel over the weights: ``(O, C/g, 1...)``."""
    filters, channels = weight.shape[:2]
    groups = values.numel() // channels
    rows = values.view(groups, 1, channels).expand(groups, filters // groups, channels)
    return rows.reshape(filters, channels, *[1] * (weight.dim() - 2))


def _deviation(wide: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Subtract each filter's first weight and scale by its largest entry; both cancel later.

    A constant filter becomes exactly 0, and no product leaves the range of the dtype.
    """
    pivot = wide.detach()
    peak = pivot.abs().amax(dims, keepdim=True)
    for dim in dims:
        pivot = pivot.narrow(dim, 0, 1)
    unit = torch.where(peak == 0, 1.0, peak)
    return (wide - pivot) / unit


def _positive(wide: Tensor, balanced: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Mark the weights that the single pass counts: those positive before the shift.

    In a filter of one sign these are all or none, whose sum is 0; it takes the two-pass choice.
    """
    one_sign = (wide.amin(dims, keepdim=True) > 0) | (wide.amax(dims, keepdim=True) <= 0)
    return torch.where(one_sign, balanced > 0, wide > 0)
