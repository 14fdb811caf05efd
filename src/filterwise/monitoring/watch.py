"""The monitor of a plain training loop: looks now and then, speaks up once."""

from __future__ import annotations

import dataclasses
import math
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed

from filterwise.check import check
from filterwise.errors import TrainingWarning
from filterwise.filters import check_module
from filterwise.findings import Finding
from filterwise.first_step import is_first_step, is_normalized, turn_limit
from filterwise.monitoring.figures import figures_of, watched_layers
from filterwise.monitoring.rules import RULES, History, Scene
from filterwise.optim import unwrapped

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn

__all__ = ["Monitor", "monitor"]

EARLY = 20


def monitor(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
    *,
    every: int = 10,
    turn: float | None = None,
    batch_size: int | None = None,
    input: Any = None,
    loader: Any = None,
    speak: bool = True,
) -> Monitor:
    """Watch a training, and speak up once about each thing that goes wrong.

    Make it before the first step, and call its `step` after the optimizer's::

        monitor = fw.monitor(model, optimizer, batch_size=2)
        for micro_batches in loader_of_steps:
            ...
            optimizer.step()
            monitor.step()
            optimizer.zero_grad()

    It first says what `filterwise.check` finds (errors and warnings), with the optimizer's learning
    rate. Then it looks at the first 20 steps and at every `every`-th: how far a step turned the
    filters, the shift of the average gradient, Var[W] and where its trend under weight decay ends,
    gamma and eps beside it, filters of one sign, weights that are not finite. Plain models are
    watched, too.

    It reads (raw) weights after a step and before it, and nothing else: no hook, no gradient, no
    forward; training is the same to the bit, deferred, in autocast, compiled, under DDP (whose
    processes hold the same weights: all find the same, the first one speaks). A look costs a copy
    of the weights before the step, about thirty passes over them after it and one read-back from
    the device; steps in between cost nothing.

    Args:
        model: The model, wrapped or not.
        optimizer: Its optimizer, or all of them.
        every: Steps from one look to the next, after the first 20.
        turn: The largest angle in degrees that one step may turn the median filter of a layer by;
            by default 10, and 30 in a model with activation norms.
        batch_size: For `check`: samples that one forward sees.
        input: For `check`: a tensor or a tuple of arguments to run the model on.
        loader: For `check`: a loader of training batches.
        speak: Whether each finding is also a `TrainingWarning`; else it is only returned and kept.

    Raises:
        ValueError: If `every` or `turn` is out of range, the optimizer holds no weight of the
            model, or a weight is sharded (FSDP): a shard does not show whole filters.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 3))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=100.0)
        >>> watch = monitor(model, optimizer, speak=False)
        >>> model(torch.ones(1, 4, 5, 5)).square().sum().backward()
        >>> optimizer.step()
        >>> "turned its filters by" in watch.step()[0].what
        True
    """
    return Monitor(
        model,
        optimizer,
        every=every,
        turn=turn,
        speak=speak,
        options={"batch_size": batch_size, "input": input, "loader": loader},
    )


class Monitor:
    """What `filterwise.monitor` returns.

    Attributes:
        findings: Everything found so far, in the order in which it was.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        *,
        every: int,
        turn: float | None,
        speak: bool,
        options: dict[str, Any],
    ) -> None:
        """Check the model, and find its layers in the optimizers."""
        check_module(model)
        if not (isinstance(every, int) and every > 0):
            raise ValueError(f"every must be an integer > 0, got {every!r}")
        if turn is not None and not (math.isfinite(turn) and 0 < turn <= 180):
            raise ValueError(
                f"turn must be an angle in degrees, over 0 and up to 180, got {turn!r}"
            )
        model = unwrapped(model)
        normalized = is_normalized(model)
        self._every, self._speak, self._normalized = every, speak, normalized
        self._turn = turn_limit(normalized) if turn is None else turn
        optimizers = [optimizer] if isinstance(optimizer, torch.optim.Optimizer) else optimizer
        self._layers = _histories(model, list(optimizers), options["input"])
        self._rules = dict(RULES)
        self._step = 0
        self._before: list[Tensor] | None = None
        self.findings: list[Finding] = []
        rate = max(one.rate for one in self._layers)
        first = check(model, lr=rate if rate > 0 else None, **options)
        self._tell(_once([finding for finding in first if finding.level != "note"]))
        if any(is_first_step(finding) for finding in first):
            # What a first step turns and shifts is said; the steps would say it again.
            del self._rules["turn"], self._rules["shift"]
        self._keep()

    def step(self) -> list[Finding]:
        """Take note of an optimizer step; return what is new, mostly nothing.

        Call it once after each step of the optimizer (of all, where there are several).
        """
        self._step += 1
        found: list[Finding] = []
        if self._before is not None:
            figures = figures_of([one.layer for one in self._layers], self._before)
            for one, look in zip(self._layers, figures, strict=True):
                one.add(self._step, look)
            found = self._judge()
        self._keep()
        self._tell(found)
        return found

    def state_dict(self) -> dict[str, Any]:
        """Return the number of steps and what was spoken about, for a checkpoint."""
        return {"step": self._step, "spoken": [name for name in RULES if name not in self._rules]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on counting from a checkpoint, and do not repeat what was said before it."""
        self._step = int(state["step"])
        self._rules = {k: v for k, v in RULES.items() if k not in state["spoken"]}
        self._keep()

    def _judge(self) -> list[Finding]:
        scene = Scene(self._step, self._normalized, self._turn)
        found: list[Finding] = []
        for name, rule in list(self._rules.items()):
            finding = rule(self._layers, scene)
            if finding is not None:
                found.append(finding)
                del self._rules[name]
        return found

    def _keep(self) -> None:
        """Copy the weights if the coming step will be looked at."""
        coming = self._step + 1
        if coming > EARLY and coming % self._every:
            self._before = None
            return
        # A copy also where the matrix is none: the optimizer writes in place.
        self._before = [one.layer.rows().clone() for one in self._layers]

    def _tell(self, found: list[Finding]) -> None:
        self.findings += found
        if not self._speak or not _first_process():
            return
        for finding in found:
            warnings.warn(str(finding), TrainingWarning, stacklevel=3)


def _once(found: Sequence[Finding]) -> list[Finding]:
    """Say once, at the first of them, what was found of several layers in the same words."""
    layers: dict[tuple[str, str], list[Finding]] = {}
    for finding in found:
        layers.setdefault((finding.level, finding.what), []).append(finding)
    return [
        same[0]
        if len(same) == 1
        else dataclasses.replace(same[0], what=f"{what} ({len(same)} such layers)")
        for (_, what), same in layers.items()
    ]


def _first_process() -> bool:
    ready = distributed.is_available() and distributed.is_initialized()
    return not ready or distributed.get_rank() == 0


def _histories(
    model: nn.Module, optimizers: list[torch.optim.Optimizer], input: Any
) -> list[History]:
    groups: dict[int, tuple[torch.optim.Optimizer, dict[str, Any]]] = {
        id(parameter): (optimizer, group)
        for optimizer in optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    arguments = input if isinstance(input, tuple) or input is None else (input,)
    layers = [one for one in watched_layers(model, arguments) if id(one.weight) in groups]
    if not layers:
        raise ValueError(
            "the optimizer holds no weight that can be watched (of a converted layer, or of a"
            " convolution or linear layer with a fan-in of 16 or more); make it from this model's"
            " parameters, after the conversion"
        )
    for one in layers:
        if hasattr(one.weight, "full_tensor"):
            raise ValueError(
                f"the weight of {one.name} is sharded (FSDP), and a shard does not show whole"
                " filters; watch a training on one process or under DDP"
            )
    start = figures_of(layers, [one.rows() for one in layers])
    return [
        History(layer, *groups[id(layer.weight)], signed=look.one_signed)
        for layer, look in zip(layers, start, strict=True)
    ]
