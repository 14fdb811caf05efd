"""The list of laws: a law is a test function that takes a subject and asserts.

`law` gives it its number, runs it on every subject, and names the mutants that it must reject
(`tests/laws/test_meta.py` sees to it that it does).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from support.cases import CASES, MethodCase, Subject, subjects
from support.tolerances import DTYPES


@dataclass(frozen=True)
class Law:
    """A law as the meta-laws see it.

    Attributes:
        number: Its number in the list.
        test: The test function.
        rejects: Mutant name to the id of a subject on which the law must refuse it.
    """

    number: int
    test: Callable[..., None]
    rejects: dict[str, str]


LAWS: dict[str, Law] = {}
"""Test name to law; filled as the test modules are imported."""


def law(
    number: int,
    *,
    rejects: dict[str, str],
    cases: Sequence[MethodCase] = CASES,
    dtypes: Sequence[str] = tuple(DTYPES),
    applies: Callable[[Subject], bool] = lambda _: True,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Run a test on every subject to which it applies, and enter it in the list of laws."""
    chosen = [subject for subject in subjects(cases, dtypes) if applies(subject)]

    def enter(test: Callable[..., Any]) -> Callable[..., Any]:
        LAWS[test.__name__] = Law(number, test, rejects)
        return pytest.mark.parametrize("subject", chosen, ids=lambda subject: subject.id)(test)

    return enter


def find_subject(identity: str) -> Subject:
    """Return the subject of an id such as ``ws[eps=0]-bf16``."""
    return next(subject for subject in subjects() if subject.id == identity)
