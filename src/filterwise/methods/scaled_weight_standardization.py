"""Scaled Weight Standardization (Brock et al. 2021; NFNets)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from filterwise.kernel import Family
from filterwise.methods import options
from filterwise.methods.activation_gain import activation_gain
from filterwise.methods.method import WeightMethod

__all__ = ["ScaledWeightStandardization"]


@dataclass(frozen=True)
class ScaledWeightStandardization(WeightMethod):
    r"""Every filter centred and brought to the norm that keeps the variance through an activation.

    .. math:: \hat W = g\,\gamma\,\frac{W - \mu}{\sqrt{\max(n V, \epsilon)}}

    with the learnable gain g per filter, starting at 1, and
    :math:`\gamma = \mathrm{Var}[\phi(z)]^{-1/2}` of the activation before the layer, z a
    standard normal. No activation norm is needed.

    Attributes:
        activation: The activation before the layers (one for all of them): identity, relu,
            leaky_relu, leaky_relu_SLOPE, prelu, relu6, relu_squared, elu, celu, selu, gelu,
            gelu_tanh, silu, mish, hardswish, softplus, logsigmoid, sigmoid, hardsigmoid, tanh,
            hardtanh, softsign. Or gamma itself, a number > 0.
        public: Take the constants of published code instead of the exact ones.
        eps: Floor of n V (``floor=True``), or number added to V inside the root.
        floor: Which of the two.
        ddof: 1 divides the sum of squares by n - 1.

    Raises:
        ValueError: If an option is out of range, or the activation has no public constant.

    Source: Brock, De, Smith, arXiv 2101.08692, Eq. 3; Brock et al., *High-performance large-scale
    image recognition without normalization*, arXiv 2102.06171.
    """

    name: ClassVar = "sws"
    title: ClassVar = "Scaled Weight Standardization"
    source: ClassVar = "Brock et al. 2021, arXiv 2101.08692, Eq. 3"
    formula: ClassVar = "gain * gamma_activation * (W - mean) / sqrt(max(n * var, eps))"
    presets: ClassVar = {
        "deepmind": {"activation": "identity"},
        "timm": {"public": True, "eps": 1e-5, "floor": False},
        "nfnets_pytorch": {"activation": "identity", "ddof": 1},
    }

    activation: str | float = "relu"
    public: bool = False
    eps: float = 1e-4
    floor: bool = True
    ddof: Literal[0, 1] = 0

    def __post_init__(self) -> None:
        """Check the options."""
        options.flag("public", self.public)
        options.flag("floor", self.floor)
        object.__setattr__(self, "eps", options.number("eps", self.eps))
        options.choice("ddof", self.ddof, (0, 1))
        if isinstance(self.activation, str):
            activation_gain(self.activation, public=self.public)
        else:
            gamma = options.number("activation", self.activation, above=True)
            object.__setattr__(self, "activation", gamma)

    @property
    def has_gain(self) -> bool:
        """There is always a gain."""
        return True

    def family(self, fan_in: int) -> Family:
        """Return the method's place in the family for filters of `fan_in` weights."""
        gamma = self.activation
        if isinstance(gamma, str):
            gamma = activation_gain(gamma, public=self.public)
        return Family(
            scale="max" if self.floor else "root",
            eps=self.eps / fan_in if self.floor else self.eps,
            constant=gamma / math.sqrt(fan_in),
            ddof=self.ddof,
        )
