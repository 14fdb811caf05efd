"""Mean and variance of channels, added up over micro-batches and processes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Moments", "by_channel"]


def by_channel(values: Tensor, channel_last: bool) -> tuple[Tensor, tuple[int, ...], int]:
    """Return values in float32 or wider, the axes that run along a channel, and the channel's.

    Args:
        values: ``(samples, channels, ...)``, or ``(..., channels)``.
        channel_last: Which of the two.
    """
    values = values.detach().to(torch.promote_types(values.dtype, torch.float32))
    if channel_last:
        values = values.reshape(-1, values.shape[-1])
        return values, (0,), 1
    return values, (0, *range(2, values.dim())), 1


class Moments:
    """Count, mean and sum of squared deviations of each channel, merged by Chan's formula.

    ``E[x^2] - E[x]^2`` would lose what a mean far above the deviation covers.
    """

    def __init__(self, channels: int, device: torch.device) -> None:
        """Have seen nothing yet."""
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self.count = torch.zeros((), dtype=dtype, device=device)
        self.mean = torch.zeros(channels, dtype=dtype, device=device)
        self.squares = torch.zeros(channels, dtype=dtype, device=device)

    def add(self, values: Tensor, axes: tuple[int, ...]) -> None:
        """Take in values; `axes` are all but that of the channels, which is 1."""
        elements = values.numel() // max(values.shape[1], 1)
        if elements == 0:
            return
        wide = self.mean.dtype
        mean = values.mean(axes)
        shape = [1, -1] + [1] * (values.dim() - 2)
        apart = values - mean.view(shape)
        rest = apart.mean(axes).to(wide)
        squares = torch.linalg.vector_norm(apart, dim=axes).to(wide).square()
        self.merge(
            torch.full_like(self.count, elements),
            mean.to(wide) + rest,
            squares - elements * rest.square(),
        )

    def merge(self, count: Tensor, mean: Tensor, squares: Tensor) -> None:
        """Take in what another batch or process has seen."""
        total = self.count + count
        share = count / total.clamp_min(1)
        apart = mean - self.mean
        self.squares = self.squares + squares + apart.square() * self.count * share
        self.mean = self.mean + apart * share
        self.count = total

    def pack(self) -> Tensor:
        """Return everything in one vector."""
        return torch.cat([self.count.view(1), self.mean, self.squares])

    def unpack(self, many: Tensor) -> None:
        """Become what the rows of `many`, packed in other processes, have seen together."""
        channels = len(self.mean)
        self.__init__(channels, self.mean.device)
        for row in many:
            self.merge(row[0], row[1 : 1 + channels], row[1 + channels :])

    @property
    def variance(self) -> Tensor:
        """Biased variance of each channel; NaN before anything was seen."""
        return self.squares / self.count

    @property
    def total_variance(self) -> Tensor:
        """Variance over all elements of all channels: mean of variances + variance of means."""
        return self.variance.mean() + self.mean.var(correction=0)

    @property
    def square_mean(self) -> Tensor:
        """Mean square over all elements of all channels."""
        return (self.variance + self.mean.square()).mean()
