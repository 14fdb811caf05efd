r"""The gain that undoes what an activation does to a unit normal signal's variance.

.. math:: \gamma = 1 / \sqrt{\mathrm{Var}[\phi(z)]}, \quad z \sim N(0, 1)

computed here by quadrature (specification, 5.3); the constants of published code are sample
estimates, up to 9e-4 off, and are kept for published checkpoints only.
"""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

__all__ = ["ACTIVATIONS", "PUBLIC_GAINS", "activation_gain"]

ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], tuple[float, ...]]] = {
    "identity": (lambda z: z, ()),
    "relu": (functional.relu, (0.0,)),
    "leaky_relu": (functional.leaky_relu, (0.0,)),
    "prelu": (lambda z: functional.leaky_relu(z, 0.25), (0.0,)),
    "relu6": (functional.relu6, (0.0, 6.0)),
    "relu_squared": (lambda z: functional.relu(z).square(), (0.0,)),
    "elu": (functional.elu, (0.0,)),
    "celu": (functional.celu, (0.0,)),
    "selu": (functional.selu, (0.0,)),
    "gelu": (functional.gelu, ()),
    "gelu_tanh": (lambda z: functional.gelu(z, approximate="tanh"), ()),
    "silu": (functional.silu, ()),
    "mish": (functional.mish, ()),
    "hardswish": (functional.hardswish, (-3.0, 3.0)),
    "softplus": (functional.softplus, ()),
    "logsigmoid": (functional.logsigmoid, ()),
    "sigmoid": (torch.sigmoid, ()),
    "hardsigmoid": (functional.hardsigmoid, (-3.0, 3.0)),
    "tanh": (torch.tanh, ()),
    "hardtanh": (functional.hardtanh, (-1.0, 1.0)),
    "softsign": (functional.softsign, (0.0,)),
}
"""Name to function and the points where it has a kink."""

PUBLIC_GAINS = {
    "identity": 1.0,
    "relu": 1.7139588594436646,
    "leaky_relu": 1.70590341091156,
    "relu6": 1.7131484746932983,
    "elu": 1.2716004848480225,
    "celu": 1.270926833152771,
    "selu": 1.0008515119552612,
    "gelu": 1.7015043497085571,
    "silu": 1.7881293296813965,
    "softplus": 1.9203323125839233,
    "logsigmoid": 1.9193484783172607,
    "sigmoid": 4.803835391998291,
    "tanh": 1.5939117670059204,
    "softsign": 2.338853120803833,
}
"""Constants of published code (DeepMind's nfnets, timm), to their last digit."""

LEAKY = "leaky_relu_"
REACH = 14.0  # standard deviations; beyond, the normal density is below 1e-43
POINTS = 40_001  # per smooth piece: Simpson's error is far below float64's rounding of the sum


def _function(activation: str) -> tuple[Callable[[Tensor], Tensor], tuple[float, ...]] | None:
    if activation in ACTIVATIONS:
        return ACTIVATIONS[activation]
    try:
        slope = float(activation.removeprefix(LEAKY))
    except ValueError:
        return None
    if not activation.startswith(LEAKY) or not math.isfinite(slope):
        return None
    return lambda z: functional.leaky_relu(z, slope), (0.0,)


# A plain dictionary, since a compiler would trace the quadrature through functools.cache.
_KNOWN: dict[tuple[str, bool], float] = {}


def activation_gain(activation: str, *, public: bool = False) -> float:
    """Return the gain of an activation by name, or ``leaky_relu_SLOPE``.

    Args:
        activation: A key of `ACTIVATIONS`, or ``"leaky_relu_0.2"`` with any slope.
        public: Take the constant of published code instead of the exact one.

    Raises:
        ValueError: If the activation is not known, or has no published constant.

    Source: Brock, De, Smith, *Characterizing signal propagation to close the performance gap in
    unnormalized ResNets*, arXiv 2101.08692, section 4; constants: specification, 5.3.
    """
    key = (activation, public)
    if key not in _KNOWN:
        _KNOWN[key] = _published(activation) if public else _computed(activation)
    return _KNOWN[key]


def _known(activation: str) -> tuple[Callable[[Tensor], Tensor], tuple[float, ...]]:
    found = _function(activation)
    if found is None:
        names = ", ".join(ACTIVATIONS)
        raise ValueError(f"activation must be one of {names}, {LEAKY}SLOPE, got {activation!r}")
    return found


def _published(activation: str) -> float:
    _known(activation)
    if activation not in PUBLIC_GAINS:
        names = ", ".join(PUBLIC_GAINS)
        raise ValueError(f"activation {activation!r} has no public constant; these have: {names}")
    return PUBLIC_GAINS[activation]


def _computed(activation: str) -> float:
    function, kinks = _known(activation)
    ends = [-REACH, *kinks, REACH]
    first = second = 0.0
    with torch.inference_mode(False), torch.no_grad():
        for low, high in itertools.pairwise(ends):
            z = torch.linspace(low, high, POINTS, dtype=torch.float64, device="cpu")
            weight = torch.full_like(z, 2.0)
            weight[1::2] = 4.0
            weight[0] = weight[-1] = 1.0
            weight *= (high - low) / (POINTS - 1) / 3.0 / math.sqrt(2.0 * math.pi)
            weight *= torch.exp(-0.5 * z * z)
            value = function(z)
            first += float((weight * value).sum())
            second += float((weight * value * value).sum())
    return 1.0 / math.sqrt(second - first * first)
