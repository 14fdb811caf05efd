"""Initial values for converted networks: raw weights, and what standardization moves to the gains.

A standardized weight does not see its own scale, so what an initialization says about the scale of
a layer is said by the layer's gain here.
"""

from __future__ import annotations

from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, Literal

from filterwise.initialize.branches import fixup, last_gains
from filterwise.initialize.data import from_data
from filterwise.initialize.raw import balanced, kaiming
from filterwise.initialize.start import Start

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from filterwise.report import Report

__all__ = ["Scheme", "initialize_"]

Scheme = Literal["kaiming", "balanced", "fixup", "skipinit", "branch", "data"]
"""The words for initializations."""

SCHEMES: dict[str, Callable[[Start, Any], None]] = {
    "kaiming": kaiming,
    "balanced": balanced,
    "fixup": fixup,
    "skipinit": lambda start, given: last_gains(start, given, "skipinit"),
    "branch": lambda start, given: last_gains(start, given, "branch"),
    "data": from_data,
}


def initialize_(model: nn.Module, scheme: Scheme, *, input: Any = None) -> Report:
    r"""Set initial values in place, all or nothing.

    ``kaiming``: raw weights of convolutions, linear and converted layers are drawn from a normal
    distribution of standard deviation :math:`\sqrt{2/n}`, with n the fan-in of a filter (of a
    transposed layer, too); gains go to their method's start, biases to 0.

    ``balanced``: raw filters whose weights all have one sign get random signs, magnitudes kept,
    until both occur. EquiNorm's single pass divides by 0 there.

    ``fixup``: on the L residual branches of m layers each, gains are the method's start times
    :math:`L^{-1/(2m-2)}` in the first m - 1 layers and 0 in the last; their biases are 0.

    ``skipinit``: the gain of each residual branch's last layer is 0. ``branch``: it is the method's
    start times :math:`1/\sqrt L`.

    ``data``: from one batch, layers in forward order, each after those before it are set. For
    ``pws`` one alpha a layer, so that the variance of its output is 2, and bias 0; for ``wn`` and
    ``cwn`` gains and biases, so that each output channel has mean 0 and standard deviation 1.

    Only ``kaiming`` and ``balanced`` draw random numbers and change raw weights; frozen ones they
    leave. Only ``data`` runs the model to set values, in its present mode.

    Args:
        model: A converted model; for ``kaiming`` and ``balanced`` any model.
        scheme: One of these words.
        input: A batch; a tuple holds positional arguments, a mapping named ones. ``data`` needs it;
            where a model cannot be traced symbolically, its branches are found by a run on it.

    Returns:
        A row for each weight layer, which tells what was set.

    Raises:
        ValueError: If the scheme is not one of these words.
        ConversionError: If the scheme does not apply; the model is as it was.

    Example:
        >>> from torch import nn
        >>> from filterwise import convert_
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
        >>> _ = convert_(model, "wa")
        >>> initialize_(model, "kaiming")[0].reason
        'raw weight normal with standard deviation sqrt(2/27), gain at its start, bias 0'

    Source: He et al., arXiv 1502.01852; Zhang et al., arXiv 1901.09321 (Fixup); De and Smith, arXiv
    2002.10444 (SkipInit); Salimans and Kingma, arXiv 1602.07868, section 3 (data); Defazio and
    Bottou, arXiv 1812.04549 (balanced).
    """
    if scheme not in SCHEMES:
        near = get_close_matches(str(scheme), SCHEMES, n=1)
        hint = f" Nearest: {near[0]!r}." if near else ""
        raise ValueError(f"unknown scheme {scheme!r}; there are {', '.join(SCHEMES)}.{hint}")
    start = Start(model)
    SCHEMES[scheme](start, input)
    start.commit()
    return start.report()
