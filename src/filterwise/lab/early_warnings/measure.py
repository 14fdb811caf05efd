"""One run under the monitor, and what it came to."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict
from torch import nn

import filterwise as fw
from filterwise.lab.early_warnings.runs import Run
from filterwise.lab.engine import Batches
from filterwise.lab.hardware import hardware, versions
from filterwise.lab.nets import convert, first_gains, make
from filterwise.lab.results import Lines
from filterwise.lab.training.place import be_deterministic, make_fabric
from filterwise.lab.training.stepper import Stepper

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

    from filterwise.lab.data import PictureSet

__all__ = ["GUESSING", "End", "Heard", "Measured", "Measurements", "end_of", "measure"]

STEP = 64
WINDOW = 10
GUESSING = 0.9
"""Share of the loss of guessing, ln(classes), from which ten losses count as guessing."""
FAILED, HEALTHY = 0.5, 0.15

End = Literal["diverged", "fell back", "never learned", "fails in evaluation", "healthy", "between"]


class Heard(BaseModel):
    """One finding of a run.

    Attributes:
        step: The step after which it was spoken; 0 is before the first.
        kind: Which warning.
        level: ``error`` or ``warning``.
        layer: Dotted name.
        what: The sentence.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    step: int
    kind: str
    level: str
    layer: str
    what: str


class Measured(BaseModel):
    """A finished run: a line of the results.

    Attributes:
        id: Hash of the settings.
        settings: What was trained.
        error: Share of test pictures answered wrongly by the network as it ended.
        losses: Mean loss of each step, to four digits, up to one that was not finite.
        finite: Whether all were.
        classes: Of the data.
        heard: What was found, in order.
        seconds: Training and testing, beside whatever else ran.
        versions: Of python, filterwise and what it stands on.
        hardware: Processor, cores, threads, device.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    settings: Run
    error: float
    losses: list[float]
    finite: bool
    classes: int
    heard: list[Heard]
    seconds: float
    versions: dict[str, str]
    hardware: dict[str, Any]

    @property
    def end(self) -> End:
        """What it came to."""
        return end_of(self)[0]

    @property
    def collapse(self) -> int | None:
        """The step at which it collapsed, where there was one."""
        return end_of(self)[1]


class Measurements(Lines[Measured]):
    """The runs in a folder, by identity."""

    kind = Measured

    @staticmethod
    def key(record: Measured) -> str:
        """Return the run's identity."""
        return record.id


def end_of(run: Measured) -> tuple[End, int | None]:
    """Return what a run came to, and the step at which it collapsed.

    ``diverged``: the loss was not finite, at that step. ``fell back``: the mean of the last ten
    losses was below 0.9 ln(classes) once, and from that step to the end it was not. ``never
    learned``: it never was; no step. ``fails in evaluation``: half or more of the test pictures are
    wrong all the same; the last step. ``healthy``: at most 15 % are. ``between``: the rest.
    """
    if not run.finite:
        return "diverged", len(run.losses) + 1
    limit = GUESSING * math.log(run.classes)
    means = [
        sum(run.losses[max(0, i - WINDOW + 1) : i + 1]) / min(i + 1, WINDOW)
        for i in range(len(run.losses))
    ]
    learned = [step for step, mean in enumerate(means, start=1) if mean < limit]
    if not learned:
        return "never learned", None
    if learned[-1] < len(means):
        return "fell back", learned[-1] + 1
    if run.error >= FAILED:
        return "fails in evaluation", len(means)
    return ("healthy" if run.error <= HEALTHY else "between"), None


CHECKS = {
    "BatchNorms see": "check: micro-batch of BatchNorm",
    "nothing normalizes": "check: nothing normalizes",
    "residual branches": "check: branch gains",
    "in a net without activation norms": "check: learning rate without norms",
    "lets a step grow": "check: bound of gamma",
    "dwarfs": "check: gamma or eps",
    "EquiNorm": "check: input of EquiNorm",
}


def _kind(what: str) -> str:
    return next((kind for words, kind in CHECKS.items() if words in what), "check: other")


def _heard(monitor: fw.Monitor) -> Iterator[Heard]:
    """Yield what `check` found; the kinds of live findings come from the rules that spoke."""
    for one in monitor.findings:
        yield Heard(step=0, kind=_kind(one.what), level=one.level, layer=one.layer, what=one.what)


def measure(run: Run, data: PictureSet, *, stop: Callable[[], bool] = lambda: False) -> Measured:
    """Train one network under the monitor, at its defaults.

    Args:
        run: What to train.
        data: The pictures.
        stop: Looked at before each step; a run that is stopped raises KeyboardInterrupt.
    """
    started = time.perf_counter()
    device = torch.device("cpu")
    be_deterministic(False)
    torch.manual_seed(run.seed)
    batches = Batches(data, STEP, run.seed, device)
    model = make(run.net, data.channels, len(data.classes))
    convert(model, run.recipe)
    if run.branch:
        first_gains(model, run.net, run.recipe)
    model.train()
    optimizer = torch.optim.SGD(
        fw.param_groups(model, run.weight_decay), lr=run.learning_rate, momentum=run.momentum
    )
    first, _ = next(Batches(data, STEP, run.seed, device).epoch())
    monitor = fw.monitor(
        model, optimizer, batch_size=run.micro_batch, input=first[: run.micro_batch], speak=False
    )
    heard = list(_heard(monitor))
    stepper = Stepper(make_fabric("cpu"), model, optimizer, _loss)
    losses: list[float] = []
    finite = True
    for pictures, labels in (step for _ in range(run.epochs) for step in batches.epoch()):
        if stop():
            raise KeyboardInterrupt
        size = run.micro_batch
        parts = list(zip(pictures.split(size), labels.split(size), strict=True))
        loss = stepper.step(parts, len(labels))
        if not math.isfinite(loss):
            finite = False
            break
        losses.append(float(f"{loss:.4g}"))
        spoken = set(monitor.state_dict()["spoken"])
        found = monitor.step()
        kinds = [kind for kind in monitor.state_dict()["spoken"] if kind not in spoken]
        for kind, one in zip(kinds, found, strict=True):
            heard.append(
                Heard(step=len(losses), kind=kind, level=one.level, layer=one.layer, what=one.what)
            )
    return Measured(
        id=run.identity,
        settings=run,
        error=_error(model, batches),
        losses=losses,
        finite=finite,
        classes=len(data.classes),
        heard=heard,
        seconds=round(time.perf_counter() - started, 3),
        versions=versions(),
        hardware=hardware(device),
    )


def _loss(forward: Callable[[Tensor], Tensor], part: tuple[Tensor, Tensor]) -> Tensor:
    pictures, labels = part
    return nn.functional.cross_entropy(forward(pictures), labels, reduction="sum")


def _error(model: nn.Module, batches: Batches) -> float:
    """Return the share of wrong answers; one that is not finite is wrong."""
    model.eval()
    wrong = total = 0
    with torch.no_grad():
        for pictures, labels in batches.test():
            logits = model(pictures)
            answered = logits.isfinite().all(1)
            wrong += int(((logits.argmax(1) != labels) | ~answered).sum())
            total += len(labels)
    return wrong / total
