"""Sentences: each is there when the numbers say so, and another when they do not."""

from __future__ import annotations

import pytest

from filterwise.lab.reading import percent, read
from filterwise.lab.summary import Cell
from filterwise.lab.timing import StepTime
from support.runs import PANEL, record, summary_of


def texts(*records, side=None, steps=None):
    sentences = read(summary_of(*records, steps=steps))
    return [each.text for each in sentences if side in (None, each.side)]


def runs(recipe, *errors, **changes):
    return [record(recipe, error, seed=seed, **changes) for seed, error in enumerate(errors)]


def test_percent():
    assert [percent(0.04338), percent(1.0), percent(None)] == ["4.3", "100.0", "-"]


def test_batch_norm_that_wins_speaks_against():
    found = texts(*runs("bn", 0.05, 0.05), *runs("gn+ws", 0.15, 0.15), side="against")
    assert found[0].startswith(
        "Table 1: batch normalization beats every weight method (bn 5.0 %, gn+ws 15.0 %;"
        " 10.0 points, 95 % interval "
    )


def test_batch_norm_that_ties_speaks_against():
    found = texts(*runs("bn", 0.050, 0.052), *runs("gn+ws", 0.051, 0.049), side="against")
    assert found == [
        "Table 1: batch normalization ties the best weight method (bn 5.1 %, gn+ws 5.0 %): nothing"
        " is gained here."
    ]


def test_batch_norm_that_loses_speaks_for():
    found = texts(*runs("bn", 0.70, 0.72), *runs("gn+ws", 0.05, 0.05), side="for")
    assert found[0].startswith("Table 1: gn+ws beats batch normalization (bn 71.0 %, gn+ws 5.0 %;")


def test_a_method_is_held_against_its_own_norm():
    gn = runs("gn", 0.10, 0.10)
    (better,) = texts(*gn, *runs("gn+ws", 0.04, 0.04), side="for")
    assert better.startswith("Table 1: gn+ws is better than gn alone (4.0 against 10.0 %; 6.0")
    (worse,) = texts(*gn, *runs("gn+ws", 0.20, 0.20), side="against")
    assert worse.startswith("Table 1: gn+ws is worse than gn alone (20.0 against 10.0 %; 10.0")
    (same,) = texts(*gn, *runs("gn+ws", 0.10, 0.10), side="against")
    assert same == "No difference seen between gn+ws and gn alone (table 1: 10.0 against 10.0 %)."
    (plain,) = texts(*runs("none", 0.1, 0.1), *runs("wa", 0.1, 0.1), side="against")
    assert "between wa and no normalization" in plain


def test_divergence_of_a_method_speaks_against_and_of_others_not():
    diverged = [record("wa", 1.0, seed=s, diverged=(1, 2)) for s in range(2)]
    diverged += [record("none", 1.0, seed=s, diverged=(1, 2)) for s in range(2)]
    found = read(summary_of(*diverged))
    sides = {each.text: each.side for each in found}
    assert sides["Table 1: wa diverged in 2 of 2 runs."] == "against"
    assert sides['Table 1: "none" diverged in 2 of 2 runs.'] == "note"


def test_a_net_at_chance_learned_nothing():
    found = texts(*runs("ws", 0.89, 0.90), *runs("gn", 0.5, 0.5), side="against")
    assert (
        "Table 1: ws learned nothing (89.5 %; guessing the commonest class is wrong on 90.0 %)."
        in found
    )
    assert not any("gn learned nothing" in text for text in texts(*runs("gn", 0.5, 0.5)))


def test_a_failure_is_named():
    found = texts(record("bn", failed="one value"), record("gn+ws", 0.05))
    assert "Table 1: bn cannot be trained: one value." in found


def test_micro_batches_are_compared():
    found = read(
        summary_of(
            *runs("bn", 0.05, 0.05),
            *runs("gn+ws", 0.05, 0.05),
            *runs("bn", 0.70, 0.70, micro_batch=1),
            *runs("gn+ws", 0.05, 0.05, micro_batch=1),
        )
    )
    sides = {each.text: each.side for each in found}
    start = "Plain net, learning rate 0.1, from micro-batch 64 to 1: "
    assert sides[f"{start}no difference seen with gn+ws."] == "for"
    (risen,) = [text for text in sides if "bn rises" in text]
    assert risen.startswith(f"{start}bn rises from 5.0 to 70.0 % (65.0 points, 95 % interval ")


def test_learning_rates_are_compared():
    found = read(
        summary_of(
            *runs("bn", 0.05, 0.05),
            *runs("wa", 0.05, 0.05),
            *runs("bn", 0.05, 0.05, learning_rate=0.3),
            *runs("wa", 0.80, 0.82, learning_rate=0.3),
        )
    )
    sides = {each.text: each.side for each in found}
    start = "Plain net, micro-batch 64, from learning rate 0.1 to 0.3: "
    assert sides[f"{start}no difference seen with bn."] == "note"
    (risen,) = [text for text in sides if "wa rises" in text]
    assert sides[risen] == "against"


def test_costs_are_told_with_their_tables():
    steps = {
        Cell(PANEL, "gn+ws"): StepTime(1.25, 1.2, 1.3, 1.0, 9),
        Cell(PANEL, "gn"): StepTime(3.0, 3.0, 3.0, 1.0, 9),
        Cell(PANEL, "wa"): StepTime(1.01, 1.0, 1.1, 1.0, 9),
    }
    found = texts(record("gn"), record("gn+ws"), record("wa"), side="against", steps=steps)
    assert found[-1] == (
        "An optimizer step with gn+ws takes longer than the plain network's, by a factor of 1.25"
        " (table 1)."
    )
    assert not any("wa takes" in text or "with gn takes" in text for text in found)


@pytest.mark.parametrize("seeds", [1, 3])
def test_the_limits_are_always_told_and_computed(seeds):
    found = texts(*runs("gn", *[0.04] * seeds), *runs("gn+ws", *[0.05] * seeds))
    # 1.96 * sqrt(0.04 / 1000) = 1.24 points
    words = "1 seed is few" if seeds == 1 else "3 seeds are few"
    assert found[-1].startswith(
        f"Differences under 1.2 points mean nothing at 1000 test pictures, and {words};"
    )
