"""Small training runs for tests."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from filterwise.lab.training.settings import checked_training
from filterwise.lab.training.train import train

if TYPE_CHECKING:
    from filterwise.lab.training.settings import TrainingSettings


def settings(**changes: Any) -> TrainingSettings:
    """Make settings of a short run on digits; what is given is merged into it."""
    values: dict[str, Any] = {
        "data": {"train_samples": 150, "test_samples": 100},
        "model": {"recipe": "gn+ws"},
        "optimization": {"epochs": 2, "step_size": 32, "micro_batch": 12, "ragged": "keep"},
    }
    for key, value in changes.items():
        values[key] = values[key] | value if isinstance(value, dict) and key in values else value
    return checked_training(values)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Return the weights that a finished run left."""
    return torch.load(folder / "model.pt", weights_only=True)["model"]


def main() -> None:
    """Train what the first argument says as JSON in the folder that the second names."""
    torch.set_num_threads(1)
    train(checked_training(json.loads(sys.argv[1])), Path(sys.argv[2]))


if __name__ == "__main__":
    main()
