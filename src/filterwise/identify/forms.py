"""What a formula found by probing is called, whose it is, and which method computes it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from filterwise.identify.constants import activation_of, same, written
from filterwise.methods.method import Method, MethodInfo
from filterwise.methods.parametric_weight_standardization import ParametricWeightStandardization
from filterwise.methods.scaled_weight_standardization import ScaledWeightStandardization
from filterwise.methods.weight_centering import WeightCentering
from filterwise.methods.weight_normalization import WeightNormalization
from filterwise.methods.weight_standardization import WeightStandardization

if TYPE_CHECKING:
    from filterwise.identify.fit import Fit

__all__ = ["Match", "info_of", "named"]


@dataclass(frozen=True)
class Match:
    """Whose formula a layer computes.

    Attributes:
        info: The formula, as `identify` returns it; None if nobody published it.
        method: The method that computes it; None if no method does.
        fault: What is wrong with the formula, or special about it; empty if nothing is.
    """

    info: MethodInfo | None = None
    method: Method | None = None
    fault: str = "no published formula has its factor"


PUBLISHED = {
    "official": "the Weight Standardization authors' PyTorch code",
    "mmcv": "mmcv ConvWS2d",
    "bcn": "the BCN authors' code",
    "mmcv_aws": "mmcv ConvAWS2d",
    "vit_hybrid": "the ViT hybrid",
    "bit": "Big Transfer, Composer",
    "timm": "timm's default",
    "timm_bit": "timm's and transformers' BiT",
    "deepmind": "DeepMind's NFNets",
    "nfnets_pytorch": "nfnets-pytorch WSConv2d",
    "public": "the PWS authors' code",
    "public_tf": "the PWS authors' TensorFlow code",
}
"""Whose formula each preset is."""


def named(fit: Fit, *, has_gain: bool, has_offset: bool) -> Match:
    """Return what a fitted formula is; one that nobody published has neither name nor method."""
    length = fit.constant * math.sqrt(fit.fan_in)
    if not fit.centred:
        return _uncentred(fit, length, has_gain=has_gain)
    if fit.form in WRONG:
        return _wrong(fit)
    if fit.form == "none":
        method = WeightCentering()
        return Match(info_of(method), method, "") if same(fit.constant, 1.0) else Match()
    if same(fit.constant, 1.0):
        return _unit(fit)
    if has_gain and not has_offset:
        return _scaled(fit, length)
    return Match()


def _unit(fit: Fit) -> Match:
    if fit.form == "max":
        info = MethodInfo(
            "ws",
            "Weight Standardization with a floor",
            "denoising-diffusion-pytorch",
            "(W - mean) / sqrt(max(var, eps))",
            True,
            {"eps": fit.eps},
        )
        return Match(info, None, "its eps is a floor of the variance, which ws does not have")
    method = WeightStandardization(
        eps=fit.eps, eps_inside=fit.form == "root", ddof=1 if fit.unbiased else 0
    )
    return Match(info_of(method), method, "")


def _scaled(fit: Fit, length: float) -> Match:
    if same(length, math.sqrt(2.0)) and fit.form == "root" and not fit.unbiased:
        method: Method = ParametricWeightStandardization(gamma=fit.eps)
        return Match(info_of(method), method, "")
    if fit.form == "outside":
        return _outside(fit, length)
    floor = fit.form == "max"
    counted = same(length, fit.filters**-0.5) and fit.filters > 1
    method = ScaledWeightStandardization(
        eps=written(fit.eps * fit.fan_in) if floor else fit.eps,
        floor=floor,
        ddof=1 if fit.unbiased else 0,
        **(activation_of(length) or {"activation": written(length)}),
    )
    info, fault = info_of(method), ""
    if counted:
        fault = "its fan-in counts the filters too, so that they are sqrt(filters) too small"
        formula = "gain * (W - mean) / sqrt(max(filters * n * var, eps))"
        source = "nfnets-pytorch WSConv1d (and other layers of its releases)"
        info = replace(info, formula=formula, source=source)
    return Match(info, method, fault)


def _outside(fit: Fit, length: float) -> Match:
    eps, formula = fit.eps, "gain * gamma * (W - mean) / (sqrt(n) * (std + eps))"
    name, title = "sws", "Scaled Weight Standardization with eps outside the root"
    source = "nfnets-pytorch ScaledStdConv2d; timm before June 2021"
    if same(length, 1.0) and eps != float(f"{eps:.3g}"):
        eps, formula = (
            written(eps * math.sqrt(fit.fan_in)),
            "gain * (W - mean) / (|W - mean| + eps)",
        )
        name, title = "cwn", "Centered Weight Normalization with eps added to the norm"
        source = "CenteredWN's PyTorch module"
    info = MethodInfo(name, title, source, formula, False, {"eps": eps})
    return Match(info, None, f"its eps is added to the divisor, which {name} does not have")


def _uncentred(fit: Fit, length: float, *, has_gain: bool) -> Match:
    if has_gain and fit.form == "root" and fit.eps == 0 and same(length, 1.0):
        method = WeightNormalization()
        return Match(info_of(method), method, "")
    if same(fit.constant, 1.0) and fit.form in ("root", "outside"):
        method = WeightStandardization(eps=fit.eps, eps_inside=fit.form == "root", centre=False)
        return Match(info_of(method), method, "")
    return Match()


WRONG = {
    "inverted": (
        "Weight Standardization, inverted",
        "the annotated diffusion blog until November 2024, and copies of it",
        "(W - mean) * sqrt(var + eps)",
        "it multiplies by the standard deviation in place of dividing by it",
    ),
    "variance": (
        "Weight Standardization by the variance",
        "GroupNorm-reproduce",
        "(W - mean) / (var + eps)",
        "it divides by the variance in place of the standard deviation",
    ),
}


def _wrong(fit: Fit) -> Match:
    title, source, formula, fault = WRONG[fit.form]
    return Match(MethodInfo("ws", title, source, formula, True, {"eps": fit.eps}), None, fault)


def info_of(method: Method) -> MethodInfo:
    """Return a method's row with these options, and whose published formula it is."""
    row = type(method).info()
    whose = [PUBLISHED[name] for name in _presets(method) if name in PUBLISHED]
    source = f"{row.source}; as in {', '.join(whose)}" if whose else row.source
    return MethodInfo(
        row.name, row.title, source, row.formula, row.needs_norm, method.all_options()
    )


def _presets(method: Method) -> list[str]:
    """Return the presets that a method is, whatever the activation that it follows."""
    own = method.all_options()
    follows = {"activation", "public"} if method.name == "sws" and own["eps"] == 1e-5 else set()
    found = []
    for name, options in method.presets.items():
        other = type(method)(**options).all_options()
        if all(own[key] == other[key] for key in own if key not in follows):
            found.append(name)
    return found
