"""Random draws that depend on where a run stands, and on nothing that went before."""

from __future__ import annotations

import hashlib
import random

import numpy
import torch

__all__ = ["generator", "seed_everything", "seed_of"]


def seed_of(*words: int | str) -> int:
    """Return a seed that belongs to these words alone, from 0 to 2**63 - 1.

    What is drawn under ``seed_of(run's seed, "crop", step)`` is the same after a resumption and
    with any number of processes or data workers.
    """
    digest = hashlib.sha256(repr(words).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator(*words: int | str) -> torch.Generator:
    """Return a generator on the CPU under `seed_of` these words."""
    return torch.Generator().manual_seed(seed_of(*words))


def seed_everything(*words: int | str) -> None:
    """Seed the global generators of torch (all devices), numpy and Python."""
    seed = seed_of(*words)
    torch.manual_seed(seed)
    numpy.random.seed(seed % 2**32)
    random.seed(seed)
