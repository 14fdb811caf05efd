"""A run's folder: settings, checkpoint, weights and record, each whole at every moment."""

from __future__ import annotations

import io
import json
import pickle
from contextlib import contextmanager, suppress
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from filelock import FileLock, Timeout
from pydantic import ValidationError

from filterwise.lab.errors import LabError, UsageError, reason
from filterwise.lab.results import write_whole
from filterwise.lab.training.loop import Position
from filterwise.lab.training.record import TrainingRecord

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from torch import nn

    from filterwise.lab.training.settings import TrainingSettings

__all__ = ["RunFolder", "read_weights"]

FORMAT = 1


class RunFolder:
    """What a run keeps on disk.

    ::

        settings.json     what is trained here
        checkpoint.pt     where it stands; gone when it is finished
        model.pt          the weights at the end
        record.json       what came out; there if and only if the run is finished
        metrics.csv       the curve
        tensorboard/      the same, and the loss by step
    """

    def __init__(self, path: Path) -> None:
        """Name the folder; nothing is touched before `claim`."""
        self.path = path
        self.checkpoint = path / "checkpoint.pt"
        self.weights = path / "model.pt"
        self.record = path / "record.json"
        self.metrics = path / "metrics.csv"

    @contextmanager
    def claim(self, settings: TrainingSettings) -> Iterator[None]:
        """Hold the folder for a run.

        Raises:
            LabError: If it cannot be written, or another process is training in it.
            UsageError: If it belongs to a run of other settings.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.path / ".lock")
            lock.acquire(timeout=0)
        except Timeout:
            raise LabError(f"{self.path}: another process is training in it.") from None
        except OSError as error:
            raise LabError(f"{self.path} cannot be written to: {reason(error)}.") from None
        try:
            self._check_owner(settings)
            yield
        finally:
            lock.release()

    def _check_owner(self, settings: TrainingSettings) -> None:
        path = self.path / "settings.json"
        found = {"id": settings.identity, "settings": settings.model_dump(mode="json")}
        try:
            before = json.loads(path.read_bytes())["id"]
        except FileNotFoundError:
            before = settings.identity
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise LabError(
                f"{path} cannot be read: {reason(error)}. Name another folder, or empty this one."
            ) from None
        if before != settings.identity:
            raise UsageError(
                f"{self.path} belongs to a run of other settings (identity {before}, here"
                f" {settings.identity}). Name another folder, or empty this one."
            )
        write_whole(path, json.dumps(found, indent=1).encode())

    def finished(self) -> TrainingRecord | None:
        """Return the record of the run, if it is finished.

        Raises:
            LabError: If the file cannot be read.
        """
        try:
            return TrainingRecord.model_validate_json(self.record.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValidationError) as error:
            raise LabError(
                f"{self.record} cannot be read: {reason(error)}. Remove it to go on from the"
                " last checkpoint."
            ) from None

    def finish(self, record: TrainingRecord, model: nn.Module) -> None:
        """Write weights and record, and drop the checkpoint; killed in between, it is done again.

        Raises:
            LabError: If the disk refuses.
        """
        write_whole(self.weights, _bytes({"id": record.id, "model": _on_cpu(model)}))
        write_whole(self.record, record.model_dump_json(indent=1).encode())
        with suppress(OSError):
            self.checkpoint.unlink(missing_ok=True)

    def save(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        position: Position,
        more: dict[str, Any],
    ) -> None:
        """Write a checkpoint in place of the last one.

        Raises:
            LabError: If the disk refuses; the last one is as it was.
        """
        content = {
            "format": FORMAT,
            "position": asdict(position),
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "more": more,
        }
        write_whole(self.checkpoint, _bytes(content))

    def restore(
        self, model: nn.Module, optimizer: torch.optim.Optimizer
    ) -> tuple[Position, dict[str, Any]] | None:
        """Bring model and optimizer to the last checkpoint, if there is one.

        Raises:
            LabError: If it cannot be read or does not fit.
        """
        if not self.checkpoint.exists():
            return None
        try:
            content = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
            if content["format"] != FORMAT:
                raise ValueError(f"its format is {content['format']}, this program reads {FORMAT}")
            model.load_state_dict(content["model"])
            optimizer.load_state_dict(content["optimizer"])
            return Position(**content["position"]), content["more"]
        except (OSError, RuntimeError, ValueError, KeyError, TypeError, EOFError) as error:
            raise _unreadable(self.checkpoint, error, "Remove it to start the run anew.") from None
        except pickle.UnpicklingError as error:
            raise _unreadable(self.checkpoint, error, "Remove it to start the run anew.") from None


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Return the weights that a finished run left in its folder.

    Raises:
        UsageError: If there are none.
        LabError: If they cannot be read.
    """
    weights = RunFolder(path).weights
    if not weights.exists():
        raise UsageError(f"{path} has no {weights.name}: it is not the folder of a finished run.")
    try:
        return torch.load(weights, map_location="cpu", weights_only=True)["model"]
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, EOFError) as error:
        raise _unreadable(weights, error, "Train that run again.") from None
    except pickle.UnpicklingError as error:
        raise _unreadable(weights, error, "Train that run again.") from None


def _unreadable(path: Path, error: Exception, remedy: str) -> LabError:
    return LabError(f"{path} cannot be read: {reason(error)[:300]}. {remedy}")


def _on_cpu(model: nn.Module) -> dict[str, Any]:
    # Its own mapping, which carries the metadata of converted layers.
    state = model.state_dict()
    for name, value in state.items():
        if isinstance(value, torch.Tensor):
            state[name] = value.cpu()
    return state


def _bytes(content: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()
