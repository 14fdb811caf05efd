"""Estimates: networks counted against published sizes, and how many runs fit side by side."""

from __future__ import annotations

import pytest

from filterwise.lab.reproduce import estimate
from filterwise.lab.reproduce.budgets import shrunk_to
from filterwise.lab.reproduce.experiments import find_experiment
from filterwise.lab.training.settings import checked_training


@pytest.mark.parametrize(
    ("name", "side", "operations", "parameters", "layers"),
    [
        ("resnet50", 224, 4.09e9, 25.56e6, 54),  # as torchvision's page states them
        ("resnet18_cifar", 32, 0.56e9, 11.17e6, 21),
        ("wide_residual_20", 32, 1.46e9, 9.73e6, 22),
    ],
)
def test_networks_are_counted(name, side, operations, parameters, layers):
    classes = 1000 if side == 224 else 10
    found = estimate.footprint(name, 1.0, 3, classes, side)
    assert found.operations == pytest.approx(operations, rel=0.02)
    assert found.parameters == pytest.approx(parameters, rel=0.01)
    assert found.layers == layers


def test_time_grows_with_epochs_and_a_gpu_is_faster():
    experiment = find_experiment("wa/table1")
    full = experiment.settings(experiment.row("WA"))
    small, _ = shrunk_to(full, "smoke")
    on_gpu = full.model_copy(
        update={"execution": full.execution.model_copy(update={"device": "cuda"})}
    )
    assert estimate.seconds_of(small) < 1e-3 * estimate.seconds_of(full)
    assert estimate.seconds_of(on_gpu) < 0.01 * estimate.seconds_of(full)
    # The recipe's own figure was made apart: 2300 hours on two cores for ten rows.
    assert estimate.seconds_of(full) / 3600 == pytest.approx(2300 * 2 / 10, rel=0.5)


def test_runs_side_by_side_have_a_core_each_and_memory_for_all(monkeypatch):
    run = checked_training({"data": {"name": "cifar10"}, "model": {"name": "resnet50_cifar"}})
    need = estimate.memory_of(run)
    monkeypatch.setattr(estimate, "cores", lambda: 8)
    for free, wanted in ((100, 8), (4, 3), (0.5, 1)):
        monkeypatch.setattr(estimate, "free_memory", lambda free=free: free * need)
        assert estimate.side_by_side([run] * 20) == wanted
    monkeypatch.setattr(estimate, "free_memory", lambda: 100 * need)
    assert estimate.side_by_side([run] * 3) == 3
    gpu = run.model_copy(update={"execution": run.execution.model_copy(update={"device": "cuda"})})
    assert estimate.side_by_side([gpu] * 20) == 1


def test_memory_in_use_is_what_the_system_says():
    assert 1e6 < estimate.free_memory() < 1e14


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(5, "5 s"), (119, "119 s"), (130, "2.2 min"), (1e5, "28 h"), (1e7, "116 days")],
)
def test_times_are_said_as_a_person_would(seconds, words):
    assert estimate.readable(seconds) == words
