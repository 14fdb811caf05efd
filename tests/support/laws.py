"""The list of laws: a law is a test function that takes a subject and asserts.

`law` (on filter matrices) and `host_law` (on converted layers) give it its number, run it on every
subject, and name the faults that it must see. `tests/laws/test_meta.py` sees to it that it does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from support.cases import CASES, MethodCase, Subject, subjects
from support.models import HostCase, host_cases
from support.tolerances import DTYPES

Test = Callable[..., Any]


@dataclass(frozen=True)
class Law:
    """A law as the meta-laws see it.

    Attributes:
        number: Its number in the list.
        test: The test function.
        subjects: What it runs on, by id.
        rejects: A fault's name to the id of the subject on which the law must see it. The fault is
            a kernel of `support.mutants` for a law on matrices, else a patch of `support.faults`
            or `support.model_faults`.
    """

    number: int
    test: Test
    subjects: dict[str, Any]
    rejects: dict[str, str]


LAWS: dict[str, Law] = {}
"""Test name to law; filled as the test modules are imported."""


def _enter(
    number: int, name: str, subjects: Sequence[Any], rejects: dict[str, str]
) -> Callable[[Test], Test]:
    def enter(test: Test) -> Test:
        LAWS[test.__name__] = Law(number, test, {one.id: one for one in subjects}, rejects)
        return pytest.mark.parametrize(name, subjects, ids=lambda one: one.id)(test)

    return enter


def law(
    number: int,
    *,
    rejects: dict[str, str],
    cases: Sequence[MethodCase] = CASES,
    dtypes: Sequence[str] = tuple(DTYPES),
    applies: Callable[[Subject], bool] = lambda _: True,
) -> Callable[[Test], Test]:
    """Run a test on filter matrices of every method and dtype to which it applies."""
    chosen = [subject for subject in subjects(cases, dtypes) if applies(subject)]
    return _enter(number, "subject", chosen, rejects)


def host_law(
    number: int,
    *,
    rejects: dict[str, str],
    dtypes: Sequence[str] = tuple(DTYPES),
    applies: Callable[[HostCase], bool] = lambda _: True,
) -> Callable[[Test], Test]:
    """Run a test on converted layers: every method with its defaults, host and dtype."""
    chosen = [case for case in host_cases(tuple(dtypes)) if applies(case)]
    return _enter(number, "hosted", chosen, rejects)


def case_law(
    number: int, cases: Sequence[Any], *, rejects: dict[str, str]
) -> Callable[[Test], Test]:
    """Run a test on cases of its own, such as every method on a small net."""
    return _enter(number, "case", cases, rejects)
