"""Tables in Markdown."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


def table(headers: Sequence[str], rows: Iterable[Sequence[str]], right: int = 0) -> str:
    """Return a Markdown table whose last `right` columns stand to the right."""
    marks = ["---"] * (len(headers) - right) + ["---:"] * right
    lines = [[cell.replace("|", "\\|") for cell in one] for one in (headers, marks, *rows)]
    return "".join(f"| {' | '.join(one)} |\n" for one in lines)
