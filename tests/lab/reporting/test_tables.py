"""Medians, intervals and pairs against numbers worked out by hand."""

from __future__ import annotations

import itertools

import numpy
import pytest

from filterwise.lab.reporting.differences import means, pairs
from filterwise.lab.reporting.tables import tables
from filterwise.lab.reproduce.experiments import read_experiment
from filterwise.lab.statistics import RESAMPLES, from_value, paired, statistic
from support.reproduced import a_full_table, line, write_recipe


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    return read_experiment(write_recipe(tmp_path_factory.mktemp("recipe")))


def made(experiment, *lines):
    return tables(lines, {"toy/table1": experiment}.get)


def test_a_line_has_median_quartiles_best_and_distance_from_the_paper(experiment):
    (table,) = made(experiment, *(line("BN, 64", 0.06 + 0.01 * s, seed=s) for s in range(3)))
    (row,) = table.lines
    found = row.metrics["error"]
    assert found.by_seed == pytest.approx({0: 6.0, 1: 7.0, 2: 8.0})
    assert found.spread == pytest.approx((6.5, 7.0, 7.5))
    assert found.best == pytest.approx(6.3)
    assert found.paper.value == 5.0
    assert found.difference.value == pytest.approx(2.0)
    assert (found.difference.low, found.difference.high) == pytest.approx((1.0, 3.0))
    assert found.difference.seen
    spread = row.metrics["spread"]
    assert spread.value == pytest.approx(1.0)
    assert spread.difference.value == pytest.approx(0.6)


def test_the_bootstrap_is_that_of_all_draws():
    """Of five values there are 3125 draws; their medians' percentiles are the interval's ends."""
    values = [1.0, 2.5, 3.0, 4.5, 9.0]
    every = [numpy.median(draw) for draw in itertools.product(values, repeat=5)]
    found = from_value(values, 3.2)
    assert found.value == pytest.approx(-0.2)
    assert (found.low, found.high) == pytest.approx(
        tuple(numpy.percentile(every, (2.5, 97.5)) - 3.2)
    )
    assert not found.seen
    assert RESAMPLES >= 2000


def test_pairs_are_drawn_by_seed():
    """What two rows have in common over the seeds falls out of their difference."""
    levels = [1.0, 5.0, 2.0, 8.0, 3.0, 9.0, 4.0]
    found = paired(
        {seed: level + 0.5 for seed, level in enumerate(levels)},
        dict(enumerate(levels)) | {99: 0.0},
    )
    assert (found.value, found.low, found.high) == pytest.approx((0.5, 0.5, 0.5))
    assert found.seen
    assert paired({0: 1.0}, {1: 1.0}) is None


def test_an_interval_that_touches_zero_shows_no_difference():
    assert not from_value([7.0, 7.2, 7.4], 7.0 + 1e-15).seen
    assert from_value([7.1, 7.2, 7.4], 7.0).seen


def test_one_seed_has_no_interval_and_no_spread(experiment):
    (table,) = made(experiment, line("BN, 64", 0.06))
    found = table.lines[0].metrics
    assert found["error"].difference.value == pytest.approx(1.0)
    assert found["error"].difference.low is None
    assert not found["error"].difference.seen
    assert found["spread"].value is None
    assert statistic([3.0], "iqr") == 0


def test_nothing_shrunk_has_a_difference_from_the_paper(experiment):
    shrunk = {"optimization.epochs": (300, 4)}
    lines = [line("BN, 64", 0.06, seed=s, budget="smoke", shrunk=shrunk) for s in range(3)]
    (table,) = made(experiment, *lines)
    assert not table.comparable
    assert all(found.difference is None for found in table.lines[0].metrics.values())
    assert means(table) == []
    (both,) = made(
        experiment,
        *lines,
        *(line("BN, 8", 0.06, seed=s, budget="smoke", shrunk=shrunk) for s in range(3)),
    )
    assert [each.difference for each in means(both)] == [None]


def test_budgets_stand_apart_the_paper_s_own_first(experiment):
    smoke = line(budget="smoke", shrunk={"optimization.epochs": (300, 4)})
    found = made(experiment, smoke, line(), line(seed=1))
    assert [(table.budget, len(table.records)) for table in found] == [("full", 2), ("smoke", 1)]


def test_runs_of_other_settings_are_not_put_together(experiment):
    other = {"weight_decay": 1e-3}
    (table,) = made(experiment, line(seed=0), line(seed=1), line(seed=0, optimization=other))
    assert [row.name for row in table.lines] == [
        "BN, 64 (optimization.weight_decay 0.0005)",
        "BN, 64 (optimization.weight_decay 0.001)",
    ]
    assert [len(row.runs) for row in table.lines] == [2, 1]


def test_divergence_and_failure_are_results(experiment):
    (table,) = made(
        experiment,
        line("none, 64", 0.9, diverged=(2, 1)),
        line("none, 64", 0.1, seed=1),
        line("BN, 8", None, why="one value a channel"),
    )
    none, bn = table.lines
    assert (none.label, none.diverged, none.failed) == ("none, 64", 1, None)
    assert none.metrics["error"].spread.median == pytest.approx(50.0)
    assert (bn.diverged, bn.failed) == (0, "one value a channel")
    assert bn.metrics["error"].value is None


def test_rows_without_runs_are_named(experiment):
    (table,) = made(experiment, *a_full_table())
    assert table.not_run == {"GN, 1": "the paper has no such run"}
    assert table.missing == ("GN, 64",)
    assert [row.label for row in table.lines] == [
        "none, 8",
        "none, 64",
        "BN, 8",
        "BN, 64",
        "WA, 8",
        "WA, 64",
    ]


def test_a_method_stands_against_its_norm_alone_and_batch_norm_in_the_same_place(experiment):
    (table,) = made(experiment, *a_full_table())
    found = [pair for pair in pairs(table) if pair.metric == "error"]
    assert [(pair.line.label, pair.other.label, pair.seeds) for pair in found] == [
        ("WA, 8", "none, 8", 3),
        ("WA, 8", "BN, 8", 3),
        ("WA, 64", "none, 64", 1),
        ("WA, 64", "BN, 64", 1),
    ]
    assert [pair.paper for pair in found] == [-3.5, -1.0, None, None]
    assert found[1].difference.value == pytest.approx(-1.6)
    assert found[1].differing == ()


def test_the_mean_of_rows_is_formed_seed_by_seed(experiment):
    (table,) = made(experiment, *a_full_table())
    (mean,) = means(table)
    by_hand = numpy.array([7.0 + 0.2 * s + 6.0 + 0.1 * s for s in range(3)]) / 2
    assert mean.spread == pytest.approx(tuple(numpy.percentile(by_hand, (25, 50, 75))))
    assert mean.difference.value == pytest.approx(numpy.median(by_hand) - 6.0)


def test_an_unknown_recipe_is_shown_as_measured():
    (table,) = tables(
        [line(recipe="other/fig9"), line(recipe="other/fig9", seed=1)], lambda _: None
    )
    (row,) = table.lines
    assert row.metrics["error"].spread.median == pytest.approx(5.0)
    assert row.metrics["error"].paper is None


def test_runs_of_another_version_of_the_recipe_are_counted(experiment):
    (table,) = made(experiment, line(), line(seed=1, sha256=experiment.sha256))
    assert table.outdated == 1
