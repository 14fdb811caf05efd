"""The family that every weight-only method belongs to, as data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

    from filterwise.filters import FilterLayout

__all__ = ["Family", "Gradients", "Kernel", "Layer", "Saved"]

Kernel = Literal["auto", "eager", "numba", "triton"]
"""Which implementation computes effective weights; ``"auto"`` takes the fastest that can."""


@dataclass(frozen=True)
class Family:
    r"""Place of a method in the family, for filters of one fan-in.

    .. math:: \hat W = g\,k\,f(m_2)\,(W - c\,\mu) + b

    with one gain :math:`g` and offset :math:`b` per filter (where there are any), and

    ========= ============================== ==========================
    ``scale`` f(m2)                          f with ``ddof=1``
    ========= ============================== ==========================
    root      (m2 + eps) ** -0.5             m2 counts n / (n - 1) times
    outside   1 / (m2 ** 0.5 + eps)          the same
    max       max(m2, eps) ** -0.5           the same
    none      1                              1
    ========= ============================== ==========================

    Where the divisor is exactly 0 the effective weight and its gradient are 0.

    Attributes:
        centre: c is 1 (True) or 0.
        moment: ``"central"``: m2 is the variance V; ``"raw"``: m2 is the mean square, for c = 0.
        scale: The form of f.
        eps: The number in f, in the unit of m2 (of its root for ``"outside"``).
        constant: k.
        ddof: 1 divides the sum of squares by n - 1 instead of n.
    """

    centre: bool = True
    moment: Literal["central", "raw"] = "central"
    scale: Literal["root", "outside", "max", "none"] = "root"
    eps: float = 0.0
    constant: float = 1.0
    ddof: Literal[0, 1] = 0


class Layer(NamedTuple):
    """One layer's work: everything that its effective weight depends on."""

    weight: Tensor
    """Raw weight, any shape that `layout` reads, any floating dtype and strides."""
    family: Family
    """The method's place in the family, for this fan-in."""
    layout: FilterLayout
    """Where the filters lie."""
    gain: Tensor | None = None
    """g, one number per filter, any shape of that many elements; None is 1."""
    offset: Tensor | None = None
    """b, likewise; None is 0."""


class Saved(NamedTuple):
    """What a kernel's forward keeps of a layer for its backward: a few numbers per filter."""

    kernel: str
    """The kernel that served."""
    kept: Any
    """The numbers, in that kernel's own form."""


Gradients = tuple["Tensor", "Tensor | None", "Tensor | None"]
"""Gradients of one layer's weight, gain and offset; None where there is no gain or offset."""
