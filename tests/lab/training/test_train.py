"""A run: what it comes to, how it is resumed, what it leaves, and what is refused."""

from __future__ import annotations

import csv
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from torch import nn

from filterwise.lab.architectures import ARCHITECTURES
from filterwise.lab.architectures.small import PlainNet
from filterwise.lab.data import load
from filterwise.lab.errors import LabError, UsageError
from filterwise.lab.nets import build
from filterwise.lab.training.checkpoint import read_weights
from filterwise.lab.training.loop import Stopped
from filterwise.lab.training.train import train
from support import trainings
from support.trainings import settings, weights


class Dropping(PlainNet):
    """A net that draws random numbers at every forward."""

    def forward(self, pictures):
        pictures = nn.functional.dropout(pictures, 0.2, self.training)
        return super().forward(pictures)


@pytest.fixture(autouse=True)
def _dropping(monkeypatch):
    monkeypatch.setitem(ARCHITECTURES, "dropping", Dropping)


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def same_outcome(one, other):
    return (one.metrics, one.curve, one.steps) == (other.metrics, other.curve, other.steps)


@pytest.mark.parametrize("recipe", ["bn", "equinorm"])
def test_a_run_resumes_to_the_bit_from_every_step(tmp_path, recipe):
    """Momentum, running statistics, order, dropout and the sums for the curve all go on."""
    wanted = settings(
        model={"name": "dropping", "recipe": recipe},
        optimization={"epochs": 2, "schedule": {"kind": "cosine"}},
        execution={"checkpoint_steps": 1},
    )
    whole, kept = tmp_path / "whole", []

    def keep(_):
        with_steps = whole / "checkpoint.pt"
        if with_steps.exists():
            kept.append(with_steps.read_bytes())

    record = train(wanted, whole, advance=keep)
    assert record.steps == 10
    assert len(set(kept)) >= 9
    for number, checkpoint in enumerate(dict.fromkeys(kept)):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "checkpoint.pt").write_bytes(checkpoint)
        torch.rand(number + 1)
        again = train(wanted, folder)
        assert again.times["resumed"] == 1
        assert same_outcome(again, record)
        assert equal(weights(folder), weights(whole))


def test_a_killed_run_resumes_to_the_bit(tmp_path):
    values = {
        "data": {"train_samples": 400, "test_samples": 100},
        "model": {"recipe": "bn+ws"},
        "optimization": {"epochs": 4, "step_size": 16, "micro_batch": 4},
        "execution": {"checkpoint_steps": 3},
    }
    command = [sys.executable, trainings.__file__, json.dumps(values), str(tmp_path / "killed")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    process = subprocess.Popen(command, env=environment)
    try:
        wait_for(tmp_path / "killed" / "checkpoint.pt", process)
        time.sleep(0.3)
        assert process.poll() is None
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (tmp_path / "killed" / "record.json").exists()
    again = train(trainings.checked_training(values), tmp_path / "killed")
    whole = train(trainings.checked_training(values), tmp_path / "whole")
    assert again.times["resumed"] == 1
    assert whole.times["resumed"] == 0
    assert same_outcome(again, whole)
    assert equal(weights(tmp_path / "killed"), weights(tmp_path / "whole"))


def wait_for(path: Path, process, seconds=400):
    until = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, "ended before it was killed"
        assert time.monotonic() < until
        time.sleep(0.02)


def test_two_processes_come_to_what_one_comes_to(tmp_path):
    """Shares of 15 and 16 in micro-batches of 4, and a ragged last step: weights by sample."""
    values = settings(
        model={"recipe": "gn+ws"},
        optimization={"step_size": 31, "micro_batch": 4, "momentum": 0.8},
        precision="64-true",
    ).model_dump(mode="json")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [trainings.__file__, json.dumps(values), str(tmp_path / "two")]
    subprocess.run(command, env=environment, check=True, timeout=400, capture_output=True)
    two = json.loads((tmp_path / "two" / "record.json").read_text())
    one = train(trainings.checked_training(values), tmp_path / "one")
    assert two["hardware"]["processes"] == 2
    assert two["steps"] == one.steps == 10
    assert two["metrics"] == pytest.approx(one.metrics, abs=1e-6)
    for mine, theirs in zip(one.curve, two["curve"], strict=True):
        assert mine["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-12)
    theirs = weights(tmp_path / "two")
    for name, value in weights(tmp_path / "one").items():
        torch.testing.assert_close(theirs[name], value, rtol=1e-9, atol=1e-11)


def test_a_ragged_step_is_scaled_by_its_own_samples(tmp_path):
    """150 pictures in steps of 64 leave 22, of micro-batch 20 and 2: against plain torch."""
    wanted = settings(
        optimization={"epochs": 1, "step_size": 64, "micro_batch": 20, "momentum": 0.0},
        precision="64-true",
        data={"train_samples": None, "test_samples": 50, "name": "digits"},
    )
    wanted = wanted.model_copy(
        update={"data": wanted.data.model_copy(update={"train_samples": 150})}
    )
    train(wanted, tmp_path)
    from filterwise.lab.data.live import LivePictures
    from filterwise.lab.training.place import make_fabric
    from filterwise.lab.training.seeds import seed_everything

    seed_everything(0, "model")
    model, _ = build("plain", "gn+ws", 1, 10)
    model.double()
    batches = LivePictures(load("digits"), wanted, make_fabric())
    sizes = []
    for step in batches.epoch(0, 0):
        pictures = torch.cat([part[0] for part in step.parts])
        labels = torch.cat([part[1] for part in step.parts])
        sizes.append([len(part[1]) for part in step.parts])
        model.zero_grad()
        nn.functional.cross_entropy(model(pictures), labels).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                decay = 5e-4 if parameter.dim() > 1 else 0.0
                parameter -= 0.1 * (parameter.grad + decay * parameter)
    assert sizes == [[20, 20, 20, 4], [20, 20, 20, 4], [20, 2]]
    for name, value in weights(tmp_path).items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-9, atol=1e-12)


def test_a_finished_run_is_read_and_not_run_again(tmp_path):
    record = train(settings(), tmp_path)
    shares = []
    assert train(settings(), tmp_path, advance=shares.append) == record
    assert not shares
    assert not (tmp_path / "checkpoint.pt").exists()


def test_what_a_run_leaves(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    shares = []
    record = train(settings(evaluate_every=2), tmp_path, advance=shares.append)
    assert sum(shares) == pytest.approx(1)
    assert record.status == "finished"
    assert record.facts["classes"] == 10
    assert record.facts["parameters"] == sum(p.numel() for p in weights(tmp_path).values())
    with (tmp_path / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert rows[0]["error"] == ""
    assert float(rows[1]["error"]) == record.metrics["error"]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    losses = [event.value for event in events.Scalars("train_loss")]
    assert losses == pytest.approx([point["train_loss"] for point in record.curve])
    assert equal(read_weights(tmp_path), weights(tmp_path))


def test_metrics_are_those_of_the_model(tmp_path):
    record = train(settings(data={"test_samples": None}), tmp_path)
    model, _ = build("plain", "gn+ws", 1, 10)
    model.load_state_dict(weights(tmp_path))
    data = load("digits")
    mean, deviation = data.channel_statistics()
    with torch.no_grad():
        logits = model.eval()((data.test_pictures - mean) / deviation)
    wrong = (logits.argmax(1) != data.test_labels).double().mean()
    five = (logits.topk(5).indices != data.test_labels[:, None]).all(1).double().mean()
    loss = nn.functional.cross_entropy(logits, data.test_labels)
    assert record.metrics["error"] == pytest.approx(float(wrong), abs=1e-6)
    assert record.metrics["error_top5"] == pytest.approx(float(five), abs=1e-6)
    assert record.metrics["loss"] == pytest.approx(float(loss), rel=1e-5)


def test_divergence_is_a_result(tmp_path):
    record = train(
        settings(model={"recipe": "none"}, optimization={"learning_rate": 1e9}), tmp_path
    )
    assert record.status == "diverged"
    epoch, step = record.diverged_at
    assert record.steps == 5 * (epoch - 1) + step - 1
    assert 0.5 < record.metrics["error"] <= 1
    assert train(settings(model={"recipe": "none"}, optimization={"learning_rate": 1e9}), tmp_path)


def test_answers_that_are_not_finite_are_wrong():
    from filterwise.lab.tasks.classification import Scores

    scores = Scores(10, torch.device("cpu"))
    labels = torch.arange(4)
    logits = nn.functional.one_hot(labels, 10).float()
    logits[0] = math.nan
    logits[1, 1] = math.inf
    scores.update(logits, labels)
    found = scores.compute()
    assert found["error"] == 0.5
    assert found["error_top5"] == 0.5
    assert "loss" not in found


def test_batch_norm_on_one_value_is_a_named_failure(tmp_path):
    record = train(
        settings(
            model={"name": "resnet18", "recipe": "bn"},
            data={"train_samples": 4},
            optimization={"micro_batch": 1},
        ),
        tmp_path,
    )
    assert record.status == "failed"
    assert record.why == "the norm sees one value a channel, which torch refuses to train on"


def test_a_run_that_is_asked_to_stop_goes_on_from_there(tmp_path):
    calls = []

    def asked():
        calls.append(None)
        return len(calls) > 3

    with pytest.raises(Stopped):
        train(settings(), tmp_path / "stopped", asked_to_stop=asked)
    again = train(settings(), tmp_path / "stopped")
    assert again.times["resumed"] == 1
    assert same_outcome(again, train(settings()))


def test_a_folder_belongs_to_one_run(tmp_path):
    train(settings(), tmp_path)
    with pytest.raises(UsageError, match="belongs to a run of other settings"):
        train(settings(seed=1), tmp_path)


def test_two_processes_do_not_train_in_one_folder(tmp_path):
    with (
        FileLock(tmp_path / ".lock"),
        pytest.raises(LabError, match="another process is training in it"),
    ):
        train(settings(), tmp_path)


@pytest.mark.parametrize("content", [b"", b"no checkpoint", "half"])
def test_a_broken_checkpoint_is_one_line(tmp_path, content):
    with pytest.raises(Stopped):
        train(settings(), tmp_path, asked_to_stop=lambda: True)
    path = tmp_path / "checkpoint.pt"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if content == "half" else content)
    with pytest.raises(LabError, match=r"checkpoint\.pt cannot be read: ") as caught:
        train(settings(), tmp_path)
    assert "\n" not in str(caught.value)


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(LabError, match="cannot be written to"):
        train(settings(), tmp_path / "file")


def test_a_run_without_folder_keeps_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert train(settings()).status == "finished"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["mlflow", "wandb"])
def test_trackers_get_the_curve(tmp_path, name, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    if shutil.which("true") is None or not _installed(name):
        pytest.skip(f"{name} is not installed: pip install 'filterwise[tracking]'")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    record = train(settings(execution={"loggers": (name,)}), tmp_path)
    if name == "mlflow":
        import mlflow

        (run,) = mlflow.search_runs(search_all_experiments=True, output_format="list")
        assert run.data.metrics["error"] == pytest.approx(record.metrics["error"])
        assert run.data.params["model.recipe"] == "gn+ws"
    else:
        assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))


def _installed(name):
    from importlib.util import find_spec

    return find_spec(name) is not None
