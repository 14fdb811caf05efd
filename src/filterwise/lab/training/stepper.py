"""One optimizer step out of micro-batches."""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed

import filterwise as fw

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lightning_fabric import Fabric
    from torch import Tensor, nn

    from filterwise.lab.training.schedules import Rates

    Loss = Callable[[Callable[..., Any], Any], Tensor]

__all__ = ["Stepper"]


class Stepper:
    """A model with its optimizer, taking one optimizer step at a time.

    Attributes:
        model: The model itself, whatever processes and precision wrap around it.
        optimizer: Torch's own.
        forward: What a training forward goes through.
    """

    def __init__(
        self,
        fabric: Fabric,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss: Loss,
        clip_norm: float | None = None,
    ) -> None:
        """Take a model on its device.

        Args:
            fabric: Where; see `make_fabric`.
            model: What to train.
            optimizer: With the model's parameters.
            loss: Takes the forward and one micro-batch, and returns the *sum* of the loss over its
                samples.
            clip_norm: Largest norm of the gradient of a step; None leaves it.
        """
        self.fabric, self.model, self.optimizer = fabric, model, optimizer
        self._loss, self._clip_norm = loss, clip_norm
        self._rates = [(group["lr"], group.get("momentum")) for group in optimizer.param_groups]
        # The strategy's own wrapper and not Fabric's around it, whose conversions of inputs and
        # outputs cost more than a small layer and round float64.
        self._wrapped = fabric.strategy.setup_module(model)
        self.forward: Callable[..., Any] = (
            self._wrapped if precision_of(fabric).endswith("true") else self._in_autocast
        )
        with warnings.catch_warnings():
            # EquiNorm takes no part in deferral, which is said on the first entry only.
            warnings.simplefilter("ignore", fw.FilterwiseWarning)
            with fw.defer(self._wrapped, enabled=False):
                pass

    def set_rates(self, rates: Rates) -> None:
        """Set learning rate and momentum of the next step from those it was made with."""
        for group, (rate, _) in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * rates.factor
            if rates.momentum is not None and "momentum" in group:
                group["momentum"] = rates.momentum

    def step(self, parts: Sequence[Any], samples: int) -> float:
        """Take one optimizer step and return the mean loss over its samples.

        The gradients of the micro-batches are added, each with the weight of its share, so that a
        shorter last one counts for no more than its samples, in this process and over all;
        weights are normalized once a step (`fw.defer`). Where the loss is not finite no parameter
        moves.

        Args:
            parts: This process's micro-batches, one at least.
            samples: Number of samples in the micro-batches of all processes.
        """
        if not parts:
            raise ValueError("a step needs one micro-batch at least in every process")
        self.optimizer.zero_grad()
        total = torch.zeros((), device=self.fabric.device)
        processes = self.fabric.world_size
        for index, part in enumerate(parts, start=1):
            with fw.defer(self._wrapped, enabled=index < len(parts)):
                loss = self._loss(self.forward, part) / samples
                # The wrapper averages gradients over processes, and here they are to be added.
                self.fabric.backward(loss * processes if processes > 1 else loss)
            total = total + loss.detach()
        if processes > 1:
            # The same number in every process, so that all stop at the same step.
            distributed.all_reduce(total)
        mean = float(total)
        if math.isfinite(mean):
            if self._clip_norm is not None:
                torch.nn.utils.clip_grad_norm_(self.model.parameters(), self._clip_norm)
            self.optimizer.step()
        return mean

    def _in_autocast(self, *inputs: Any) -> Any:
        with self.fabric.autocast():
            return self._wrapped(*inputs)


def precision_of(fabric: Fabric) -> str:
    """Return a Fabric's precision in its own words."""
    return fabric.strategy.precision.precision
