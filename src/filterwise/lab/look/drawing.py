"""What all figures share: colours, marks, bands, and the way onto a page."""

from __future__ import annotations

import io
import re
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = [
    "DARK",
    "GRID",
    "INK",
    "LIGHT",
    "MARKERS",
    "Figure",
    "band",
    "drawn",
    "inline",
    "whiskers",
]

LIGHT = (
    "#5f5f5f",
    "#0b5fa5",
    "#a85400",
    "#00785a",
    "#ac2f78",
    "#5b45b0",
    "#7d6300",
    "#a23426",
)
"""Colours of the series on white, in their order; each has 4.5:1 or more."""

DARK = (
    "#b4b4b4",
    "#6cb6ff",
    "#f0a35a",
    "#4fd1a5",
    "#f58bc4",
    "#b8a5ff",
    "#e0c34f",
    "#ff9b87",
)
"""The same series on a dark page."""

INK, GRID = "#1b1b1c", "#d4d4d6"
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
LINES = ("-", "--", "-.", ":", "-", "--", "-.", ":")
WIDTH, HEIGHT, LEGEND = 9.0, 3.1, 0.6
# Of the legend's font: characters an inch, and how many a line with its mark takes.
CHARACTERS, SWATCH = 12, 7
STYLE: dict[str, Any] = {
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "font.family": ["DejaVu Sans", "sans-serif"],
    "font.size": 10,
    "grid.color": GRID,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}


class Figure(NamedTuple):
    """A drawn figure.

    Attributes:
        name: Stem of its files.
        title: Heading.
        caption: What is seen, in one or two sentences.
        svg: The whole SVG file.
        png: The same as PNG, 150 dots an inch.
    """

    name: str
    title: str
    caption: str
    svg: bytes
    png: bytes


def style(place: int) -> dict[str, Any]:
    """Return what tells a series from the others, in colour and without.

    From the ninth series on the colours come again, with hollow marks of another shape.
    """
    again = place // len(LIGHT)
    return {
        "color": LIGHT[place % len(LIGHT)],
        "marker": MARKERS[(place + again) % len(MARKERS)],
        "linestyle": LINES[(place + again) % len(LINES)],
        "markersize": 5,
        "fillstyle": "none" if again % 2 else "full",
    }


def band(
    axes: Any,
    place: int,
    at: Sequence[float],
    median: Sequence[float],
    lower: Sequence[float],
    upper: Sequence[float],
    *,
    marks: bool = True,
) -> None:
    """Draw a series: its medians as a line, from quartile to quartile a band.

    Without `marks` at every point a few are left, so that the shape still tells it apart.
    """
    look = style(place)
    if not marks:
        look["markevery"] = (len(at) // 12 * (place % 4) // 4, max(1, len(at) // 8))
    axes.plot(at, median, **look)
    axes.fill_between(at, lower, upper, color=look["color"], alpha=0.18, linewidth=0)


def whiskers(axes: Any, place: int, at: float, median: float, lower: float, upper: float) -> None:
    """Draw one value of a series with its quartiles."""
    axes.errorbar([at], [median], [[median - lower], [upper - median]], capsize=4, **style(place))


def drawn(
    name: str,
    title: str,
    caption: str,
    parts: Sequence[tuple[str, Callable[[Any], None]]],
    series: Sequence[str],
    *,
    label: str,
    finish: Callable[[Sequence[Any]], None] = lambda _grid: None,
    height: float = HEIGHT,
) -> Figure:
    """Draw a figure of one or more parts, two beside each other.

    Args:
        name: Stem of its files.
        title: Heading.
        caption: What is seen.
        parts: Heading of each part and what draws it.
        series: Names for the legend, in the order of their places; none leaves it out.
        label: Of the vertical axes.
        height: Of a part, in inches.
        finish: Called with the axes of all parts when they are filled.
    """
    import matplotlib
    from matplotlib.figure import Figure as Canvas
    from matplotlib.lines import Line2D

    columns = min(2, len(parts))
    lines = -(-len(parts) // columns)
    look: Any = {**STYLE, "svg.hashsalt": name}
    with matplotlib.rc_context(look):
        canvas = Canvas(figsize=(WIDTH, LEGEND + height * lines), layout="constrained")
        grid = canvas.subplots(lines, columns, squeeze=False)
        for axes, (heading, fill) in zip(grid.flat, parts, strict=False):
            fill(axes)
            axes.set_title(heading)
        finish(list(grid.flat[: len(parts)]))
        for axes in grid.flat[len(parts) :]:
            axes.remove()
        for line in grid:
            line[0].set_ylabel(label)
        handles = [Line2D([], [], label=each, **style(at)) for at, each in enumerate(series)]
        if handles:
            canvas.legend(handles=handles, loc="outside lower center", ncols=_columns(series))
        svg, png = io.BytesIO(), io.BytesIO()
        # Salt and no date: the same results give the same file.
        canvas.savefig(svg, format="svg", transparent=True, metadata={"Date": None})
        canvas.savefig(png, format="png", dpi=150, facecolor="white")
    return Figure(name, title, caption, svg.getvalue(), png.getvalue())


def _columns(names: Sequence[str]) -> int:
    """Return how many names stand beside each other in a legend as wide as the figure."""
    longest = max(len(name) for name in names)
    return max(1, min(6, len(names), int(WIDTH * CHARACTERS) // (longest + SWATCH)))


def inline(figure: Figure) -> str:
    """Return a figure's SVG for use inside a page, whose colours it takes over.

    Colours become the custom properties ``--series-1``, ... and ``--grid`` and the page's text
    colour; names get the figure's as prefix, so that several figures can stand in one page; nothing
    in it points outside the page.
    """
    text = figure.svg.decode()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text)
    text = re.sub(r'<svg ([^>]*?)width="[^"]*" height="[^"]*"', r"<svg \1", text)
    text = re.sub(r'<svg height="[^"]*"', "<svg", text)
    text = re.sub(r'\bid="', f'id="{figure.name}-', text)
    text = re.sub(r'(href="|url\()#', rf"\1#{figure.name}-", text)
    for number, colour in enumerate(LIGHT, start=1):
        text = text.replace(colour, f"var(--series-{number})")
    text = text.replace(INK, "currentColor").replace(GRID, "var(--grid)")
    return text.replace(
        "<svg", f'<svg role="img" aria-labelledby="{figure.name}-title {figure.name}-caption"', 1
    )
