"""Numbers as texts, in one wording for page, Markdown and terminal."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from filterwise.lab.reproduce.records import Budget
    from filterwise.lab.reproduce.schema import Metric, PaperValue
    from filterwise.lab.statistics import Interval, Quartiles

__all__ = [
    "BUDGET",
    "between",
    "count",
    "digits",
    "heading",
    "interval",
    "moved",
    "number",
    "printed",
    "quoted",
    "slug",
    "value",
]

MINUS = "\N{MINUS SIGN}"
BUDGET: dict[Budget, str] = {
    "full": "full: the paper's set-up",
    "short": "short: shrunk, not comparable with the paper's numbers",
    "smoke": "smoke: shrunk to see that it runs, says nothing about the paper's numbers",
}


def digits(metric: Metric | None) -> int:
    """Return how many decimals a metric's numbers have."""
    return 4 if metric is not None and metric.form == "plain" else 2


def number(value: float | None, decimals: int = 2) -> str:
    """Write a number; a dash where there is none."""
    return "-" if value is None else f"{value:.{decimals}f}".replace("-", MINUS)


def moved(difference: float | None, decimals: int = 2) -> str:
    """Write a difference that may not be there."""
    return "-" if difference is None else change(difference, decimals)


def change(value: float, decimals: int = 2) -> str:
    """Write a difference with its sign."""
    return f"{value:+.{decimals}f}".replace("-", MINUS)


def between(spread: Quartiles | None, decimals: int = 2) -> str:
    """Write the quartiles around a median."""
    if spread is None:
        return "-"
    return f"{number(spread.lower, decimals)} to {number(spread.upper, decimals)}"


def interval(difference: Interval | None, decimals: int = 2) -> str:
    """Write a difference, its interval, and whether it is one at all."""
    if difference is None:
        return "-"
    moved = change(difference.value, decimals)
    if difference.low is None or difference.high is None:
        return f"{moved} (one seed, no interval)"
    ends = f"{change(difference.low, decimals)} to {change(difference.high, decimals)}"
    return f"{moved} ({ends})" if difference.seen else f"no difference seen: {moved} ({ends})"


def printed(paper: PaperValue | None, decimals: int = 2) -> str:
    """Write a number of the paper with its status."""
    if paper is None:
        return "-"
    how = f": {paper.how}" if paper.how else ""
    if paper.status == "unreadable":
        return f"not readable{how}"
    if paper.value is None:
        return f"prints \N{LEFT DOUBLE QUOTATION MARK}{paper.mark}\N{RIGHT DOUBLE QUOTATION MARK}"
    # As many decimals as the paper has, and at least those of ours.
    text = number(paper.value, decimals)
    return text if paper.status == "printed" else f"{text} (recovered{how})"


def count(number: int, one: str, several: str | None = None) -> str:
    """Write how many there are of something."""
    return f"{number} {one if number == 1 else several or one + 's'}"


def heading(metric: Metric) -> str:
    """Write what a metric is."""
    return f"{metric.title}, {metric.unit} ({metric.better} is better)"


def quoted(names: Sequence[str]) -> str:
    """Write rows' names, which may have commas in them, in a sentence."""
    return ", ".join(
        f"\N{LEFT DOUBLE QUOTATION MARK}{name}\N{RIGHT DOUBLE QUOTATION MARK}" for name in names
    )


def slug(text: str) -> str:
    """Return a word for files and anchors."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def value(found: Any) -> str:
    """Write a setting's value."""
    if found is None:
        return "all"
    if isinstance(found, float):
        return f"{found:g}"
    if isinstance(found, list | tuple):
        return ", ".join(value(each) for each in found)
    return str(found)
