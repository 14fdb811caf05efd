"""Signals of a layer's weights.

All that a group shares for one layer: the filter matrix is shifted and centred once (two copies of
the weights for as long as the layer is looked at, four passes over them).
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import torch

from filterwise.diagnose.histogram import histogram
from filterwise.diagnose.signal import table

if TYPE_CHECKING:
    from torch import Tensor

    from filterwise.diagnose.layers import Layer

__all__ = ["SIGNALS", "Filters", "Weights", "angle"]

DEAD = 1e-6
"""A filter is dead below this share of the median filter's norm."""

SAME = 0.999
"""Two filters are duplicates from this cosine on."""


class Filters:
    """A filter matrix, and its statistics by forms that stand a mean far above the deviation."""

    def __init__(self, matrix: Tensor) -> None:
        """Take a matrix ``(filters, n)`` in float32 or wider."""
        self.matrix = matrix
        self.length = matrix.shape[1]

    @cached_property
    def _centring(self) -> tuple[Tensor, Tensor]:
        # Subtracting the first weight is exact where the mean is large; the mean of what is left
        # has no cancellation.
        first = self.matrix[:, :1]
        shifted = self.matrix - first
        rest = shifted.mean(1, keepdim=True)
        return shifted - rest, (first.double() + rest.double())[:, 0]

    @property
    def centred(self) -> Tensor:
        """The filters without their means."""
        return self._centring[0]

    @property
    def mean(self) -> Tensor:
        """The filters' means."""
        return self._centring[1]

    @cached_property
    def centred_norm(self) -> Tensor:
        """Euclidean norms of the centred filters."""
        return torch.linalg.vector_norm(self.centred, dim=1).double()

    @cached_property
    def variance(self) -> Tensor:
        """Biased variances, divisor n."""
        return self.centred_norm.square() / self.length

    @cached_property
    def norm(self) -> Tensor:
        """Euclidean norms."""
        return torch.linalg.vector_norm(self.matrix, dim=1).double()


class Weights(Filters):
    """What the signals of a layer's weights are computed from.

    Attributes:
        layer: The layer.
        lr: Its parameter group's learning rate; None if it is not known.
        after: The effective filter matrix after the step; None if no step was seen.
    """

    def __init__(self, layer: Layer, lr: float | None = None, before: Tensor | None = None) -> None:
        """Read the layer's raw weight.

        Args:
            layer: The layer.
            lr: Learning rate.
            before: The effective filter matrix, if it is computed already.
        """
        super().__init__(layer.matrix(layer.weight))
        self.layer = layer
        self.lr = lr
        self.after: Tensor | None = None
        self._before = before

    @cached_property
    def effective(self) -> Filters:
        """The effective filters."""
        if not self.layer.is_converted:
            return self
        return Filters(self.layer.effective() if self._before is None else self._before)


def angle(one: Tensor, other: Tensor) -> Tensor:
    """Return the angle between rows in radians, by the form that is accurate for small ones.

    ``2 atan2(|a - b|, |a + b|)`` of the unit vectors (Kahan). NaN where a row is zero.
    """
    one = one / torch.linalg.vector_norm(one, dim=1, keepdim=True)
    other = other / torch.linalg.vector_norm(other, dim=1, keepdim=True)
    apart = torch.linalg.vector_norm(one - other, dim=1).double()
    along = torch.linalg.vector_norm(one + other, dim=1).double()
    return 2 * torch.atan2(apart, along)


def _mean(view: Weights) -> Tensor:
    """Mean of W."""
    return view.mean


def _std(view: Weights) -> Tensor:
    """Standard deviation of W, divisor n."""
    return view.variance.sqrt()


def _norm(view: Weights) -> Tensor:
    """|W|, Euclidean."""
    return view.norm


def _positive(view: Weights) -> Tensor:
    """Share of entries of W that are above 0."""
    return (view.matrix > 0).sum(1).double() / view.length


def _sign_distance(view: Weights) -> Tensor:
    """min(|W+|, |W-|) / |W|, W+ and W- the positive and the negative entries.

    The distance to the nearest filter of one sign; 0 is one-signed, 0.707 the most.
    """
    positive = torch.linalg.vector_norm(view.matrix.clamp_min(0), dim=1).double()
    negative = torch.linalg.vector_norm(view.matrix.clamp_max(0), dim=1).double()
    return torch.minimum(positive, negative) / view.norm


def _variance_minimum(view: Weights) -> Tensor:
    """Least Var[W] over the layer's filters, divisor n."""
    return view.variance.min()


def _dead(view: Weights) -> Tensor:
    """How many effective filters have a norm of at most 1e-6 of the layer's median."""
    norms = view.effective.norm
    return (norms <= DEAD * norms.median()).sum().double()


def _duplicates(view: Weights) -> Tensor:
    """How many filters have a cosine of 0.999 or more with an earlier one.

    Raw filters, centred where the method centres.
    """
    rows = view.centred if view.layer.is_centred else view.matrix
    norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    unit = torch.where(norms > 0, rows / norms, torch.zeros_like(rows))
    earlier = (unit @ unit.T).tril(-1)
    return (earlier >= SAME).any(1).sum().double()


def _gain(view: Weights) -> Tensor | None:
    """The gain, where the layer has one."""
    gain = view.layer.gain()
    return None if gain is None else gain.double()


def _effective_rate(view: Weights) -> Tensor | None:
    """Learning rate / |W - mean W|^2; / |W|^2 where the method does not centre or there is none.

    The rate at which plain SGD turns the direction of a scale-invariant filter; for adaptive
    optimizers read weight_turn.
    """
    if view.lr is None:
        return None
    norm = view.centred_norm if view.layer.is_centred else view.norm
    return view.lr / norm.square()


def _turn(view: Weights) -> Tensor | None:
    """Angle between the effective filter before and after the optimizer's step, in radians."""
    return None if view.after is None else angle(view.effective.matrix, view.after)


def _effective_norm(view: Weights) -> Tensor:
    """Norm of the effective filter, Euclidean."""
    return view.effective.norm


def _raw_histogram(view: Weights) -> Tensor:
    """For each filter low, high and 64 counts of W between them.

    From 5 standard deviations below the mean to 5 above; what lies outside is counted in the end
    bins.
    """
    return _histogram(view)


def _effective_histogram(view: Weights) -> Tensor:
    """The same of the effective filter."""
    return _histogram(view.effective)


def _histogram(filters: Filters) -> Tensor:
    low, high = filters.mean, filters.variance.sqrt()
    low, high = low - 5 * high, low + 5 * high
    counts = histogram(filters.matrix, low, high)
    return torch.cat([low[:, None], high[:, None], counts], 1)


PASS = "one pass"
SHARED = "shared with the group"

SIGNALS = [
    *table(
        "weights",
        "filter",
        [
            ("weight_mean", _mean, SHARED, "WS Eq. 3"),
            ("weight_std", _std, SHARED, "WS Eq. 4"),
            ("weight_norm", _norm, PASS, "PWS, section on WN"),
            ("weight_positive", _positive, PASS, "EquiNorm 5.2"),
            ("weight_sign_distance", _sign_distance, "four passes", "EquiNorm 5.2"),
        ],
    ),
    *table(
        "weights",
        "layer",
        [
            ("weight_variance_minimum", _variance_minimum, SHARED, "PWS Fig. 2"),
            ("dead_filters", _dead, "the effective weight and one pass", "filterwise"),
            (
                "*duplicate_filters",
                _duplicates,
                "a product of filters x n x filters, as one sample's 1x1 convolution on a map of"
                " as many positions as there are filters",
                "filterwise",
            ),
        ],
    ),
    *table(
        "weights",
        "filter",
        [
            ("gain", _gain, "none", "WA Eq. 10, PWS Eq. 12"),
            ("effective_learning_rate", _effective_rate, SHARED, "van Laarhoven (2017), Eq. 10"),
            (
                "weight_turn",
                _turn,
                "the effective weight before and after the step and six passes, one copy of it kept"
                " during the step",
                "Wan et al. (2021), angular update",
            ),
            ("*effective_weight_norm", _effective_norm, "the effective weight, one pass", "WS 2.2"),
            ("*weight_histogram", _raw_histogram, "about six passes", "WA Fig. 4"),
            (
                "*effective_weight_histogram",
                _effective_histogram,
                "the effective weight and about ten passes",
                "WA Fig. 4",
            ),
        ],
    ),
]
