"""Rounds, medians and intervals; nothing here looks at a clock."""

from __future__ import annotations

from fractions import Fraction
from itertools import product

import pytest


def test_the_order_turns_from_round_to_round():
    from harness.timing import Rounds, interleaved

    seen: list[str] = []

    def turn(name):
        return lambda: seen.append(name) or float(len(seen))

    times = interleaved({name: turn(name) for name in "abc"}, Rounds(4, 1))
    assert "".join(seen) == "abc" + "bca" + "cab" + "abc"
    assert times["a"] == [1.0, 6.0, 8.0, 10.0]


def test_no_round_begins_after_the_time_is_up_but_the_least_are_run():
    from harness.timing import Rounds, interleaved

    assert len(interleaved({"a": lambda: 1.0}, Rounds(50, 3, 0.0))["a"]) == 3


def test_the_median_of_ratios_is_not_the_ratio_of_medians():
    from harness.timing import ratios, spread

    found = spread(ratios([2.0, 9.0, 4.0], [1.0, 3.0, 4.0]))
    assert (found.median, found.lower, found.upper) == (2.0, 1.5, 2.5)
    assert (found.low, found.high, found.rounds) == (1.0, 3.0, 3)


@pytest.mark.parametrize("count", [3, 6, 9, 12])
def test_the_interval_covers_the_median_with_at_least_95_percent(count):
    """By counting every way in which values can fall below and above the true median."""
    from harness.timing import spread

    found = spread([float(value) for value in range(count)])
    left_out = round(found.low)
    assert found.high == count - 1 - left_out

    def cover(out):
        sides = [sum(way) for way in product((0, 1), repeat=count)]
        inside = sum(1 for below in sides if out < below < count - out)
        return Fraction(inside, len(sides))

    if left_out:
        assert cover(left_out) >= Fraction(95, 100)
    assert cover(left_out + 1) < Fraction(95, 100)
