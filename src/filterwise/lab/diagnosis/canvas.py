"""A figure of any grid of panels, with its data beside it."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from filterwise.lab.look.drawing import STYLE, WIDTH, Figure

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

__all__ = ["Panels", "Plot", "paint", "table_of", "values_of"]

Panels = "Mapping[str, Sequence[Mapping[str, Any]]]"
"""Records by the heading of the panel that they belong to: mostly the recipe."""


@dataclass(frozen=True)
class Plot:
    """A figure and the data it shows.

    Attributes:
        figure: Drawn, as SVG and PNG.
        data: The same as CSV, one line a point.
    """

    figure: Figure
    data: str


def paint(
    name: str,
    title: str,
    caption: str,
    shape: tuple[int, int],
    fill: Callable[[Any], None],
    *,
    height: float = 2.3,
    legend: Callable[[Any], None] | None = None,
) -> Figure:
    """Draw a grid of panels in the lab's style.

    Args:
        name: Stem of the files.
        title: Heading.
        caption: What is seen.
        shape: Rows and columns.
        fill: Is given the grid of axes, an array of that shape.
        height: Of a row, in inches.
        legend: Is given the whole canvas.
    """
    import matplotlib
    from matplotlib.figure import Figure as Canvas

    look: Any = {**STYLE, "svg.hashsalt": name, "font.size": 9, "axes.titlesize": 9.5}
    with matplotlib.rc_context(look):
        canvas = Canvas(figsize=(WIDTH, 0.7 + height * shape[0]), layout="constrained")
        fill(canvas.subplots(*shape, squeeze=False))
        if legend is not None:
            legend(canvas)
        svg, png = io.BytesIO(), io.BytesIO()
        canvas.savefig(svg, format="svg", transparent=True, metadata={"Date": None})
        canvas.savefig(png, format="png", dpi=150, facecolor="white")
    return Figure(name, title, caption, svg.getvalue(), png.getvalue())


def table_of(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows of the same keys as CSV."""
    text = io.StringIO()
    if rows:
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return text.getvalue()


def values_of(
    records: Sequence[Mapping[str, Any]], signal: str, layer: str | None = None
) -> list[tuple[int, str, Any]]:
    """Return step, layer and value of the records of a signal."""
    return [
        (record["step"], record["layer"], record["value"])
        for record in records
        if record["signal"] == signal and layer in (None, record["layer"])
    ]
