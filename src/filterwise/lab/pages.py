"""The page of a comparison: one HTML file that needs no network and no script."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from filterwise.lab.figures import DARK, LIGHT, inline
from filterwise.lab.reading import percent

if TYPE_CHECKING:
    from collections.abc import Sequence

    from filterwise.lab.figures import Figure
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
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = percent
    return environment.get_template("page.html").render(
        tables=summary.tables,
        chance=summary.chance,
        pictures=summary.pictures,
        sentences=sentences,
        # The one thing that is not escaped: SVG that this program has just drawn; its texts were
        # escaped by matplotlib.
        figures=[(figure, Markup(inline(figure))) for figure in figures],
        light=LIGHT,
        dark=DARK,
        facts=facts,
    )
