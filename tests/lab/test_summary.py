"""Tables and differences against numbers worked out by hand or by numpy."""

from __future__ import annotations

import numpy
import pytest

from filterwise.lab.summary import Cell
from filterwise.lab.timing import StepTime
from support.runs import PANEL, record, summary_of


def test_medians_and_quartiles():
    errors = (0.04, 0.05, 0.09)
    summary = summary_of(*(record("bn", error, seed=s) for s, error in enumerate(errors)))
    row = summary.tables[0].rows[0]
    assert (row.lower, row.median, row.upper) == tuple(numpy.percentile(errors, (25, 50, 75)))
    assert row.errors == errors
    assert row.seeds == 3
    assert [point.median for point in row.curve] == pytest.approx([0.10, 0.05])


def test_rows_stand_in_the_order_of_the_recipes():
    records = [record("bn"), record("gn+ws"), record("none")]
    summary = summary_of(*records, recipes=["none", "gn+ws", "bn"])
    assert [row.recipe for row in summary.tables[0].rows] == ["none", "gn+ws", "bn"]
    assert summary.tables[0].title == "Table 1: plain net, learning rate 0.1, micro-batch 64"


def test_divergence_is_counted_and_its_error_with_it():
    rows = (
        summary_of(
            record("wa", 0.05, seed=0),
            record("wa", 1.0, seed=1, diverged=(1, 2)),
            record("wa", 0.9, seed=2, diverged=(2, 1)),
        )
        .tables[0]
        .rows
    )
    assert rows[0].diverged == 2
    assert rows[0].median == 0.9


def test_a_failure_has_no_error():
    summary = summary_of(record("bn", failed="one value"), record("gn", 0.05))
    bn = summary.tables[0].rows[0]
    assert (bn.median, bn.failed) == (None, "one value")
    assert [row.recipe for row in summary.tables[0].trained()] == ["gn"]
    assert summary.difference(Cell(PANEL, "bn"), Cell(PANEL, "gn")) is None


def test_step_times_stand_in_their_row():
    step = StepTime(1.2, 1.1, 1.3, 5.0, 9)
    steps = {Cell(PANEL, "gn"): step}
    rows = summary_of(record("bn"), record("gn"), steps=steps).tables[0].rows
    assert (rows[0].step, rows[1].step) == (None, step)


def test_noise_is_what_chance_does_with_as_many_pictures():
    """Compare the formula with draws of two networks that share half of their wrong answers."""
    pictures, error = 1000, 0.06
    generator = numpy.random.default_rng(1)
    both = generator.random((20_000, pictures)) < error / 2
    one = both | (generator.random(both.shape) < error / 2)
    other = both | (generator.random(both.shape) < error / 2)
    differences = 100 * (one.mean(1) - other.mean(1))
    summary = summary_of(record("bn"))
    assert summary.noise(error) == pytest.approx(1.96 * differences.std(), rel=0.05)
    assert summary.noise(0.0) == pytest.approx(100 * 1.96 / pictures)


def test_identical_networks_show_no_difference():
    wrong = range(50)
    summary = summary_of(record("bn", wrong=wrong), record("gn", wrong=wrong))
    difference = summary.difference(Cell(PANEL, "bn"), Cell(PANEL, "gn"))
    assert (difference.points, difference.low, difference.high) == (0.0, 0.0, 0.0)
    assert not difference.seen


def test_the_interval_of_a_difference_is_the_paired_one():
    """One seed: 60 pictures wrong for one network alone, 20 for the other alone, 30 for both."""
    summary = summary_of(
        record("bn", wrong=range(90)), record("gn", wrong=[*range(60, 90), *range(500, 520)])
    )
    difference = summary.difference(Cell(PANEL, "bn"), Cell(PANEL, "gn"))
    assert difference.points == pytest.approx(4.0)
    # Variance of the mean of 60 times +1, 20 times -1 and zeros.
    deviation = 100 * numpy.sqrt((80 / 1000 - 0.04**2) / 1000)
    assert difference.low == pytest.approx(4 - 1.96 * deviation, abs=0.25)
    assert difference.high == pytest.approx(4 + 1.96 * deviation, abs=0.25)
    assert difference.seen


def test_seeds_that_disagree_hide_a_difference():
    records = [record("bn", error, seed=s) for s, error in enumerate((0.04, 0.08, 0.30))]
    records += [record("gn", error, seed=s) for s, error in enumerate((0.30, 0.05, 0.04))]
    difference = summary_of(*records).difference(Cell(PANEL, "bn"), Cell(PANEL, "gn"))
    assert difference.points == pytest.approx(3.0)
    assert difference.low < 0 < difference.high
    assert not difference.seen


def test_a_sure_but_tiny_difference_is_not_called_one():
    """13 wrong answers more on the same pictures: the interval leaves zero out, chance does not."""
    summary = summary_of(record("bn", wrong=range(73)), record("gn", wrong=range(60)))
    difference = summary.difference(Cell(PANEL, "bn"), Cell(PANEL, "gn"))
    assert difference.low > 0
    assert difference.points < summary.noise(0.06)
    assert not difference.seen


def test_the_bootstrap_is_the_same_every_time():
    records = [record("bn", 0.05, seed=s) for s in range(3)]
    records += [record("gn", 0.08, seed=s) for s in range(3)]
    cells = (Cell(PANEL, "bn"), Cell(PANEL, "gn"))
    assert summary_of(*records).difference(*cells) == summary_of(*records).difference(*cells)
