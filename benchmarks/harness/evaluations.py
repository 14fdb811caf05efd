"""Evaluation forwards, side by side: plain, folded, converted, and each peer."""

from __future__ import annotations

import warnings
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch

import filterwise as fw
from filterwise.lab.errors import LabError
from harness.contestants import CONTESTANTS
from harness.timing import clocked, interleaved, ratios, spread, warmed_up

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Sequence

    from torch import nn

    from harness.nets import Net
    from harness.timing import Rounds

__all__ = ["WAYS", "measured"]


def _of(name: str) -> Callable[[Net], nn.Module]:
    return lambda net: CONTESTANTS[name].make(net.build()).eval()


def _folded(net: Net) -> nn.Module:
    return fw.fold(_of("ws")(net))


def _recomputed(name: str) -> Callable[[Net], nn.Module]:
    def make(net: Net) -> nn.Module:
        model = _of(name)(net)
        fw.keep_weights(model, False)
        return model

    return make


WAYS: dict[str, tuple[str, Callable[[Net], nn.Module]]] = {
    "plain": ("plain convolutions, GroupNorm", _of("gn")),
    "plain-again": ("the same network once more: its distance is noise", _of("gn")),
    "folded": ("filterwise gn+ws, folded", _folded),
    "kept": ("filterwise gn+ws, weights kept between forwards", _of("ws")),
    "recomputed": ("filterwise gn+ws, keeping switched off", _recomputed("ws")),
    "recomputed-eager": ("the same in plain torch operations", _recomputed("ws-eager")),
    "official": ("GN, the official code", _of("official")),
    "timm": ("GN, timm's StdConv2d", _of("timm")),
    "composer": ("GN, Composer's parametrization", _of("composer")),
    "layer-norm": ("GN, layer_norm on the weight", _of("layer-norm")),
    "bn": ("plain convolutions, BatchNorm", _of("bn")),
}
"""By name: what it is, and what makes the network ready from its plain form with BatchNorm."""


def measured(
    net: Net,
    batch: int,
    ways: Sequence[str],
    asked: argparse.Namespace,
    rounds: Rounds,
    advance: Callable[[float], None] = lambda _: None,
) -> list[dict[str, Any]]:
    """Return a row for each way."""
    device = torch.device(asked.device)
    pictures, _ = net.data(batch, asked.size, device)
    autocast = torch.autocast(device.type, dtype=torch.bfloat16, enabled=asked.autocast)
    works: dict[str, Callable[[], torch.Tensor]] = {}
    for way in ways:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", fw.FilterwiseWarning)
            model = WAYS[way][1](net).to(device)
        works[way] = _forward(torch.compile(model) if asked.compile else model, pictures, autocast)
    _check_agreement(works)
    turns = {way: clocked(work, device) for way, work in works.items()}
    warmed_up(turns)
    times = interleaved(turns, rounds, advance)
    return [
        {
            "net": net.name,
            "size": asked.size or net.size,
            "batch": batch,
            "contestant": way,
            "milliseconds": 1e3 * spread(times[way]).median,
            "ratio": asdict(spread(ratios(times[way], times["plain"]))),
            "seconds": [round(value, 7) for value in times[way]],
        }
        for way in ways
    ]


def _forward(
    model: Callable[..., torch.Tensor], pictures: torch.Tensor, autocast: torch.autocast
) -> Callable[[], torch.Tensor]:
    def forward() -> torch.Tensor:
        with torch.inference_mode(), autocast:
            return model(pictures)

    return forward


def _check_agreement(works: dict[str, Callable[[], torch.Tensor]]) -> None:
    """Compare outputs of all forms before any timing: they differ by eps and divisor alone."""
    reference: torch.Tensor | None = None
    for way, work in works.items():
        if way in ("plain", "plain-again", "bn"):
            continue
        found = work().double()
        if reference is None:
            reference = found
        difference = float((found - reference).abs().max() / reference.abs().max())
        if not difference <= 0.05:
            raise LabError(f"{way} computes another network: outputs differ by {difference:.3g}.")
