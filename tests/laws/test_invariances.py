"""Laws 7 to 11: what the effective weight does not depend on."""

from __future__ import annotations

import math

import pytest
import torch

from support import references
from support.cases import PLAIN, Subject, subjects
from support.compare import assert_close, assert_same, per_row
from support.laws import law
from support.tolerances import WRONG


def spread(subject: Subject, values: torch.Tensor) -> list[tuple[references.Formula, list[float]]]:
    """Return, per cell, the formula and the s of each filter."""
    found = []
    for part in subject.parts(values):
        rows = values[:, part].double()
        shared = subject.case.cells and subject.flags.shared
        rows = rows.reshape(1, -1) if shared else rows
        f = references.formula(subject.flags, rows.shape[1])
        s = [references.moments(row, f).s for row in rows.tolist()]
        found.append((f, s * len(values) if shared else s))
    return found


def factors(subject: Subject, values: torch.Tensor, ratio) -> torch.Tensor:
    """Return ``ratio(formula, s)`` for every weight, in float64."""
    out = torch.ones(values.shape, dtype=torch.float64)
    for part, (f, s) in zip(subject.parts(values), spread(subject, values), strict=True):
        out[:, part] = torch.tensor([[ratio(f, one)] for one in s], dtype=torch.float64)
    return out


def on_grid(subject: Subject, filters: int = 5, fan_in: int = 48) -> torch.Tensor:
    """Return weights on a grid of 2^-12, so that adding 8 is exact in float32."""
    shape = (filters, fan_in)
    steps = torch.randint(-2048, 2049, shape, generator=subject.generator(4))
    return (steps / 4096).to(subject.dtype)


@law(
    7,
    rejects={"not_centred": "ws-f64", "relaxed": "pws-f32"},
    dtypes=["f32", "f64"],
    # The single pass counts weights by their sign before the shift.
    applies=lambda subject: not getattr(subject.flags, "single_pass", False),
)
def test_law07_shift(subject: Subject):
    """Adding one number to all weights of a filter changes nothing where the mean is taken off."""
    weight, gain = on_grid(subject), subject.gain()
    before, after = subject.effective(weight, gain), subject.effective(weight + 8.0, gain)
    allowed = subject.tolerance * per_row(before)
    if subject.flags.centred or subject.flags.uses_input:
        assert_close(after, before, absolute=allowed, what="shifted")
    else:
        moved = (after - before).abs().amax(1, keepdim=True)
        assert (moved >= WRONG * allowed).all(), "declared uncentred"


@law(
    8,
    rejects={
        "eps_moved": "ws-f32",
        "eps_forgotten": "pws-f64",
        "rectified": "cwn-f32",
        "relaxed": "ws[eps=0]-f64",
    },
)
def test_law08_positive_scale_and_sign(subject: Subject):
    """E(aW) = E(W) a D(s)/D(as) for a > 0, the same bits where D(s) = s; E(-W) = -E(W)."""
    weight, gain, flags = subject.draw(), subject.gain(), subject.flags
    before = subject.effective(weight, gain)
    for a in (0.25, 8.0, 0.37):
        scaled = (weight.double() * a).to(subject.dtype)
        after = subject.effective(scaled, gain)
        if flags.scale_free and a != 0.37:
            assert_same(after, before, f"scaled by {a}")
            continue
        expected = before.double()
        if not flags.uses_input:
            expected = expected * factors(
                subject, weight, lambda f, s, a=a: a * f.divisor(s, math) / f.divisor(a * s, math)
            )
        # 0.37 W is itself rounded, entry by entry.
        rounding = subject.tolerance * (4.0 if a == 0.37 else 1.0)
        scale = per_row(expected) * (1.0 + per_row(weight) / per_row(before) * 0.0)
        assert_close(
            after, expected, absolute=rounding * scale, relative=rounding, what=f"times {a}"
        )
    if not flags.uses_input:
        assert_same(subject.effective(-weight, gain), -before, "negative")


@pytest.mark.parametrize("subject", subjects(dtypes=["f64"]), ids=lambda subject: subject.id)
def test_law08_a_method_declared_not_scale_free_is_not(subject: Subject):
    weight = subject.draw()
    before, after = subject.effective(weight), subject.effective(weight * 2.0**-60)
    if subject.flags.scale_free:
        assert_same(after, before, "scaled by 2^-60")
    else:
        moved = (after - before).abs().amax(1, keepdim=True)
        assert (moved >= WRONG * subject.tolerance * per_row(before)).all()


@law(
    9,
    rejects={
        "eps_moved": "ws-f64",
        "eps_forgotten": "pws-f32",
        "relaxed": "cwn-f32",
    },
    # A second pass divides a single-pass filter by P2, its positive part.
    applies=lambda subject: not getattr(subject.flags, "single_pass", False),
)
def test_law09_idempotence(subject: Subject):
    """E(E(W)) = E(W) k / D(k s/D(s)) at gains of 1, and nothing else: E(W) where scale-free."""
    once = subject.effective(subject.draw())
    twice = subject.effective(once)
    expected = once.double()
    if not subject.flags.uses_input:
        expected = expected * factors(subject, once, lambda f, s: f.constant / f.divisor(s, math))
    # The first result is rounded to the dtype, and the second once more.
    allowed = 2.0 * subject.tolerance
    assert_close(twice, expected, absolute=allowed * per_row(expected), what="twice")


def divided_by_an_eps(subject: Subject) -> bool:
    """Tell whether a number stands in the divisor that filters of size 1e-3 feel."""
    if subject.flags.uses_input:
        return False
    f = references.formula(subject.flags, 48)
    divided = f.divisor(1.0, math) != f.divisor(2.0, math)
    return divided and f.divisor(0.0, math) > 1e-10


@pytest.mark.parametrize(
    "subject",
    [subject for subject in subjects(dtypes=["f64"]) if divided_by_an_eps(subject)],
    ids=lambda subject: subject.id,
)
def test_law09_plain_idempotence_fails_where_the_divisor_has_a_number(subject: Subject):
    """The control: at a scale that the eps of the method is felt at, twice is not once."""
    weight = subject.draw() * 1e-3
    once = subject.effective(weight)
    moved = (subject.effective(once) - once).abs().amax(1, keepdim=True)
    assert (moved >= WRONG * subject.tolerance * per_row(once)).all()


@law(10, rejects={"wrong_axis": "ws-f64", "batched_statistics": "pws-bf16"})
def test_law10_filters_are_independent(subject: Subject):
    """Permuting filters permutes the result; one alone gives the same bits as among others."""
    order = torch.tensor([3, 0, 4, 1, 2])
    for fan_in in (17, 48):
        weight, gain, offset = subject.draw(fan_in=fan_in), subject.gain(), subject.offset()
        before = subject.effective(weight, gain, offset)

        def chosen(values, rows):
            return None if values is None else values[rows]

        permuted = subject.effective(weight[order], chosen(gain, order), chosen(offset, order))
        if subject.case.cells and subject.flags.shared:
            allowed = subject.tolerance * per_row(before)[order]
            assert_close(permuted, before[order], absolute=allowed, what="permuted")
            continue
        assert_same(permuted, before[order], "permuted")
        for i in range(len(weight)):
            rows = slice(i, i + 1)
            alone = subject.effective(weight[rows], chosen(gain, rows), chosen(offset, rows))
            assert_same(alone, before[rows], "alone")


@pytest.mark.parametrize("fan_in", [577, 4608, 40_001])
@pytest.mark.parametrize("subject", subjects(PLAIN, ["f32"]), ids=lambda subject: subject.id)
def test_law10_filters_are_independent_at_any_size(subject: Subject, fan_in):
    weight, gain = subject.draw(3, fan_in), subject.gain(3)
    before = subject.effective(weight, gain)
    alone = subject.effective(weight[1:2], None if gain is None else gain[1:2])
    assert_same(alone, before[1:2], "alone")


@law(
    11,
    rejects={"ordered": "wn-f32", "mean_of_the_first_half": "wa-bf16"},
    # An order of channels is an order of the input: the control below.
    applies=lambda subject: not subject.flags.uses_input,
)
def test_law11_order_inside_a_filter(subject: Subject):
    """Permuting the weights of a filter permutes the result; cells are mapped onto cells."""
    weight, gain = subject.draw(), subject.gain()
    before = subject.effective(weight, gain)
    order = torch.randperm(24, generator=subject.generator(6))
    order = torch.stack([2 * order, 2 * torch.roll(order, 5) + 1], 1).flatten()
    after = subject.effective(weight[:, order], gain)
    # Sums run in another order; both results are rounded to the dtype.
    allowed = 2.0 * subject.tolerance * per_row(before)
    assert_close(after, before[:, order], absolute=allowed, what="permuted")


ORDERED = [
    subject
    for subject in subjects(dtypes=["f32"])
    if subject.case.cells or subject.flags.uses_input
]


@pytest.mark.parametrize("subject", ORDERED, ids=lambda subject: subject.id)
def test_law11_a_permutation_that_splits_cells_is_seen(subject: Subject):
    """The control: labels, and the input's channels, are not interchangeable."""
    weight, order = subject.draw(), torch.arange(48)
    order[:7] = order[:7].roll(1)
    before, after = subject.effective(weight), subject.effective(weight[:, order])
    moved = (after - before[:, order]).abs().amax(1, keepdim=True)
    assert (moved >= WRONG * subject.tolerance * per_row(before)).all()
