"""Signals of a layer's gradients.

The gradient of a step is that of the loss over all its micro-batches and processes. ``dL/dW`` is
the raw weight's ``.grad`` as the optimizer gets it: unscaled and clipped. ``G``, the gradient with
respect to the effective weight, is seen where the backward pass produces it: before clipping, and
times the loss scale where there is one; the three shares do not depend on either. For a layer that
is not converted both are the same tensor.

For one layer the group shares what the weights' signals share, three passes over ``dL/dW`` and four
over ``G``; until the step ends one copy of ``G`` is kept for each converted layer.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import torch

from filterwise.diagnose.signal import table
from filterwise.diagnose.weight_signals import Filters

if TYPE_CHECKING:
    from torch import Tensor

    from filterwise.diagnose.weight_signals import Weights

__all__ = ["SIGNALS", "Gradients", "shares"]


class Gradients:
    """What the signals of a layer's gradients are computed from.

    Attributes:
        weights: The layer's weights, before the step.
        raw: ``dL/dW`` as filter matrix; None if no gradient came.
        effective: ``G`` likewise.
    """

    def __init__(self, weights: Weights, raw: Tensor | None, effective: Tensor | None) -> None:
        """Take the gradients."""
        self.weights = weights
        self.raw = raw
        self.effective = effective

    @cached_property
    def radial(self) -> Tensor | None:
        """<dL/dW, W> / |W|."""
        if self.raw is None:
            return None
        product = _dot(self.raw, self.weights.matrix)
        norm = self.weights.norm
        return torch.where(norm > 0, product / norm, torch.zeros_like(product))

    @cached_property
    def raw_norm(self) -> Tensor | None:
        """|dL/dW| per filter."""
        return None if self.raw is None else _norms(self.raw)

    @cached_property
    def parts(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """The three shares."""
        return None if self.effective is None else shares(self.effective, self.weights)


def _dot(one: Tensor, other: Tensor) -> Tensor:
    return torch.linalg.vecdot(one, other, dim=1).double()


def _norms(rows: Tensor) -> Tensor:
    return torch.linalg.vector_norm(rows, dim=1).double()


def shares(gradient: Tensor, weights: Filters) -> tuple[Tensor, Tensor, Tensor]:
    """Return the shares of ``|G|^2`` that WS keeps, that its division and its centring remove.

    With ``e = 1/sqrt(n)`` and ``u`` the centred raw filter of length 1:
    ``radial = <G,u>^2/|G|^2``, ``mean = <G,e>^2/|G|^2``, and ``kept`` is the rest of G, not 1 less
    the others. They add to one; NaN where G is zero; radial is 0 where the filter is constant.

    Args:
        gradient: G, ``(filters, n)``.
        weights: The raw filters.
    """
    length = gradient.shape[1]
    mean = gradient.mean(1, keepdim=True)
    rest = gradient - mean
    norm = weights.centred_norm
    along = _dot(rest, weights.centred)
    along = torch.where(norm > 0, along / norm, torch.zeros_like(along))
    # A centred filter of norm 0 has no direction; its column of zeros takes nothing away.
    scale = torch.where(norm > 0, along / norm, torch.zeros_like(along))
    rest = rest - weights.centred * scale[:, None].to(rest.dtype)
    squares = (
        _norms(rest).square(),
        along.square(),
        mean[:, 0].double().square() * length,
    )
    total = squares[0] + squares[1] + squares[2]
    return squares[0] / total, squares[1] / total, squares[2] / total


def _norm(view: Gradients) -> Tensor | None:
    """|dL/dW| over the whole layer, Euclidean."""
    return None if view.raw_norm is None else view.raw_norm.square().sum().sqrt()


def _radial(view: Gradients) -> Tensor | None:
    """<dL/dW, W> / |W|: the part along the raw filter, 0 for a scale-invariant one."""
    return view.radial


def _tangential(view: Gradients) -> Tensor | None:
    """|dL/dW - radial W/|W||: the part across the raw filter."""
    if view.raw is None or view.radial is None:
        return None
    norm = view.weights.norm
    scale = torch.where(norm > 0, view.radial / norm, torch.zeros_like(norm))
    return _norms(view.raw - view.weights.matrix * scale[:, None].to(view.raw.dtype))


def _shift(view: Gradients) -> Tensor | None:
    """Var over filters of n mean(dW), dW = lr dL/dW, divisor the number of filters.

    The shift of the average gradient; 0 up to rounding where the method centres.
    """
    lr = view.weights.lr
    if view.raw is None or lr is None:
        return None
    sums = view.raw.mean(1).double() * (view.raw.shape[1] * lr)
    return sums.var(correction=0)


def _variance_ratio(view: Gradients) -> Tensor | None:
    """Var[W - dW] / Var[W], dW = lr dL/dW."""
    lr = view.weights.lr
    if view.raw is None or lr is None:
        return None
    step = view.raw - view.raw.mean(1, keepdim=True)
    moved = _norms(view.weights.centred - lr * step).square()
    return moved / view.weights.centred_norm.square()


def _kept(view: Gradients) -> Tensor | None:
    """|G - <G,u>u - <G,e>e|^2 / |G|^2, u the centred raw filter of length 1, e = 1/sqrt(n).

    What WS leaves of the gradient; kept + radial + mean = 1.
    """
    return None if view.parts is None else view.parts[0]


def _removed_radial(view: Gradients) -> Tensor | None:
    """<G,u>^2 / |G|^2: what dividing by the standard deviation removes (Eq. 6)."""
    return None if view.parts is None else view.parts[1]


def _removed_mean(view: Gradients) -> Tensor | None:
    """<G,e>^2 / |G|^2: what centring removes (Eq. 5)."""
    return None if view.parts is None else view.parts[2]


def _effective_norm(view: Gradients) -> Tensor | None:
    """|G| per filter, before clipping and with the loss scale."""
    return None if view.effective is None else _norms(view.effective)


SHARED = "shared with the group"

SIGNALS = [
    *table(
        "gradients",
        "layer",
        [
            ("gradient_norm", _norm, "one pass over the gradient", "standard"),
            ("gradient_shift", _shift, "one pass; needs the learning rate", "PWS Fig. 1 (b)"),
        ],
    ),
    *table(
        "gradients",
        "filter",
        [
            ("gradient_radial", _radial, "one pass", "van Laarhoven (2017)"),
            ("gradient_tangential", _tangential, "two passes", "van Laarhoven (2017)"),
            (
                "gradient_variance_ratio",
                _variance_ratio,
                "four passes; needs the learning rate",
                "PWS Fig. 1 (a)",
            ),
            ("lipschitz_kept", _kept, SHARED, "WS Eqs. 10 to 15, Fig. 4; corrected"),
            ("lipschitz_radial", _removed_radial, SHARED, "WS Eqs. 10 to 12, Fig. 4; corrected"),
            ("lipschitz_mean", _removed_mean, SHARED, "WS Eqs. 13 to 15, Fig. 4; corrected"),
            ("effective_gradient_norm", _effective_norm, "one pass", "WS Eq. 10"),
        ],
    ),
]
