"""Callbacks for Lightning's Trainer: deferral with logs of the weights, and live warnings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback

from filterwise import host
from filterwise.defer import defer
from filterwise.findings import Finding, raw_matrix
from filterwise.monitoring import Monitor, monitor

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from lightning.pytorch import LightningModule, Trainer
    from torch import nn

__all__ = ["DeferralCallback", "MonitorCallback", "weight_figures"]


class DeferralCallback(Callback):
    """Runs the normalization once an optimizer step, and logs figures of the converted layers.

    With ``Trainer(accumulate_grad_batches=8, callbacks=[DeferralCallback()])`` all micro-batches of
    a step but the last run inside `filterwise.defer`, a shorter window at the end of an epoch and a
    schedule of accumulation included. Gradients are the same; so is what clipping sees.

    Convert the model in the module's ``__init__``, and give ``configure_optimizers`` the groups of
    `filterwise.param_groups`.

    Args:
        log_every: Optimizer steps between two logs of `weight_figures`; 0 logs nothing.

    Raises:
        ValueError: If `log_every` is negative.
        RuntimeError: At the start of training, if the module optimizes by hand: then only its own
            loop knows which micro-batch is the last; write `filterwise.defer` there.
    """

    def __init__(self, log_every: int = 50) -> None:
        """Keep what to log."""
        if log_every < 0:
            raise ValueError(f"log_every must be >= 0, got {log_every!r}")
        self.log_every = log_every
        self._context: AbstractContextManager[None] | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a module that optimizes by hand."""
        del trainer
        if not pl_module.automatic_optimization:
            raise RuntimeError(
                f"{type(pl_module).__name__} optimizes by hand (automatic_optimization=False), so"
                " that DeferralCallback cannot know the last micro-batch of a step. Take the"
                " callback off, and write filterwise.defer in training_step."
            )

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Enter deferral; enabled unless an optimizer step follows this micro-batch."""
        del batch, batch_idx
        self._leave()
        self._context = defer(pl_module, enabled=not _steps_now(trainer))
        self._context.__enter__()

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Hand over what is left where the last micro-batch was skipped (``None`` for a loss)."""
        del trainer, optimizer
        with defer(pl_module, enabled=False):
            pass

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Leave deferral, and log after an optimizer step."""
        del outputs, batch, batch_idx
        self._leave()
        step = trainer.global_step
        if self.log_every and _steps_now(trainer) and step % self.log_every == 0:
            pl_module.log_dict({f"filterwise/{k}": v for k, v in weight_figures(pl_module).items()})

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Leave deferral without handing over."""
        del trainer, pl_module
        self._leave(exception)

    def _leave(self, exception: BaseException | None = None) -> None:
        context, self._context = self._context, None
        if context is not None:
            context.__exit__(type(exception) if exception else None, exception, None)


def _steps_now(trainer: Trainer) -> bool:
    """Tell whether the present batch is the last of its step, as Lightning itself decides it."""
    progress = trainer.fit_loop.epoch_loop.batch_progress
    ready = progress.current.ready
    last = progress.is_last_batch or ready == trainer.num_training_batches
    return last or ready % trainer.accumulate_grad_batches == 0


class MonitorCallback(Callback):
    """Watches a training with `filterwise.monitor`: each thing that goes wrong is one warning.

    With ``Trainer(callbacks=[MonitorCallback()])`` the module is checked before the first step,
    with the optimizers' learning rate and the batch size of the training loader, and looked at
    after optimizer steps. Beside `DeferralCallback` the order does not matter. What was said, and
    the number of steps, goes into the checkpoint.

    Attributes:
        findings: Everything found so far.

    Args:
        every: Steps from one look to the next, after the first 20.
        turn: The largest angle in degrees that one step may turn filters by; None is the default of
            `filterwise.monitor`.
        batch_size: Samples that one forward sees; None is the training loader's own number.
        input: A tensor or a tuple of arguments, to check the model on.

    Raises:
        ValueError: At the start of training, as `filterwise.monitor` does: for options out of range
            and for weights that a strategy has sharded (FSDP).
    """

    def __init__(
        self,
        *,
        every: int = 10,
        turn: float | None = None,
        batch_size: int | None = None,
        input: Any = None,
    ) -> None:
        """Keep the options."""
        self._options: dict[str, Any] = {"every": every, "turn": turn, "input": input}
        self._batch_size = batch_size
        self._monitor: Monitor | None = None
        self._state: dict[str, Any] | None = None
        self._taken = 0

    @property
    def findings(self) -> list[Finding]:
        """Everything found so far."""
        return [] if self._monitor is None else list(self._monitor.findings)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the module, and begin to watch."""
        size = self._batch_size
        if size is None:
            size = getattr(trainer.train_dataloader, "batch_size", None)
        self._taken = trainer.global_step
        self._monitor = monitor(pl_module, trainer.optimizers, batch_size=size, **self._options)
        if self._state is not None:
            self._monitor.load_state_dict(self._state)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Look, if the optimizer has stepped on this batch."""
        del pl_module, outputs, batch, batch_idx
        if self._monitor is not None and trainer.global_step != self._taken:
            self._taken = trainer.global_step
            self._monitor.step()

    def state_dict(self) -> dict[str, Any]:
        """Return the monitor's state."""
        return {} if self._monitor is None else self._monitor.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep a state for the start of training."""
        self._state = state_dict or None


def weight_figures(model: nn.Module) -> dict[str, float]:
    """Return a few figures of a model's converted layers, to be logged.

    Returns:
        ``raw_std_min``: the smallest standard deviation of a raw filter; as it nears the root of a
        method's eps, the filter is no longer brought to full length. ``gain_min``, ``gain_median``,
        ``gain_max``: of the absolute gains, where there are any. Empty for a plain model.
    """
    deviations, gains = [], []
    for _, module in host.converted(model):
        state = host.state_of(module)
        deviations.append(raw_matrix(module).detach().float().std(1, correction=0).min())
        gain = getattr(module, state.name("gain"), None) if state.method.has_gain else None
        if gain is not None:
            gains.append(gain.detach().float().abs().flatten())
    figures = {}
    if deviations:
        figures["raw_std_min"] = float(torch.stack(deviations).min())
    if gains:
        every = torch.cat(gains)
        figures["gain_min"] = float(every.min())
        figures["gain_median"] = float(every.median())
        figures["gain_max"] = float(every.max())
    return figures
