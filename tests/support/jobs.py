"""Small real jobs of a reproduction, for tests of who does them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from filterwise.lab.reproduce.jobs import Job
from filterwise.lab.reproduce.records import LineFacts
from filterwise.lab.training.settings import checked_training

if TYPE_CHECKING:
    from pathlib import Path

FACTS = LineFacts(
    recipe="toy/table1",
    recipe_sha256="0" * 64,
    row="GN",
    budget="smoke",
    shrunk={"optimization.epochs": (300, 3)},
)


def digits_job(folder: Path, *, seed: int = 0, epochs: int = 3, **optimization: Any) -> Job:
    """Make a job on the digits, with a checkpoint after each epoch."""
    settings = checked_training(
        {
            "data": {"name": "digits", "train_samples": 256, "test_samples": 128},
            "model": {"name": "plain", "recipe": "gn+ws"},
            "optimization": {"epochs": epochs, "step_size": 32} | optimization,
            "seed": seed,
        }
    )
    return Job(settings, folder, FACTS)
