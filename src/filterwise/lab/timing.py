"""Step times, measured side by side: one process, one thread, contestants taking turns."""

from __future__ import annotations

import hashlib
import json
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy
import torch

from filterwise.lab.engine import Batches, Trainer
from filterwise.lab.hardware import hardware, versions
from filterwise.lab.results import write_whole
from filterwise.lab.settings import RunSettings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from filterwise.lab.data import PictureSet

__all__ = ["StepTime", "kept_step_times", "step_times"]

WARM_UP = 2
SECONDS = 2.5
ROUNDS = (5, 30)


@dataclass(frozen=True)
class StepTime:
    """How long an optimizer step takes, beside the plain network's in the same round.

    Attributes:
        ratio: Median over rounds of this step's time by the plain network's.
        lower: First quartile of the ratio.
        upper: Third quartile.
        milliseconds: Median time of a step.
        rounds: Number of rounds.
    """

    ratio: float
    lower: float
    upper: float
    milliseconds: float
    rounds: int


def step_times(
    contestants: Sequence[RunSettings],
    data: PictureSet,
    device: str,
) -> dict[str, StepTime]:
    """Measure the optimizer steps of several recipes on one network and micro-batch.

    Every contestant takes one step a round, on the same pictures; the order turns from round to
    round. Two steps each before the clock starts.

    Args:
        contestants: One run of each recipe; the first is the plain network (recipe ``none``).
        data: Where the pictures come from.
        device: Where the steps run.

    Returns:
        Times by recipe; none for a recipe whose network cannot take a step.
    """
    place = torch.device(device)
    with _one_thread():
        pictures, labels = next(Batches(data, contestants[0].step_size, 0, place).epoch())
        steps: dict[str, Callable[[], float]] = {}
        for settings in contestants:
            # So small a rate that weights stay as they are: a diverged network is slower or faster.
            frozen = settings.model_copy(update={"learning_rate": 1e-12})
            trainer = Trainer(frozen, data, place, steps=10**6)
            step = _clocked(trainer, pictures, labels, place)
            try:
                for _ in range(WARM_UP):
                    step()
            except ValueError:
                # A norm on one value a channel: the run itself says so.
                continue
            steps[settings.recipe] = step
        times = _rounds(steps)
    plain = times.get(contestants[0].recipe)
    if plain is None:
        return {}
    return {recipe: _summary(mine, plain) for recipe, mine in times.items()}


def _clocked(
    trainer: Trainer, pictures: torch.Tensor, labels: torch.Tensor, place: torch.device
) -> Callable[[], float]:
    def step() -> float:
        start = time.perf_counter()
        trainer.step(pictures, labels)
        if place.type == "cuda":
            torch.cuda.synchronize(place)
        return time.perf_counter() - start

    return step


def _rounds(steps: dict[str, Callable[[], float]]) -> dict[str, list[float]]:
    names = list(steps)
    times: dict[str, list[float]] = {name: [] for name in names}
    least, most = ROUNDS
    start = time.perf_counter()
    for number in range(most):
        if number >= least and time.perf_counter() - start > SECONDS:
            break
        for place in range(len(names)):
            name = names[(place + number) % len(names)]
            times[name].append(steps[name]())
    return times


def _summary(mine: Sequence[float], plain: Sequence[float]) -> StepTime:
    ratios = numpy.asarray(mine) / numpy.asarray(plain)
    lower, middle, upper = (float(value) for value in numpy.percentile(ratios, (25, 50, 75)))
    return StepTime(middle, lower, upper, 1000 * float(numpy.median(mine)), len(ratios))


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def kept_step_times(
    kinds: Sequence[tuple[str, int]],
    recipes: Sequence[str],
    data: PictureSet,
    device: str,
    folder: Path,
    advance: Callable[[float], None],
) -> dict[tuple[str, int], dict[str, StepTime]]:
    """Measure step times, or take those that the same recipes had on this machine before.

    They are kept in ``step_times.json`` in the run's folder, under a key made of settings, versions
    and hardware.

    Args:
        kinds: Network and micro-batch of each measurement.
        recipes: Who takes part; the plain network does in any case.
        data: Where the pictures come from.
        device: Where the steps run.
        folder: The run's folder.
        advance: Called with 1 after each measurement.

    Raises:
        LabError: If the file cannot be written.
    """
    path = folder / "step_times.json"
    kept = _kept(path)
    found = {}
    for net, micro_batch in kinds:
        contestants = [
            _contestant(data, net, recipe, micro_batch, device)
            for recipe in dict.fromkeys(("none", *recipes))
        ]
        key = _key(contestants, device)
        if key not in kept:
            kept[key] = step_times(contestants, data, device)
            words = {name: {r: asdict(t) for r, t in times.items()} for name, times in kept.items()}
            write_whole(path, json.dumps(words, indent=1).encode())
        found[net, micro_batch] = kept[key]
        advance(1.0)
    return found


def _contestant(
    data: PictureSet, net: str, recipe: str, micro_batch: int, device: str
) -> RunSettings:
    return RunSettings(
        data=data.name,
        data_sha256=data.sha256,
        net=net,
        recipe=recipe,
        initialization="default",
        learning_rate=1.0,
        micro_batch=micro_batch,
        seed=0,
        epochs=1,
        device=device,
    )


def _key(contestants: Sequence[RunSettings], device: str) -> str:
    parts = [run.identity for run in contestants]
    text = json.dumps([parts, versions(), hardware(torch.device(device))], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _kept(path: Path) -> dict[str, dict[str, StepTime]]:
    try:
        stored = json.loads(path.read_bytes())
        return {
            key: {recipe: StepTime(**fields) for recipe, fields in times.items()}
            for key, times in stored.items()
        }
    except (OSError, ValueError, TypeError, AttributeError):
        # Times can always be measured again; unlike results nothing is lost with them.
        return {}
