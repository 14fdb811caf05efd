"""One run of a comparison: the training engine's smallest user."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import nn

import filterwise as fw
from filterwise.lab.nets import build
from filterwise.lab.training.loop import Plan, Position, Step, Stopped, run
from filterwise.lab.training.place import be_deterministic, make_fabric
from filterwise.lab.training.schedules import Cosine
from filterwise.lab.training.stepper import Stepper

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

    from filterwise.lab.data import PictureSet
    from filterwise.lab.settings import RunSettings

__all__ = ["Batches", "Outcome", "Stopped", "Trainer", "be_deterministic", "train", "unpacked"]

TEST_BATCH = 256
ONE_VALUE = "Expected more than 1 value per channel"


@dataclass
class Outcome:
    """What a run came to.

    Attributes:
        error: Share of test pictures answered wrongly after the last epoch, from 0 to 1; after a
            divergence, of the network as it stood then. An answer that is not finite is wrong. None
            if the network cannot be trained under these settings.
        wrong: One bit for each test picture, 1 where the answer is wrong, in hexadecimal digits.
        diverged_at: Epoch (from 1) and step in it (from 1) at which the loss was not finite.
        failed: Why the network cannot be trained under these settings.
        curve: For each finished epoch its number, mean training loss and test error.
        steps: Optimizer steps taken.
        conversion: What the recipe did to the network, in one line.
    """

    error: float | None = None
    wrong: str = ""
    diverged_at: tuple[int, int] | None = None
    failed: str | None = None
    curve: list[dict[str, float]] = field(default_factory=list)
    steps: int = 0
    conversion: str = ""


class Batches:
    """Pictures in the order of one seed, normalized by the training half's statistics.

    An optimizer step has `step_size` pictures, or all if there are fewer. What is left over at the
    end of an epoch waits for a later one: each epoch has its own order.
    """

    def __init__(self, data: PictureSet, step_size: int, seed: int, device: torch.device) -> None:
        """Take the pictures; the order comes from a generator of its own."""
        self.data, self.device = data, device
        self.step_size = min(step_size, len(data.train_labels))
        self.steps = len(data.train_labels) // self.step_size
        self.mean, self.deviation = (part.to(device) for part in data.channel_statistics())
        self.order = torch.Generator().manual_seed(seed)

    def epoch(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the pictures and labels of each optimizer step of a new epoch."""
        order = torch.randperm(len(self.data.train_labels), generator=self.order)
        for chosen in order[: self.steps * self.step_size].view(self.steps, self.step_size):
            labels = self.data.train_labels[chosen].to(self.device)
            yield self._normalized(self.data.train_pictures[chosen]), labels

    def test(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield all test pictures and labels, in their order."""
        pictures, labels = self.data.test_pictures, self.data.test_labels
        for start in range(0, len(labels), TEST_BATCH):
            part = slice(start, start + TEST_BATCH)
            yield self._normalized(pictures[part]), labels[part].to(self.device)

    def _normalized(self, pictures: Tensor) -> Tensor:
        return (pictures.to(self.device).float() - self.mean) / self.deviation


class Trainer:
    """A network with its optimizer, taking one optimizer step at a time."""

    def __init__(self, settings: RunSettings, data: PictureSet, device: torch.device, steps: int):
        """Build the network under the run's seed; `steps` is the length of the cosine."""
        torch.manual_seed(settings.seed)
        model, report = build(settings.net, settings.recipe, data.channels, len(data.classes))
        self.model: nn.Module = model.to(device)
        self.conversion = report.summary
        self.micro_batch = settings.micro_batch
        self.optimizer = torch.optim.SGD(
            fw.param_groups(self.model, settings.weight_decay),
            lr=settings.learning_rate,
            momentum=settings.momentum,
        )
        self.stepper = Stepper(make_fabric(str(device)), self.model, self.optimizer, _loss)
        self._length, self._taken = steps, 0

    def step(self, pictures: Tensor, labels: Tensor) -> float:
        """Take one optimizer step and return the mean loss over its pictures; see `Stepper`."""
        loss = self.stepper.step(self.parts(pictures, labels), len(labels))
        self._taken += math.isfinite(loss)
        self.stepper.set_rates(Cosine().at(self._taken, self._length))
        return loss

    def parts(self, pictures: Tensor, labels: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return the micro-batches of a step."""
        size = self.micro_batch
        return list(zip(pictures.split(size), labels.split(size), strict=True))

    def wrong(self, batches: Batches) -> Tensor:
        """Return for each test picture whether the answer is wrong; one that is not finite is."""
        self.model.eval()
        parts = []
        with torch.no_grad():
            for pictures, labels in batches.test():
                logits = self.model(pictures)
                answered = logits.isfinite().all(dim=1)
                parts.append((logits.argmax(dim=1) != labels) | ~answered)
        self.model.train()
        return torch.cat(parts).cpu()


def _loss(forward: Callable[[Tensor], Tensor], part: tuple[Tensor, Tensor]) -> Tensor:
    pictures, labels = part
    return nn.functional.cross_entropy(forward(pictures), labels, reduction="sum")


class _Asking:
    """Looks before each step whether the run shall stop."""

    def __init__(self, asked_to_stop: Callable[[], bool]) -> None:
        self._asked_to_stop = asked_to_stop

    def before_step(self, position: Position) -> None:
        del position
        if self._asked_to_stop():
            raise Stopped

    def after_step(self, position: Position, loss: float) -> None:
        pass

    def after_epoch(self, position: Position) -> None:
        pass


def train(
    settings: RunSettings,
    data: PictureSet,
    device: torch.device | str = "cpu",
    asked_to_stop: Callable[[], bool] = lambda: False,
) -> Outcome:
    """Train one network and measure it on the test pictures.

    Args:
        settings: What to train.
        data: The pictures that `settings` names.
        device: Where.
        asked_to_stop: Looked at before each step.

    Raises:
        Stopped: If it was asked to stop.
    """
    device = torch.device(device)
    be_deterministic(settings.deterministic)
    batches = Batches(data, settings.step_size, settings.seed, device)
    trainer = Trainer(settings, data, device, steps=batches.steps * settings.epochs)
    position = Position()
    wrong = torch.empty(0)

    def steps(epoch: int, first: int) -> Iterator[Step]:
        del epoch, first
        for pictures, labels in batches.epoch():
            yield Step(trainer.parts(pictures, labels), len(labels))

    def evaluate() -> dict[str, float]:
        nonlocal wrong
        wrong = trainer.wrong(batches)
        return {"test_error": int(wrong.sum()) / len(wrong)}

    plan = Plan(settings.epochs, batches.steps, Cosine().at, steps, evaluate)
    try:
        run(trainer.stepper, plan, position, _Asking(asked_to_stop))
    except ValueError as error:
        if ONE_VALUE not in str(error):
            raise
        failed = "the norm sees one value a channel, which torch refuses to train on"
        return Outcome(failed=failed, conversion=trainer.conversion)
    return Outcome(
        error=position.last["test_error"],
        wrong=_packed(wrong),
        diverged_at=position.diverged_at,
        curve=position.curve,
        steps=position.steps,
        conversion=trainer.conversion,
    )


def _packed(bits: Tensor) -> str:
    text = "".join("1" if bit else "0" for bit in bits.tolist())
    return f"{int(text, 2):0{math.ceil(len(text) / 4)}x}"


def unpacked(digits: str, count: int) -> list[bool]:
    """Return the bits that an `Outcome.wrong` of `count` pictures holds."""
    return [bit == "1" for bit in f"{int(digits, 16):0{count}b}"]
