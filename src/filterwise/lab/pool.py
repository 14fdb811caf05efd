"""Who trains when: several processes with one thread each, one run after the other."""

from __future__ import annotations

import tempfile
import time
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from filterwise.lab.data import load_tensors, save_tensors
from filterwise.lab.engine import Stopped, train
from filterwise.lab.errors import LabError, reason
from filterwise.lab.hardware import hardware, versions
from filterwise.lab.processes import work_through
from filterwise.lab.results import Record, Results, record_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from filterwise.lab.data import PictureSet
    from filterwise.lab.settings import RunSettings

__all__ = ["expected_work", "train_all"]

# What one forward and backward pass costs, in units of one picture's share: Python and launches
# weigh as much as this many pictures. Only the estimate of the time left depends on it.
PASS_COST = 4.0
DEEP = {"residual": 3.0}


def expected_work(settings: RunSettings, pictures: int) -> float:
    """Return how long a run takes compared with others, for ordering and the progress bar."""
    passes = -(-pictures // settings.micro_batch)
    return settings.epochs * (pictures + PASS_COST * passes) * DEEP.get(settings.net, 1.0)


def train_all(
    runs: Sequence[RunSettings],
    data: PictureSet,
    results: Results,
    *,
    device: str,
    processes: int,
    finished: Callable[[RunSettings], None],
) -> None:
    """Train runs and add each to the results as it finishes.

    Runs that another command is training on the same folder are waited for at the end.

    Args:
        runs: What to train, in the order to start them.
        data: The pictures of all of them.
        results: Where to.
        device: Where each is trained.
        processes: How many at a time.
        finished: Called after each run.

    Raises:
        LabError: If a run fails or the disk refuses; what finished is in the results.
        KeyboardInterrupt: Passed on after the processes have stopped.
    """
    if not runs:
        return
    with _shared(data) as path:
        work_through(
            runs,
            _train_one,
            start=_start_process,
            arguments=(path, results, device),
            processes=processes,
            finished=lambda run, _done: finished(run),
        )


@contextmanager
def _shared(data: PictureSet) -> Iterator[Path]:
    """Put the pictures where every process reads them without decoding them again."""
    with tempfile.TemporaryDirectory(prefix="filterwise-") as folder:
        path = Path(folder) / "pictures.pt"
        try:
            save_tensors(data, path)
        except (OSError, RuntimeError) as error:
            raise LabError(f"the pictures cannot be written to {path}: {reason(error)}.") from None
        yield path


_process: dict[str, Any] = {}
"""What a training process keeps between runs."""


def _start_process(path: Path, results: Results, device: str, stop: Any) -> None:
    _process.update(
        data=load_tensors(path), results=results, device=torch.device(device), stop=stop
    )


def _train_one(settings: RunSettings, wait_for_others: bool) -> bool | None:
    """Train a run and write it down; None if another command is training it, or it was stopped."""
    results: Results = _process["results"]
    stop = _process["stop"]
    try:
        while not stop.is_set():
            with results.claim(settings.identity) as mine:
                if mine and settings.identity not in results.read().records:
                    results.add(_trained(settings, stop))
            if mine:
                return True
            if not wait_for_others:
                return None
            time.sleep(0.2)
    except Stopped:
        pass
    except OSError as error:
        raise LabError(f"{results.folder} cannot be written to: {reason(error)}.") from None
    return None


def _trained(settings: RunSettings, stop: Any) -> Record:
    device: torch.device = _process["device"]
    started, clock = datetime.now(UTC), time.perf_counter()
    try:
        outcome = train(settings, _process["data"], device, stop.is_set)
    except (RuntimeError, ValueError) as error:
        panel = settings.panel.title
        raise LabError(f"{settings.recipe} ({panel}) failed: {reason(error)}.") from None
    seconds = round(time.perf_counter() - clock, 3)
    times = {"started": started.isoformat(timespec="seconds"), "seconds": seconds}
    return record_of(settings, outcome, times, versions(), hardware(device))
