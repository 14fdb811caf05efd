"""Signals of what goes into a layer and comes out of it.

Outputs are taken from the weight layer itself, before any norm or activation behind it. They are
added up over all forwards of a step and over processes; a forward that a checkpoint repeats is not
counted twice. The group shares, for each layer, four passes over its input and four over its output
and one copy of the larger of the two while it is looked at.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import distributed, nn

from filterwise.balance import batched
from filterwise.diagnose.histogram import BINS, histogram
from filterwise.diagnose.moments import Moments, by_channel
from filterwise.diagnose.signal import table

if TYPE_CHECKING:
    from torch import Tensor

    from filterwise.diagnose.layers import Layer

__all__ = ["SIGNALS", "Activations"]


class Activations:
    """What one layer has seen in a step.

    Attributes:
        layer: The layer.
        inputs: Moments of the input's channels.
        outputs: Moments of the output's.
        alive: For each input channel how many processes saw a value that was not zero.
        counts: Histogram of each output channel; None if it is not asked for.
    """

    def __init__(self, layer: Layer, *, histograms: bool, process_group: object = None) -> None:
        """Have seen nothing yet."""
        device, inputs = layer.weight.device, layer.inputs
        assert inputs is not None
        self.layer = layer
        self._last = isinstance(layer.module, nn.Linear)
        self._group = process_group
        self._has_range = False
        self.inputs = Moments(inputs, device)
        self.outputs = Moments(layer.filters, device)
        self.alive = torch.zeros_like(self.inputs.mean)
        self.low = self.high = torch.zeros_like(self.outputs.mean)
        self.counts: Tensor | None = None
        if histograms:
            self.counts = self.low.new_zeros(layer.filters, BINS)

    def add(self, input: Tensor, output: Tensor) -> None:
        """Take in one forward."""
        if not self._last:
            input, output = batched(self.layer.module, input), batched(self.layer.module, output)
        values, axes, _ = by_channel(input, self._last)
        self.inputs.add(values, axes)
        seen = values.abs().amax(axes) if values.numel() else torch.zeros_like(self.alive)
        self.alive = torch.maximum(self.alive, (seen > 0).to(self.alive.dtype))
        values, axes, _ = by_channel(output, self._last)
        self.outputs.add(values, axes)
        if self.counts is not None:
            if not self._has_range:
                self._fix_range()
            rows = values.transpose(0, 1).flatten(1)
            self.counts = self.counts + histogram(rows, self.low, self.high).to(self.counts)

    def _fix_range(self) -> None:
        """Take bins from the first micro-batch, over all processes, so that counts add up."""
        self._has_range = True
        first = self.outputs
        if self._group is not None:
            first = Moments(len(first.mean), first.mean.device)
            first.unpack(gathered(self.outputs.pack(), self._group))
        deviation = first.variance.sqrt()
        self.low, self.high = first.mean - 5 * deviation, first.mean + 5 * deviation

    def pack(self) -> Tensor:
        """Return everything that is to be reduced over processes, in one vector."""
        counts = [] if self.counts is None else [self.counts.flatten()]
        return torch.cat([self.inputs.pack(), self.outputs.pack(), self.alive, *counts])

    def unpack(self, many: Tensor) -> None:
        """Become what the rows of `many`, packed in other processes, have seen together."""
        sizes = [1 + 2 * len(self.inputs.mean), 1 + 2 * len(self.outputs.mean), len(self.alive)]
        rest = many.shape[1] - sum(sizes)
        inputs, outputs, alive, counts = many.split([*sizes, rest], 1)
        self.inputs.unpack(inputs)
        self.outputs.unpack(outputs)
        self.alive = alive.amax(0)
        if self.counts is not None:
            self.counts = counts.sum(0).view_as(self.counts)


def gathered(vector: Tensor, group: object) -> Tensor:
    """Return one row a process."""
    rows = [torch.empty_like(vector) for _ in range(distributed.get_world_size(group))]  # pyright: ignore[reportArgumentType]
    distributed.all_gather(rows, vector, group=group)  # pyright: ignore[reportArgumentType]
    return torch.stack(rows)


def _channel_mean(seen: Activations) -> Tensor:
    """Mean of each output channel over samples and positions."""
    return seen.outputs.mean


def _channel_variance(seen: Activations) -> Tensor:
    """Variance of each output channel over samples and positions, divisor their number."""
    return seen.outputs.variance


def _between(seen: Activations) -> Tensor:
    """Var_o E[Y_o] / Var[Y], Y all outputs, Var[Y] = mean_o Var[Y_o] + Var_o E[Y_o]."""
    return seen.outputs.mean.var(correction=0) / seen.outputs.total_variance


def _input_mean(seen: Activations) -> Tensor:
    """E[X], X all elements of the layer's input."""
    return seen.inputs.mean.mean()


def _input_mean_share(seen: Activations) -> Tensor:
    """E[X]^2 / E[X^2], X all elements of the layer's input.

    1/pi behind ReLU of a centred normal number.
    """
    return seen.inputs.mean.mean().square() / seen.inputs.square_mean


def _dead_inputs(seen: Activations) -> Tensor:
    """Share of input channels that are 0 in every element of the step.

    Dead ReLUs, seen from the layer that they feed, so that a ReLU without a module is seen too.
    """
    return (seen.alive == 0).to(seen.alive.dtype).mean()


def _histogram(seen: Activations) -> Tensor | None:
    """For each output channel low, high and 64 counts between them.

    From 5 standard deviations below the mean of the step's first micro-batch to 5 above; what lies
    outside is counted in the end bins.
    """
    if seen.counts is None:
        return None
    return torch.cat([seen.low[:, None], seen.high[:, None], seen.counts], 1)


SHARED = "shared with the group"

SIGNALS = [
    *table(
        "activations",
        "channel",
        [
            ("channel_mean", _channel_mean, SHARED, "WA Eq. 4"),
            ("channel_variance", _channel_variance, SHARED, "WA Eq. 5"),
        ],
    ),
    *table(
        "activations",
        "layer",
        [
            ("between_channel_share", _between, SHARED, "PWS Eqs. 5 and 14; corrected"),
            ("input_mean", _input_mean, SHARED, "PWS Fig. 6 (a)"),
            ("input_mean_share", _input_mean_share, SHARED, "PWS Fig. 6 (b)"),
            ("dead_inputs", _dead_inputs, SHARED, "standard"),
        ],
    ),
    *table(
        "activations",
        "channel",
        [
            (
                "*channel_histogram",
                _histogram,
                "about eight passes over the output, three copies of it; with DDP one exchange a"
                " layer in the forward",
                "WA Figs. 2, 5, 7, 8, 11, 12",
            ),
        ],
    ),
]
