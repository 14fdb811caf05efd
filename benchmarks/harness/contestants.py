"""Who takes part: one network, made ready in different ways from the same first weights."""

from __future__ import annotations

import warnings
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import filterwise as fw
from filterwise.lab.errors import UsageError
from harness import peers

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import nn

    from filterwise.kernel import Kernel

__all__ = ["CONTESTANTS", "Contestant", "chosen", "weight_layers", "weight_shapes"]


@dataclass(frozen=True)
class Contestant:
    """One way to make a network ready.

    Attributes:
        name: As it is asked for and as it stands in tables.
        about: What it is.
        make: Changes a network built with BatchNorm in place and returns it.
        deferred: Whether its training step runs each micro-batch inside ``fw.defer``.
        standardized: Whether it computes GN + WS, so that its outputs must agree with the others'.
    """

    name: str
    about: str
    make: Callable[[nn.Module], nn.Module]
    deferred: bool = False
    standardized: bool = False


def weight_layers(model: nn.Module) -> list[str]:
    """Return the dotted names of the layers that filterwise converts in a plain model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fw.FilterwiseWarning)
        return fw.plan(model, "keep+ws").converted


def weight_shapes(model: nn.Module) -> list[tuple[int, ...]]:
    """Return the shapes of those layers' weights."""
    parameters = dict(model.named_parameters())
    return [tuple(parameters[f"{name}.weight"].shape) for name in weight_layers(model)]


def _ours(recipe: str, kernel: Kernel = "auto") -> Callable[[nn.Module], nn.Module]:
    def make(model: nn.Module) -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", fw.FilterwiseWarning)
            fw.convert_(model, recipe, kernel=kernel)
            if recipe == "pws":
                # Without norms activations grow from branch to branch; these gains hold them. A
                # network without branches needs none and is refused.
                with suppress(fw.ConversionError):
                    fw.initialize_(model, "branch")
        return model

    return make


def _peer(name: str) -> Callable[[nn.Module], nn.Module]:
    def make(model: nn.Module) -> nn.Module:
        return peers.install(_ours("gn")(model), name, weight_layers(model))

    return make


def _as_it_is(model: nn.Module) -> nn.Module:
    return model


CONTESTANTS = {
    one.name: one
    for one in (
        Contestant("gn", "plain convolutions, GroupNorm", _ours("gn")),
        Contestant("gn-again", "the same network once more: its distance is noise", _ours("gn")),
        Contestant("bn", "plain convolutions, BatchNorm", _as_it_is),
        Contestant("bn-again", "the same network once more", _as_it_is),
        Contestant("none", "plain convolutions, no norm", _ours("none")),
        Contestant("ws", "filterwise gn+ws in fw.defer", _ours("gn+ws"), True, True),
        Contestant("ws-bare", "filterwise gn+ws without fw.defer", _ours("gn+ws"), False, True),
        Contestant(
            "ws-eager",
            "filterwise gn+ws in fw.defer, plain torch operations",
            _ours("gn+ws", "eager"),
            True,
            True,
        ),
        Contestant("official", "GN, the official code", _peer("official"), standardized=True),
        Contestant("timm", "GN, timm's StdConv2d", _peer("timm"), standardized=True),
        Contestant("composer", "GN, Composer's parametrization", _peer("composer"), False, True),
        Contestant("layer-norm", "GN, layer_norm on the weight", _peer("layer-norm"), False, True),
        Contestant("pws", "filterwise pws without norms, in fw.defer", _ours("pws"), True),
        Contestant("pws-bare", "the same without fw.defer", _ours("pws")),
    )
}
"""Contestants by name."""


def chosen(names: Sequence[str], baseline: str) -> list[Contestant]:
    """Return contestants by name, the baseline first.

    Raises:
        UsageError: If there is no such contestant.
    """
    for name in (baseline, *names):
        if name not in CONTESTANTS:
            raise UsageError(f"there is no contestant {name!r}. Known: {', '.join(CONTESTANTS)}.")
    return [CONTESTANTS[name] for name in dict.fromkeys((baseline, *names))]
