"""Records of runs that never took place, for tests of what is made from records."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import torch

from filterwise.lab.data import PictureSet
from filterwise.lab.engine import Outcome
from filterwise.lab.results import Record, record_of
from filterwise.lab.settings import Panel, RunSettings
from filterwise.lab.summary import Cell, Summary, summarize

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from filterwise.lab.timing import StepTime

PICTURES = 1000
PANEL = Panel(net="plain", learning_rate=0.1, micro_batch=64)


def record(
    recipe: str = "gn+ws",
    error: float = 0.05,
    *,
    seed: int = 0,
    wrong: Sequence[int] | None = None,
    pictures: int = PICTURES,
    diverged: tuple[int, int] | None = None,
    failed: str | None = None,
    versions: dict[str, str] | None = None,
    **settings: Any,
) -> Record:
    """Make a record; wrong answers are drawn under a seed of their own unless they are given."""
    values: dict[str, Any] = {
        "data": "digits",
        "data_sha256": "0" * 64,
        "net": "plain",
        "recipe": recipe,
        "initialization": "default",
        "learning_rate": 0.1,
        "micro_batch": 64,
        "seed": seed,
        "epochs": 2,
    } | settings
    if wrong is None:
        wrong = random.Random(f"{recipe} {seed} {error}").sample(
            range(pictures), round(error * pictures)
        )
    bits = "".join("1" if place in set(wrong) else "0" for place in range(pictures))
    share = len(set(wrong)) / pictures
    outcome = Outcome(
        error=None if failed else share,
        wrong="" if failed else f"{int(bits, 2):0{-(-pictures // 4)}x}",
        diverged_at=diverged,
        failed=failed,
        curve=[]
        if failed or diverged
        else [
            {"epoch": 1, "train_loss": 1.0, "test_error": min(1.0, 2 * share)},
            {"epoch": 2, "train_loss": 0.5, "test_error": share},
        ],
        steps=4,
        conversion="4 converted",
    )
    return record_of(
        RunSettings.model_validate(values),
        outcome,
        {"started": "2026-01-01T00:00:00+00:00", "seconds": 1.0},
        versions or {"filterwise": "0.1.0"},
        {"processor": "some", "threads": 1},
    )


def blank_pictures(classes: Sequence[str] = tuple("0123456789")) -> PictureSet:
    """Make as many empty pictures as the records have answers, all classes equally often."""
    blank = torch.zeros(PICTURES, 1, 1, 1, dtype=torch.uint8)
    labels = torch.arange(PICTURES) % len(classes)
    return PictureSet("digits", blank, labels, blank, labels, tuple(classes), "nothing but zeros")


def summary_of(
    *records: Record,
    recipes: Sequence[str] | None = None,
    steps: Mapping[Cell, StepTime] | None = None,
) -> Summary:
    """Make the summary of records; recipes and panels in the order in which they come."""
    names = recipes or list(dict.fromkeys(each.settings.recipe for each in records))
    panels = list(dict.fromkeys(each.settings.panel for each in records))
    return summarize(panels, names, records, blank_pictures(), steps or {})
