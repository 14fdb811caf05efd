"""One optimizer step of a contestant: micro-batches, gradients added up, SGD with momentum."""

from __future__ import annotations

import gc
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

import filterwise as fw
from filterwise.lab.errors import LabError
from harness.timing import clocked, interleaved, warmed_up

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from contextlib import AbstractContextManager

    from torch import Tensor

    from harness.contestants import Contestant
    from harness.nets import Net
    from harness.timing import Rounds

__all__ = ["Cell", "Step", "check_agreement", "ready", "side_by_side"]

AGREE = 0.05
"""Largest difference of outputs, in units of the largest output: eps and divisors differ."""


@dataclass(frozen=True)
class Cell:
    """One place in a table of steps.

    Attributes:
        net: The network.
        batch: Pictures in a micro-batch.
        micro_batches: Micro-batches in a step.
        size: Height and width of the pictures; None is the network's own.
        device: Where it runs.
        autocast: Compute in bfloat16 where torch's autocast does.
        compile: Whether models go through ``torch.compile``.
    """

    net: Net
    batch: int
    micro_batches: int
    size: int | None
    device: torch.device
    autocast: bool = False
    compile: bool = False

    @property
    def title(self) -> str:
        """What it is, for a table's heading."""
        return (
            f"{self.net.title}, {self.size or self.net.size} px, batch {self.batch},"
            f" micro-batches {self.micro_batches}"
        )


class Step:
    """A contestant's network and optimizer; a call is one step.

    The learning rate is zero: every step does all its work, and weights stay as they are.
    """

    def __init__(self, contestant: Contestant, cell: Cell) -> None:
        """Build the network on the cell's device."""
        self.contestant, self.cell = contestant, cell
        self.model = contestant.make(cell.net.build()).to(cell.device)
        self.compiled = torch.compile(self.model) if cell.compile else self.model
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.0, momentum=0.9)
        self.pictures, self.labels = cell.net.data(cell.batch, cell.size, cell.device)
        self._autocast = torch.autocast(
            cell.device.type, dtype=torch.bfloat16, enabled=cell.autocast
        )

    def __call__(self) -> None:
        """Take one step."""
        last = self.cell.micro_batches - 1
        for place in range(last + 1):
            with self._around(place < last):
                with self._autocast:
                    loss = functional.cross_entropy(self.compiled(self.pictures), self.labels)
                (loss / (last + 1)).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _around(self, enabled: bool) -> AbstractContextManager[None]:
        return fw.defer(self.model, enabled) if self.contestant.deferred else nullcontext()

    def output(self) -> Tensor:
        """Return what the network computes without gradient and without dropout."""
        self.model.eval()
        with torch.no_grad(), self._autocast:
            found = self.compiled(self.pictures).double()
        self.model.train()
        return found


def side_by_side(
    contestants: Sequence[Contestant],
    cell: Cell,
    rounds: Rounds,
    advance: Callable[[float], None] = lambda _: None,
    *,
    compare: bool = True,
) -> tuple[dict[str, list[float]], list[str]]:
    """Time the steps of several contestants in one process.

    Args:
        contestants: Who takes part.
        cell: What a step is.
        rounds: How many.
        advance: Called with each round's share.
        compare: Look first whether those that claim the same network compute it.

    Returns:
        Seconds of every round by name, and a sentence on each that cannot take part.

    Raises:
        LabError: If a network computes no finite numbers, or two that should compute the same do
            not.
    """
    steps, left_out = ready(contestants, cell)
    if compare:
        check_agreement(steps)
    turns = {name: clocked(step, cell.device) for name, step in steps.items()}
    warmed_up(turns, 1)
    times = interleaved(turns, rounds, advance)
    del steps, turns
    gc.collect()
    return times, left_out


def ready(contestants: Sequence[Contestant], cell: Cell) -> tuple[dict[str, Step], list[str]]:
    """Build every contestant and let it take a step.

    Returns:
        Steps by name, and a sentence on each that cannot take part.

    Raises:
        LabError: If a network computes no finite numbers.
    """
    steps: dict[str, Step] = {}
    left_out: list[str] = []
    for one in contestants:
        try:
            step = Step(one, cell)
            step()
        except ValueError as error:
            # A norm on one value a channel, for example: BatchNorm with one picture at DeepLabv3.
            left_out.append(f"{cell.title}: {one.name} is left out: {' '.join(str(error).split())}")
            continue
        if not step.output().isfinite().all():
            raise LabError(f"{cell.title}: the outputs of {one.name} are not finite.")
        steps[one.name] = step
    return steps, left_out


def check_agreement(steps: Mapping[str, Step]) -> None:
    """Compare the outputs of all that compute GN + WS, which differ by eps and divisor alone.

    Raises:
        LabError: If two differ by more than `AGREE`: then they do not do the same work.
    """
    same = {name: step.output() for name, step in steps.items() if step.contestant.standardized}
    if not same:
        return
    first, reference = next(iter(same.items()))
    largest = float(reference.abs().max())
    for name, output in same.items():
        difference = float((output - reference).abs().max())
        if not difference <= AGREE * largest:
            raise LabError(
                f"{name} and {first} do not compute the same network: outputs differ by"
                f" {difference:.3g}, the largest is {largest:.3g}."
            )
