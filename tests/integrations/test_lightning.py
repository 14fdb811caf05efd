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
from filterwise.integrations.lightning import DeferralCallback, MonitorCallback, weight_figures

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


@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
def test_a_monitor_changes_nothing_and_counts_optimizer_steps(first):
    alone, watched = Module(), Module()
    train(alone, DeferralCallback(log_every=0))
    watch = MonitorCallback(every=1)
    both = [watch, DeferralCallback(log_every=0)]
    train(watched, *(both if first else both[::-1]))
    assert all(
        torch.equal(a, b) for a, b in zip(alone.parameters(), watched.parameters(), strict=True)
    )
    assert watch.findings == []
    assert watch.state_dict() == {"step": 6, "spoken": []}


def heard(module, watch, **options):
    with warnings.catch_warnings(record=True) as seen:
        # Inside `train` everything is ignored, but for what this list sees.
        warnings.simplefilter("always")
        trainer = Trainer(
            max_epochs=1,
            accelerator="cpu",
            callbacks=[watch],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, torch.utils.data.DataLoader(batches(), batch_size=None), **options)
    return trainer, [str(one.message) for one in seen if one.category is fw.TrainingWarning]


def test_a_monitor_speaks_once_and_not_again_after_a_checkpoint(tmp_path):
    watch = MonitorCallback(every=1, turn=1e-3)
    trainer, spoken = heard(Module(), watch)
    assert [one for one in spoken if "turned its filters by" in one] == spoken
    assert spoken == [str(one) for one in watch.findings]
    assert len(spoken) == 1
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    again = MonitorCallback(every=1, turn=1e-3)
    again.load_state_dict(watch.state_dict())
    _, spoken = heard(Module(), again)
    assert spoken == []
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"]
    assert saved[watch.state_key] == {"step": 7, "spoken": ["turn"]}


def test_a_monitor_takes_the_loaders_batch_size():
    module = Module()
    module.net[1] = nn.BatchNorm2d(8).double()
    watch = MonitorCallback()
    data = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(*map(torch.cat, zip(*batches(), strict=True))), batch_size=2
    )
    train(module, watch, data=data, epochs=1)
    assert [one.what for one in watch.findings] == ["1 BatchNorms see 2 samples a forward"]


def test_figures_of_a_plain_model_and_of_one_without_gains():
    model = nn.Sequential(nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8))
    assert weight_figures(model) == {}
    fw.convert_(model, "gn(2)+ws")
    model[0].weight.data[3] *= 1e-3
    figures = weight_figures(model)
    assert set(figures) == {"raw_std_min"}
    expected = model[0].weight[3].detach().double().std(correction=0)
    assert figures["raw_std_min"] == pytest.approx(float(expected), rel=1e-5)
