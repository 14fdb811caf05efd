"""The line of a run in results.jsonl."""

from __future__ import annotations

import json

import pytest
from pydantic import ValidationError

from filterwise.lab.reproduce.records import ReproduceRecord, ReproduceResults, read
from filterwise.lab.training.train import train
from support.trainings import settings

FACTS = {"recipe": "wa/table1", "recipe_sha256": "ab" * 32, "row": "WA", "budget": "smoke"}


@pytest.fixture(scope="module")
def run():
    return train(settings(optimization={"epochs": 1}))


@pytest.fixture
def results(tmp_path):
    found = ReproduceResults(tmp_path / "run")
    found.prepare()
    return found


def test_what_is_added_is_read_back(results, run):
    shrunk = {"optimization.epochs": (300, 3), "model.width": (1.0, 0.25)}
    record = ReproduceRecord(**FACTS, shrunk=shrunk, run=run)
    results.add(record)
    assert read(results.folder) == [record]
    line = json.loads(results.path.read_text())
    assert list(line) == ["recipe", "recipe_sha256", "row", "budget", "shrunk", "run"]
    assert line["run"]["metrics"] == run.metrics


def test_one_run_may_stand_in_two_rows_and_once_in_each(results, run):
    one = ReproduceRecord(**FACTS, shrunk={}, run=run)
    other = one.model_copy(update={"row": "WA, again"})
    for record in (one, other, one):
        results.add(record)
    assert read(results.folder) == [one, other]


def test_a_folder_without_results_has_none(tmp_path):
    assert read(tmp_path / "nowhere") == []


def test_a_budget_of_another_name_is_refused(run):
    with pytest.raises(ValidationError, match="budget"):
        ReproduceRecord(**{**FACTS, "budget": "tiny"}, shrunk={}, run=run)
