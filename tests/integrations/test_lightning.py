"""The Lightning callback: the same gradients and weights, fewer normalizations, logs, refusals."""

from __future__ import annotations

import warnings

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch import nn

import filterwise as fw
from filterwise import host
from filterwise.integrations.lightning import DeferralCallback, weight_figures

BATCHES = 7


class Module(LightningModule):
    """A converted network in float64 that counts how often its first layer is normalized."""

    def __init__(self, skip=(), broken=None):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(72, 3)
        ).double()
        fw.convert_(self.net, "gn(2)+wa", select="0")
        self.skip, self.broken = skip, broken
        self.computed = 0
        self.logged = []
        self.gradients = []

    def training_step(self, batch, batch_idx):
        if batch_idx == self.broken:
            raise RuntimeError("broken on purpose")
        if batch_idx in self.skip:
            return None
        x, y = batch
        loss = nn.functional.cross_entropy(self.net(x), y)
        # A kept weight is a leaf while it gathers; else the layer is normalized in this pass.
        self.computed += host.keeper_of(self.net[0]).mode != "defer"
        return loss

    def on_before_optimizer_step(self, optimizer):
        del optimizer
        self.gradients.append(self.net[0].weight.grad.clone())

    def log_dict(self, dictionary, *args, **kwargs):
        self.logged.append((self.trainer.global_step, set(dictionary)))
        super().log_dict(dictionary, *args, **kwargs)

    def configure_optimizers(self):
        return torch.optim.SGD(fw.param_groups(self, weight_decay=1e-2), lr=0.1, momentum=0.9)


def batches():
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(2, 2, 5, 5, generator=generator, dtype=torch.float64),
            torch.randint(3, (2,), generator=generator),
        )
        for _ in range(BATCHES)
    ]


class Stream(torch.utils.data.IterableDataset):
    """Batches whose number nobody knows before they end."""

    def __iter__(self):
        return iter(batches())


def train(module, *callbacks, accumulate=3, epochs=2, data=None, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's advice on workers and loggers
        trainer = Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            accumulate_grad_batches=accumulate,
            callbacks=list(callbacks),
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            log_every_n_steps=1,
            **options,
        )
        if data is None:
            data = torch.utils.data.DataLoader(batches(), batch_size=None)
        trainer.fit(module, data)
    return trainer


def assert_same(got, expected):
    assert len(got.gradients) == len(expected.gradients) > 0
    for one, other in zip(got.gradients, expected.gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    for one, other in zip(got.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("data", [None, "stream"])
@pytest.mark.parametrize("clip", [None, 0.05])
def test_same_training_with_fewer_normalizations(data, clip):
    ordinary, deferred = Module(), Module()
    stream = torch.utils.data.DataLoader(Stream(), batch_size=None) if data else None
    options = {} if clip is None else {"gradient_clip_val": clip}
    train(ordinary, data=stream, **options)
    trainer = train(deferred, DeferralCallback(log_every=2), data=stream, **options)
    assert_same(deferred, ordinary)
    assert trainer.global_step == 6  # windows of 3, 3 and 1 micro-batches, twice
    assert deferred.computed == 6
    assert ordinary.computed == 2 * BATCHES


def test_a_schedule_of_accumulation_is_followed():
    ordinary, deferred = Module(), Module()
    schedule = {0: 1, 1: 4}
    train(ordinary, GradientAccumulationScheduler(schedule), accumulate=1)
    train(deferred, GradientAccumulationScheduler(schedule), DeferralCallback(), accumulate=1)
    assert_same(deferred, ordinary)
    assert deferred.computed == 7 + 2


def test_a_last_micro_batch_without_a_loss_hands_over():
    ordinary, deferred = Module(skip={2, 5}), Module(skip={2, 5})
    train(ordinary)
    train(deferred, DeferralCallback())
    assert_same(deferred, ordinary)


def test_figures_are_logged_every_so_many_steps():
    module = Module()
    trainer = train(module, DeferralCallback(log_every=2))
    names = {
        f"filterwise/{name}" for name in ("raw_std_min", "gain_min", "gain_median", "gain_max")
    }
    assert module.logged == [(step, names) for step in (2, 4, 6)]
    got = {name: float(trainer.callback_metrics[f"filterwise/{name}"]) for name in ("gain_max",)}
    assert got["gain_max"] == pytest.approx(
        float(module.net[0].gain.detach().abs().max()), rel=1e-6
    )
    quiet = Module()
    train(quiet, DeferralCallback(log_every=0))
    assert not quiet.logged


def test_an_exception_leaves_deferral():
    module = Module(broken=4)
    with pytest.raises(RuntimeError, match="broken on purpose"):
        train(module, DeferralCallback())
    assert host.keeper_of(module.net[0]).mode not in ("defer", "hand over")


def test_a_module_that_optimizes_by_hand_is_refused():
    module = Module()
    module.automatic_optimization = False
    with pytest.raises(RuntimeError, match=r"write filterwise\.defer in training_step"):
        train(module, DeferralCallback(), accumulate=1)
    with pytest.raises(ValueError, match="log_every"):
        DeferralCallback(log_every=-1)


def test_figures_of_a_plain_model_and_of_one_without_gains():
    model = nn.Sequential(nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8))
    assert weight_figures(model) == {}
    fw.convert_(model, "gn(2)+ws")
    model[0].weight.data[3] *= 1e-3
    figures = weight_figures(model)
    assert set(figures) == {"raw_std_min"}
    expected = model[0].weight[3].detach().double().std(correction=0)
    assert figures["raw_std_min"] == pytest.approx(float(expected), rel=1e-5)
