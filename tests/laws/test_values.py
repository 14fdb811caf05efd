"""Laws 1 to 6: what the effective weight is."""

from __future__ import annotations

import math

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from support import references
from support.cases import CASES, PLAIN, Subject, subjects
from support.compare import assert_close, assert_same, per_row
from support.laws import law
from support.tolerances import WRONG


def means(subject: Subject, effective: torch.Tensor) -> torch.Tensor:
    """Return the mean of every filter, or cell, as a column that broadcasts against it.

    The mean that Equilibrium Normalization balances is weighted with the input's.
    """
    out = effective.double()
    if subject.flags.uses_input:
        v = subject.input_mean(out.shape[1]).double()
        return (out * v).sum(1, keepdim=True) / v.sum()
    labels = subject.labels(out.shape)
    if labels is None:
        return out.mean(1, keepdim=True)
    if subject.flags.shared:
        return torch.stack([out[labels == one].mean() for one in (0, 1)]).expand(len(out), 2)
    return torch.stack([out[:, labels[0] == one].mean(1) for one in (0, 1)], 1)


@law(
    1,
    rejects={
        "centred_once": "ws-f32",
        "not_centred": "wa-f64",
        "mean_of_the_first_half": "pws-bf16",
    },
)
def test_law01_zero_mean(subject: Subject):
    """Every filter of a centred method has mean zero, whatever the mean of the raw weights."""
    centred = subject.flags.centred or subject.flags.uses_input
    for ratio in (0.0, 1.0, 1e3, 1e7) if centred else (1e3,):
        # Beyond 1e3 the spread shrinks in place of a growing mean: float16 ends at 65504.
        weight = subject.draw(
            ratio=ratio, std=0.2 * min(1.0, 1e3 / max(ratio, 1.0)), seed=int(ratio)
        )
        effective = subject.effective(weight, subject.gain())
        peak = per_row(effective)
        found = means(subject, effective).abs()
        if centred:
            assert_close(found, torch.zeros(()), absolute=subject.tolerance * peak, what="mean")
        else:
            assert (found >= min(WRONG * subject.tolerance, 0.5) * peak).all(), "declared uncentred"


@law(
    2,
    rejects={
        "unbiased": "cwn-f32",
        "gain_dropped": "wa-bf16",
        "constant_a_little_off": "sws-f64",
        "wrong_axis": "ws-f32",
    },
    # In a single pass the positive part is P2/P1, which law 3 checks.
    applies=lambda subject: not getattr(subject.flags, "single_pass", False),
)
def test_law02_declared_scale(subject: Subject):
    """The spread of filter i is k |gain| s / D(s), with k and D of the published formula."""
    weight, gain = subject.draw(fan_in=16), subject.gain()
    effective = subject.effective(weight, gain).double()
    gains = torch.ones(len(weight)) if gain is None else gain.double().abs()
    if subject.flags.uses_input:
        v = subject.input_mean(16).double()
        positive = (v * effective.clamp_min(0)).sum(1)
        positive = torch.maximum(positive, (v * (-effective).clamp_min(0)).sum(1))
        assert_close(
            positive, gains, relative=subject.tolerance, what="weight of the positive part"
        )
        return
    for part in subject.parts(weight):
        raw, out = weight[:, part].double(), effective[:, part]
        if subject.case.cells and subject.flags.shared:
            raw, out = raw.reshape(1, -1), out.reshape(1, -1)
        expected, found = [], []
        for i, (row, done) in enumerate(zip(raw.tolist(), out.tolist(), strict=True)):
            f = references.formula(subject.flags, len(row))
            s = references.moments(row, f).s
            expected.append(f.constant * float(gains[i]) * s / f.divisor(s, math))
            found.append(references.moments(done, f).s)
        assert_close(
            torch.tensor(found, dtype=torch.float64),
            torch.tensor(expected, dtype=torch.float64),
            relative=subject.tolerance,
            what="spread",
        )


def check_reference(subject: Subject, weight: torch.Tensor, seed: int = 1) -> None:
    gain, offset = subject.gain(len(weight), seed), subject.offset(len(weight), seed)
    expected = subject.saturated(subject.expected(weight, gain, offset))
    absolute, relative = subject.bound(expected)
    found = subject.effective(weight, gain, offset)
    assert_close(found, expected, absolute=absolute, relative=relative, what="effective weight")


@law(
    3,
    rejects={
        "half_statistics": "wa-bf16",
        "centred_once": "ws-f32",
        "eps_moved": "ws-f64",
        "eps_forgotten": "pws-f32",
        "unbiased": "ws[ddof=1]-f64",
        "relaxed": "centered-f32",
        "constant_a_little_off": "sws-f16",
    },
)
def test_law03_reference(subject: Subject):
    """The effective weight is the published formula on the stored weights, to rounding."""
    for fan_in in (4, 16, 27, 301):
        check_reference(subject, subject.draw(fan_in=fan_in, seed=fan_in))
    check_reference(subject, subject.draw(ratio=1e7, std=1e-3))  # mean 1e4


@pytest.mark.parametrize("subject", subjects(CASES), ids=lambda subject: subject.id)
@settings(max_examples=4)
@given(
    filters=st.integers(1, 6),
    fan_in=st.integers(4, 200),
    log_std=st.floats(-3, 0.5),
    ratio=st.sampled_from([0.0, 0.05, 1.0, 30.0, 1e4]),
    seed=st.integers(0, 2**16),
)
def test_law03_reference_drawn(subject: Subject, filters, fan_in, log_std, ratio, seed):
    if subject.dtype == torch.float16:
        ratio = min(ratio, 30.0)  # 65504 is float16's largest number
    std = 10.0**log_std
    check_reference(subject, subject.draw(filters, fan_in, ratio=ratio, std=std, seed=seed), seed)


@pytest.mark.parametrize(
    "subject", subjects(PLAIN, ["f32", "bf16"]), ids=lambda subject: subject.id
)
def test_law03_reference_of_a_large_filter(subject: Subject):
    check_reference(subject, subject.draw(2, 40_000))


EXTREMES = {
    torch.float16: (1e3, 1e-3),
    torch.bfloat16: (1e30, 1e-30),
    torch.float32: (1e30, 1e-30),
    torch.float64: (1e200, 1e-200),
}


@law(4, rejects={"plain_squares": "wa-f32", "centred_once": "cwn-f64", "eps_moved": "ws-f64"})
def test_law04_extremes(subject: Subject):
    """Huge and tiny filters keep law 3 and law 16, though their squares leave the dtype's range."""
    for scale in EXTREMES[subject.dtype]:
        weight = (subject.draw(3, 24, std=1.0).double() * scale).to(subject.dtype)
        upstream = subject.draw(3, 24, ratio=0.0, std=1.0, seed=7)
        gain, offset = subject.gain(3), subject.offset(3)
        if subject.flags.uses_input:
            expected = subject.expected(weight, gain)
            expected_gradient = subject.expected_gradients(weight, upstream, gain)[0]
        else:
            with mpmath.workdps(40):
                expected = subject.expected(weight, gain, offset, m=mpmath.mp)
                expected_gradient = subject.expected_gradients(weight, upstream, gain, m=mpmath.mp)[
                    0
                ]
        found = subject.effective(weight, gain, offset)
        absolute, relative = subject.bound(expected)
        assert_close(found, expected, absolute=absolute, relative=relative, what="effective weight")
        found = subject.gradients(weight, upstream, gain, offset)[0]
        limit = torch.finfo(subject.dtype).max
        within = expected_gradient.abs() <= limit
        absolute, relative = subject.bound(expected_gradient, gradient=True)
        assert_close(
            torch.where(within, found.double(), 0.0),
            torch.where(within, expected_gradient, 0.0),
            absolute=absolute,
            relative=relative,
            what=f"gradient at scale {scale:g}",
        )


CONSTANTS = (0.0, 1e-3, 0.1, 0.3, 1 / 3, -7.3, 1e4 + 0.1)


@law(5, rejects={"centred_once": "ws[eps=0]-f32", "root_at_zero": "ws-f64"})
def test_law05_constant_filters(subject: Subject):
    """A filter without variance gives exactly 0, and its gradient is the limit: never NaN."""
    every = subject.case in PLAIN and subject.dtype in (torch.float32, torch.float64)
    flags = subject.flags
    zero_mean = flags.centred or flags.uses_input
    constants = CONSTANTS if zero_mean else (0.0,)
    for fan_in in range(16, 701, 7 if every else 98):
        weight = torch.tensor(constants, dtype=torch.float64)[:, None].repeat(1, fan_in)
        weight = weight.to(subject.dtype)
        if subject.case.cells and flags.shared:
            weight = weight[3:4]
        gain, offset = subject.gain(len(weight)), subject.offset(len(weight))
        plain = subject.effective(weight, gain)
        assert_same(plain, torch.zeros_like(weight), "effective weight")
        upstream = subject.draw(len(weight), fan_in, ratio=0.2, std=1.0, seed=fan_in)
        found = subject.gradients(weight, upstream, gain, offset)[0]
        expected = torch.zeros(weight.shape, dtype=torch.float64)
        for part in subject.parts(weight):
            expected[:, part] = _limit(subject, upstream.double()[:, part], gain)
        expected = subject.saturated(expected)
        absolute, relative = subject.bound(expected, gradient=True)
        assert_close(found, expected, absolute=absolute, relative=relative, what="gradient")


def _limit(subject: Subject, upstream: torch.Tensor, gain: torch.Tensor | None) -> torch.Tensor:
    if subject.flags.uses_input:
        return torch.zeros_like(upstream)
    f = references.formula(subject.flags, upstream.shape[1])
    below = f.divisor(0.0, math)
    if not below:
        return torch.zeros_like(upstream)
    pushed = upstream - upstream.mean(1, keepdim=True) if f.centred else upstream
    gains = 1.0 if gain is None else gain.double()[:, None]
    return f.constant * gains / below * pushed


@law(
    6,
    rejects={
        "wrong_axis": "ws-f32",
        "one_scale_for_all": "wa-f64",
        "batched_statistics": "wn-bf16",
    },
    applies=lambda subject: not getattr(subject.flags, "shared", False),
)
def test_law06_damage_stays_where_it_is(subject: Subject):
    """A NaN or infinity spoils its own filter, visibly, and no bit of any other."""
    weight, gain, offset = subject.draw(), subject.gain(), subject.offset()
    upstream = subject.draw(ratio=0.0, seed=5)
    before = subject.effective(weight, gain, offset)
    gradient_before = subject.gradients(weight, upstream, gain, offset)[0]
    for spoiled in range(len(weight)):
        for poison in (math.nan, math.inf, -math.inf):
            bad = weight.clone()
            bad[spoiled, 6] = poison
            after = subject.effective(bad, gain, offset)
            cell = slice(None) if not subject.case.cells else slice(0, None, 2)
            assert after[spoiled, cell].isnan().all(), "the damage is hidden"
            others = [i for i in range(len(weight)) if i != spoiled]
            assert_same(after[others], before[others], "another filter")
            gradient = subject.gradients(bad, upstream, gain, offset)[0]
            assert_same(gradient[others], gradient_before[others], "another filter's gradient")


WITH_INPUT = [case for case in CASES if case.method().uses_input]


@pytest.mark.parametrize("subject", subjects(WITH_INPUT, ["f64"]), ids=lambda subject: subject.id)
def test_law06_damage_in_the_input_shows_in_every_filter_that_sees_it(subject: Subject):
    weight, v = subject.draw(), subject.input_mean(48)
    v[3] = math.nan
    assert subject.case.method().effective(weight, v).isnan().all()
