"""A run's network: built, started, converted and given its first values, as its settings say."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

import filterwise as fw
from filterwise import host
from filterwise.filters import weight_name
from filterwise.lab import nets
from filterwise.lab.errors import UsageError
from filterwise.lab.training import starts
from filterwise.lab.training.norms import change_norms

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

    from filterwise.lab.training.settings import Execution, ModelSettings

__all__ = ["Built", "build_model"]

DEVIATION = 0.05
"""Of raw weights in Salimans and Kingma, arXiv 1602.07868, section 3."""


class Built(NamedTuple):
    """A network in training mode, on the CPU.

    Attributes:
        model: The network.
        report: Of its conversion.
        facts: What the record says of it.
    """

    model: nn.Module
    report: fw.Report
    facts: dict[str, Any]


def build_model(
    settings: ModelSettings,
    channels: int,
    classes: int,
    execution: Execution,
    example: Callable[[], Tensor],
) -> Built:
    """Build a run's network, whose random draws are of torch's global generator.

    Args:
        settings: What it is.
        channels: Of the pictures.
        classes: Number of logits.
        execution: Where the runs lie that it may start from.
        example: Gives a micro-batch, for an initialization from data.

    Raises:
        UsageError: If there is no such network or start, or they do not fit each other.
        LabError: If a file is broken.
        ConversionError: If the recipe or the initialization does not fit the network.
    """
    source = None if settings.start is None else starts.read(settings, execution)
    model = nets.make(settings.name, channels, classes, settings.width)
    facts: dict[str, Any] = {}
    if source is not None:
        facts["start"] = source.facts
    if source is not None and not source.last:
        nets.convert(model, source.recipe)
        starts.fill(model, source)
    options: dict[str, Any] = {"preserve": settings.preserve, "exclude": settings.exclude or None}
    if settings.select is not None:
        options["select"] = settings.select
    report = nets.convert(model, settings.recipe, **options)
    if source is None:
        _initialize(model, settings, example)
    model = change_norms(model, settings.norms)
    if source is not None and source.last:
        starts.fill(model, source)
    facts["conversion"] = report.summary
    return Built(model.train(), report, facts)


def _initialize(model: nn.Module, settings: ModelSettings, example: Callable[[], Tensor]) -> None:
    scheme = settings.initialization
    if scheme == "own":
        nets.first_gains(model, settings.name, settings.recipe)
    elif scheme == "unit-gains":
        _draw_for_unit_gains(model)
    else:
        given = {"input": example()} if scheme == "data" else {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", fw.FilterwiseWarning)
            fw.initialize_(model.train(), scheme, **given)


@torch.no_grad()
def _draw_for_unit_gains(model: nn.Module) -> None:
    layers = [module for module in model.modules() if host.is_converted(module)]
    if not layers:
        raise UsageError("model.initialization: unit-gains is for converted layers, and none is.")
    for layer in layers:
        name = host.state_of(layer).parameter
        if weight_name(layer) != name:
            continue
        getattr(layer, name).normal_(0.0, DEVIATION)
        for values, first in ((host.gain_of(layer), 1.0), (layer._parameters.get("bias"), 0.0)):
            if values is not None:
                values.fill_(first)
