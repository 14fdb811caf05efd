"""Recipe files: what they may say, and with which words, file and line the rest is refused."""

from __future__ import annotations

import pytest

from filterwise.lab.errors import LabError, UsageError
from filterwise.lab.reproduce.experiments import find_experiment, read_experiment
from support.recipes import DEFAULTS, TABLE, write_recipe


def test_a_row_lies_over_the_recipe_and_that_over_the_defaults(tmp_path):
    experiment = read_experiment(write_recipe(tmp_path))
    row = experiment.row("WA")
    settings = experiment.settings(row)
    assert settings.optimization.weight_decay == 1e-3  # of the defaults
    assert settings.optimization.learning_rate == 0.05  # of the recipe
    assert settings.model.recipe == "wa"  # of the row
    assert experiment.settings(experiment.row("GN")).optimization.learning_rate == 0.2
    assert row.paper["error"].value == 24.92
    assert experiment.seeds == 2


def test_a_schedule_of_another_kind_takes_the_place_of_the_one_before(tmp_path):
    changed = TABLE.replace(
        "run: {model: {recipe: wa}}",
        "run: {model: {recipe: wa}, optimization: {schedule: {kind: cosine}}}",
    )
    experiment = read_experiment(write_recipe(tmp_path, changed))
    assert experiment.settings(experiment.row("WA")).optimization.schedule.kind == "cosine"
    assert experiment.settings(experiment.row("GN")).optimization.schedule.kind == "steps"


@pytest.mark.parametrize(
    ("old", "new", "line", "words"),
    [
        ("where:", "wher:", 2, "there is no key wher. Nearest: where."),
        ("better: lower", "better: less", 6, "it is none of 'lower' or 'higher'"),
        ("status: printed}", "status: printd}", 15, "Nearest: printed."),
        ("  data: {name: digits", "  data: {nam: digits", 8, "no key data.nam. Nearest: name."),
        ("learning_rate: 0.05", "learning_rate: -1", 10, "optimization.learning_rate: -1: "),
        ("run: {model: {recipe: wa}}", "run: {model: {recipe: waa}}", 14, "model.recipe"),
        ("label: GN", "label: WA", 1, "two rows have the label 'WA'"),
        ("paper: {error:", "paper: {eror:", 1, "there is no metric 'eror'. Nearest: error."),
        ("task: classification", "task: clasification", 4, "Nearest: classification."),
        ("id: me/table", "id: me/other", 1, "is not that of this file of this paper, 'me/table'"),
        ("title: A table", "title: A table\ntitle: Again", 4, "'title': it is there already"),
        ("title: A table", "title: &anchor A table\ncost: *anchor", 4, "a recipe has no anchors"),
        ("title: A table", "title: !!python/object:os.system x", 3, "could not determine"),
        ("title: A table", "title: [A table", 4, "expected ',' or ']'"),
        ("value: 24.92", "value: null", 15, "what is printed is a value or a mark"),
        (
            "milestones: [1]",
            "milestones: [9]",
            14,
            "row 'WA': the schedule's milestone 9 is never reached in 2 epochs",
        ),
    ],
)
def test_what_is_wrong_is_named_with_file_and_line(tmp_path, old, new, line, words):
    assert TABLE.count(old) >= 1
    path = write_recipe(tmp_path, TABLE.replace(old, new, 1))
    with pytest.raises(UsageError) as caught:
        read_experiment(path)
    assert str(caught.value).startswith(f"{path} line {line}: "), caught.value
    assert words in str(caught.value)


def test_a_fault_in_the_defaults_is_told_with_their_line(tmp_path):
    path = write_recipe(tmp_path, defaults=DEFAULTS.replace("weight_decay", "weight_dekay"))
    with pytest.raises(
        UsageError, match=r"defaults\.yaml line 6: .*weight_dekay\. Nearest: weight"
    ):
        read_experiment(path)


def test_a_recipe_that_is_not_there_names_the_nearest(tmp_path):
    with pytest.raises(UsageError, match=r"no recipe 'wa/tabel1'\. Nearest: wa/table1\."):
        find_experiment("wa/tabel1")
    with pytest.raises(UsageError, match="there is no recipe file"):
        find_experiment(str(tmp_path / "mine.yaml"))
    lonely = tmp_path / "lonely.yaml"
    lonely.write_text(TABLE)
    with pytest.raises(LabError, match=r"defaults\.yaml cannot be read"):
        find_experiment(str(lonely))


def test_rows_are_found_by_label_or_by_method(tmp_path):
    experiment = read_experiment(write_recipe(tmp_path))
    assert [row.label for row in experiment.rows(["gn"])] == ["GN"]
    assert [row.label for row in experiment.rows(["Plain"])] == ["none", "BN, dash"]
    with pytest.raises(UsageError, match=r"has no row 'GNN'\. Nearest: GN\."):
        experiment.rows(["GNN"])
