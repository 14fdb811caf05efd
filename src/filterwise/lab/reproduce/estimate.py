"""What a run will cost: time and memory, from the network's size. Rough, and said to be.

A picture costs 6 floating-point operations for each multiply-add of a forward in training (2 for
the forward, 4 for the backward) and 2 in evaluation. `SPEEDS` holds the rates that this is divided
by; where networks are small, what counts is the number of their layers instead.
"""

from __future__ import annotations

import math
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from filterwise.lab.errors import LabError
from filterwise.lab.nets import make
from filterwise.lab.reproduce.budgets import SIZES
from filterwise.lab.settings import cores

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from filterwise.lab.training.settings import TrainingSettings

__all__ = ["Footprint", "footprint", "memory_of", "readable", "seconds_of", "side_by_side"]

CLASSES = {"cifar100": 100, "imagenet": 1000, "office31": 31}
PROCESS = 700e6
"""Bytes of a process that has loaded torch and its libraries."""


class Speed(NamedTuple):
    """How fast a device is.

    Attributes:
        many: Operations a second with many pictures at once.
        some: With fewer than `few`.
        single: With one.
        few: So many pictures at once are not many.
        layer: Seconds that a weight layer takes in a pass, however small it is.
    """

    many: float
    some: float
    single: float
    few: int
    layer: float


CPU_CORE = Speed(75e9, 50e9, 30e9, 8, 4e-4)
"""One core of a server, float32."""
GPU_SMALL = Speed(40e12, 25e12, 25e12, 128, 5e-5)
"""One large GPU (H100), bf16, channels_last, compiled, pictures of 32 pixels."""
GPU_LARGE = Speed(80e12, 25e12, 25e12, 32, 5e-5)
"""The same from 224 pixels on."""


class Footprint(NamedTuple):
    """A network, counted in one forward of one picture.

    Attributes:
        operations: Multiply-adds.
        activations: Numbers that its layers put out.
        parameters: Of all layers.
        layers: Weight layers.
    """

    operations: int
    activations: int
    parameters: int
    layers: int


@lru_cache(maxsize=64)
def footprint(name: str, width: float, channels: int, classes: int, side: int) -> Footprint:
    """Count a network on the meta device, where nothing is computed.

    Raises:
        UsageError: If there is no such network.
        LabError: If it cannot be counted so.
    """
    from torch.utils.flop_counter import FlopCounterMode

    sizes: list[int] = []
    with torch.device("meta"):
        model = make(name, channels, classes, width).eval()
        picture = torch.empty(1, channels, side, side)
    leaves = [module for module in model.modules() if not any(module.children())]
    for leaf in leaves:
        leaf.register_forward_hook(_counter(sizes))
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(picture)
    except (RuntimeError, NotImplementedError) as error:
        raise LabError(f"{name} cannot be counted: {error}") from None
    layers = sum(isinstance(leaf, nn.Conv2d | nn.Linear) for leaf in leaves)
    parameters = sum(each.numel() for each in model.parameters())
    return Footprint(counter.get_total_flops() // 2, sum(sizes), parameters, layers)


def _counter(sizes: list[int]) -> Callable[..., None]:
    def count(_module: nn.Module, _inputs: object, output: object) -> None:
        if isinstance(output, torch.Tensor):
            sizes.append(output.numel())

    return count


def _of(settings: TrainingSettings) -> tuple[Footprint, int] | None:
    """Return a run's network and the side of its pictures; None for other tasks."""
    if settings.task != "classification":
        return None
    data = settings.data
    name = data.name.lower()
    digits = name == "digits"
    side = data.augmentation.crop or (8 if digits else data.size)
    classes = CLASSES.get(name.partition("/")[0], 10)
    model = settings.model
    return footprint(model.name, model.width, 1 if digits else 3, classes, side), side


def seconds_of(settings: TrainingSettings) -> float | None:
    """Return about how long a run takes on its device; None where nothing is known of it."""
    found = _of(settings)
    data, optimization = settings.data, settings.optimization
    sizes = SIZES.get(data.name.lower())
    if found is None or (sizes is None and data.train_samples is None):
        return None
    network, side = found
    train, test = sizes or (0, 0)
    train, test = data.train_samples or train, data.test_samples or test
    at_once = min(optimization.micro_batch or optimization.step_size, train)
    speed = CPU_CORE
    if torch.device(settings.execution.device).type == "cuda":
        speed = GPU_LARGE if side >= 224 else GPU_SMALL
    rate = speed.single if at_once == 1 else speed.some if at_once < speed.few else speed.many
    passes = math.ceil(train / at_once)
    training = max(6 * network.operations * train / rate, passes * network.layers * speed.layer)
    testing = 2 * network.operations * test / speed.many
    evaluations = optimization.epochs / settings.evaluate_every
    return optimization.epochs * training + evaluations * testing


def memory_of(settings: TrainingSettings) -> float:
    """Return about how many bytes a run needs: process, data, activations, weights."""
    found = _of(settings)
    if found is None:
        return 2 * PROCESS
    network, side = found
    data, optimization = settings.data, settings.optimization
    sizes = SIZES.get(data.name.lower(), (0, 0))
    pictures = 0 if data.streamed else sum(sizes) * 3 * min(side, 64) ** 2
    at_once = optimization.micro_batch or optimization.step_size
    # Kept for the backward: each output and what the norm or the ReLU after it needs.
    activations = 4 * 2 * at_once * network.activations
    # Raw weight, gradient, momentum, effective weight and its gradient.
    return PROCESS + 2 * pictures + activations + 4 * 5 * network.parameters


def readable(seconds: float) -> str:
    """Return a time as a person would say it."""
    for unit, length in (("days", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.{1 if seconds < 10 * length else 0}f} {unit}"
    return f"{seconds:.0f} s"


def free_memory() -> float:
    """Return how many bytes can be had: of the machine, and of a container around the process."""
    import psutil

    found = float(psutil.virtual_memory().available)
    group = Path("/sys/fs/cgroup")
    try:
        limit = int((group / "memory.max").read_text())
        return min(found, limit - int((group / "memory.current").read_text()))
    except (OSError, ValueError):
        # No such container, or one without a limit.
        return found


def side_by_side(runs: Sequence[TrainingSettings]) -> int:
    """Return how many of some runs fit beside each other: a core for each, and memory for all."""
    need = max((memory_of(run) for run in runs), default=PROCESS)
    if runs and torch.device(runs[0].execution.device).type == "cuda":
        return 1
    return max(1, min(cores(), len(runs), int(0.8 * free_memory() / need)))
