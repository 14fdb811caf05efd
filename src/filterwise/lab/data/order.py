"""Whose turn it is: the order of an epoch, the shares of processes, subsets."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from filterwise.lab.errors import UsageError
from filterwise.lab.training.seeds import generator

if TYPE_CHECKING:
    from lightning_fabric import Fabric
    from torch import Tensor

    from filterwise.lab.training.settings import TrainingSettings

__all__ = ["order_of", "share_of", "some", "steps_in"]


def steps_in(samples: int, settings: TrainingSettings) -> tuple[int, int]:
    """Return how many samples a step has, and how many steps an epoch."""
    optimization = settings.optimization
    size = min(optimization.step_size, samples)
    left_over = samples % size if optimization.ragged == "keep" else 0
    return size, samples // size + bool(left_over)


def order_of(samples: int, seed: int, epoch: int) -> Tensor:
    """Return the order of an epoch's samples, the same in every process."""
    return torch.randperm(samples, generator=generator(seed, "order", epoch))


def share_of(samples: int, fabric: Fabric) -> slice:
    """Return which of some samples are this process's.

    Raises:
        UsageError: If there is not one sample for every process.
    """
    processes, rank = fabric.world_size, fabric.global_rank
    if samples < processes:
        raise UsageError(
            f"{processes} processes cannot share a step of {samples} samples. Start fewer, or leave"
            " the ragged last step out (optimization.ragged: drop)."
        )
    return slice(samples * rank // processes, samples * (rank + 1) // processes)


def some(samples: int, wanted: int | None, half: str) -> Tensor:
    """Return which samples are used, the same ones whatever the run's seed.

    Raises:
        UsageError: If there are not so many.
    """
    if wanted is None:
        return torch.arange(samples)
    if wanted > samples:
        raise UsageError(f"data.{half}_samples is {wanted}, and there are {samples}.")
    chosen = torch.randperm(samples, generator=generator("subset", half))[:wanted]
    return chosen.sort().values
