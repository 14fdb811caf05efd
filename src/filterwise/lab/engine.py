"""One training run: a short loop in plain torch, the same to the bit under the same settings."""

from __future__ import annotations

import math
import os
import warnings
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import nn

import filterwise as fw
from filterwise.lab.nets import build

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

    from filterwise.lab.data import PictureSet
    from filterwise.lab.settings import RunSettings

__all__ = ["Batches", "Outcome", "Stopped", "Trainer", "be_deterministic", "train", "unpacked"]

TEST_BATCH = 256
ONE_VALUE = "Expected more than 1 value per channel"


class Stopped(Exception):
    """The run was asked to stop; nothing of it is kept."""


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
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, steps)
        with warnings.catch_warnings():
            # EquiNorm takes no part in deferral, which is said on the first entry only.
            warnings.simplefilter("ignore", fw.FilterwiseWarning)
            with fw.defer(self.model, enabled=False):
                pass

    def step(self, pictures: Tensor, labels: Tensor) -> float:
        """Take one optimizer step and return the mean loss over its pictures.

        The pictures pass in micro-batches whose gradients are added, each with the weight of its
        share, so that a shorter last one counts for no more than its pictures; weights are
        normalized once a step (`fw.defer`). Where the loss is
        not finite no parameter moves.
        """
        self.optimizer.zero_grad()
        total = torch.zeros((), device=pictures.device)
        parts = pictures.split(self.micro_batch)
        for index, (part, answers) in enumerate(
            zip(parts, labels.split(self.micro_batch), strict=True), start=1
        ):
            with fw.defer(self.model, enabled=index < len(parts)):
                loss = nn.functional.cross_entropy(self.model(part), answers, reduction="sum")
                loss = loss / len(labels)
                loss.backward()
            total += loss.detach()
        mean = float(total)
        if math.isfinite(mean):
            self.optimizer.step()
            self.schedule.step()
        return mean

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
    outcome = Outcome(conversion=trainer.conversion)
    try:
        wrong = _epochs(settings, batches, trainer, outcome, asked_to_stop)
    except ValueError as error:
        if ONE_VALUE not in str(error):
            raise
        outcome.failed = "the norm sees one value a channel, which torch refuses to train on"
        return outcome
    outcome.error = int(wrong.sum()) / len(wrong)
    outcome.wrong = _packed(wrong)
    return outcome


def _epochs(
    settings: RunSettings,
    batches: Batches,
    trainer: Trainer,
    outcome: Outcome,
    asked_to_stop: Callable[[], bool],
) -> Tensor:
    """Train all epochs, or up to a loss that is not finite; return the last wrong answers."""
    wrong = torch.empty(0)
    for epoch in range(1, settings.epochs + 1):
        losses = []
        for step, (pictures, labels) in enumerate(batches.epoch(), start=1):
            if asked_to_stop():
                raise Stopped
            losses.append(trainer.step(pictures, labels))
            if not math.isfinite(losses[-1]):
                outcome.diverged_at = (epoch, step)
                return trainer.wrong(batches)
            outcome.steps += 1
        wrong = trainer.wrong(batches)
        outcome.curve.append(
            {
                "epoch": epoch,
                "train_loss": sum(losses) / len(losses),
                "test_error": int(wrong.sum()) / len(wrong),
            }
        )
    return wrong


def be_deterministic(strictly: bool) -> None:
    """Make torch choose the same algorithms every time; strictly: refuse those that cannot."""
    if strictly:
        # CUDA's matrix products ask for it; read when the device is first used.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    torch.use_deterministic_algorithms(strictly)


def _packed(bits: Tensor) -> str:
    text = "".join("1" if bit else "0" for bit in bits.tolist())
    return f"{int(text, 2):0{math.ceil(len(text) / 4)}x}"


def unpacked(digits: str, count: int) -> list[bool]:
    """Return the bits that an `Outcome.wrong` of `count` pictures holds."""
    return [bit == "1" for bit in f"{int(digits, 16):0{count}b}"]
