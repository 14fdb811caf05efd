"""The page of a comparison: one HTML file that needs no network and no script."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from filterwise.lab.look.pages import placed, render
from filterwise.lab.reading import percent

if TYPE_CHECKING:
    from collections.abc import Sequence

    from filterwise.lab.look.drawing import Figure
    from filterwise.lab.reading import Sentence
    from filterwise.lab.summary import Summary

__all__ = ["page"]


def page(
    summary: Summary,
    sentences: Sequence[Sentence],
    figures: Sequence[Figure],
    facts: dict[str, Any],
) -> str:
    """Return the page's HTML.

    Args:
        summary: The tables.
        sentences: The plain reading.
        figures: Put into the page itself.
        facts: ``command``, ``folder``, ``finished``, ``data``, ``settings``, ``versions``,
            ``hardware``, ``runs`` and ``notes``, as `filterwise.lab.compare` gathers them.
    """
    return render(
        Path(__file__).with_name("page.html"),
        {"percent": percent},
        tables=summary.tables,
        chance=summary.chance,
        pictures=summary.pictures,
        sentences=sentences,
        figures=placed(figures),
        facts=facts,
    )
