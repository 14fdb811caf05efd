"""Figures of a comparison: error by micro-batch, error by epoch; SVG and PNG."""

from __future__ import annotations

import io
import re
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

    from filterwise.lab.summary import Row, Summary, Table

__all__ = ["DARK", "LIGHT", "Figure", "draw", "inline"]

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
"""Colours of the recipes on white, in their order; each has 4.5:1 or more."""

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
"""The same recipes on a dark page."""

INK, GRID = "#1b1b1c", "#d4d4d6"
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
LINES = ("-", "--", "-.", ":", "-", "--", "-.", ":")
TICKS = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)
WIDTH, HEIGHT, LEGEND = 9.0, 3.1, 0.6
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


def draw(summary: Summary) -> list[Figure]:
    """Draw all figures of a comparison."""
    seeds = summary.tables[0].rows[0].seeds
    bands = f"Median and quartiles over {seeds} seed{'s' if seeds > 1 else ''}"
    groups = _by_micro_batch(summary.tables)
    return [
        _figure(
            "error_by_micro_batch",
            "Test error by micro-batch",
            f"{bands}, after the last epoch; logarithmic scales, 0 drawn at 0.05 %. Every optimizer"
            " step has the same pictures in all, cut into micro-batches.",
            [(title, lambda axes, tables=tables: _micro(axes, tables)) for title, tables in groups],
            summary.tables[0].rows,
            _least(summary),
        ),
        _figure(
            "error_by_epoch",
            "Test error by epoch",
            f"{bands}, over the seeds that finished the epoch; logarithmic error scale, 0 drawn at"
            " 0.05 %. A line that is missing or ends early belongs to runs that diverged.",
            [
                (_short(table), lambda axes, table=table: _epochs(axes, table))
                for table in summary.tables
            ],
            summary.tables[0].rows,
            _least(summary),
        ),
    ]


def _least(summary: Summary) -> float:
    """Return the least error in any figure; no less than half a picture, for the logarithm."""
    errors = [
        value
        for table in summary.tables
        for row in table.rows
        for value in (*row.errors, *(point.lower for point in row.curve))
    ]
    return max(min(errors, default=0.01), 0.5 / summary.pictures)


def _by_micro_batch(tables: Sequence[Table]) -> list[tuple[str, list[Table]]]:
    """Group tables that differ in the micro-batch alone; all of them if no two do."""
    groups: dict[str, list[Table]] = {}
    for table in tables:
        title = f"{table.panel.net} net, learning rate {table.panel.learning_rate:g}"
        groups.setdefault(title, []).append(table)
    several = {title: group for title, group in groups.items() if len(group) > 1}
    return [
        (title, sorted(group, key=lambda table: table.panel.micro_batch))
        for title, group in (several or groups).items()
    ]


def _short(table: Table) -> str:
    panel = table.panel
    return f"{panel.net} net, LR {panel.learning_rate:g}, micro-batch {panel.micro_batch}"


def _micro(axes: Any, tables: Sequence[Table]) -> None:
    sizes = [table.panel.micro_batch for table in tables]
    for place, first in enumerate(tables[0].rows):
        points = [
            (size, row)
            for size, table in zip(sizes, tables, strict=True)
            for row in table.rows
            if row.recipe == first.recipe and row.median is not None
        ]
        if not points:
            continue
        at = [size for size, _ in points]
        if len(sizes) > 1:
            _band(axes, place, at, *_quartiles([row for _, row in points]))
        else:
            # One micro-batch leaves no line: the recipes stand side by side instead.
            _bar(axes, place, points[0][1])
    if len(sizes) > 1:
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.set_xlabel("pictures in a micro-batch")
    else:
        axes.set_xticks(range(len(tables[0].rows)), [row.recipe for row in tables[0].rows])
        axes.set_xlabel(f"recipe, micro-batch {sizes[0]}")
    axes.minorticks_off()
    _error_axis(axes)


def _epochs(axes: Any, table: Table) -> None:
    epochs: set[int] = set()
    for place, row in enumerate(table.rows):
        if row.curve:
            at = [point.epoch for point in row.curve]
            epochs.update(at)
            columns = ([getattr(point, name) for point in row.curve] for name in _COLUMNS)
            _band(axes, place, at, *columns)
    lost = [f"{row.recipe} {row.diverged} of {row.seeds}" for row in table.rows if row.diverged]
    if lost:
        words = f"diverged: {', '.join(lost)}"
        axes.text(0.99, 0.99, words, transform=axes.transAxes, ha="right", va="top", size=9)
    last = max(epochs, default=1)
    stride = max(1, last // 6)
    ticks = sorted({1, last, *range(stride, last + 1, stride)})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set_xlabel("epoch")
    _error_axis(axes)


_COLUMNS = ("median", "lower", "upper")


def _quartiles(rows: Sequence[Row]) -> list[list[float]]:
    return [[getattr(row, name) for row in rows] for name in _COLUMNS]


def _style(place: int) -> dict[str, Any]:
    return {
        "color": LIGHT[place % len(LIGHT)],
        "marker": MARKERS[place % len(MARKERS)],
        "linestyle": LINES[place % len(LINES)],
        "markersize": 5,
    }


def _band(
    axes: Any,
    place: int,
    at: list[int],
    median: list[float],
    lower: list[float],
    upper: list[float],
) -> None:
    style = _style(place)
    axes.plot(at, _heights(median), **style)
    axes.fill_between(
        at,
        _heights(lower),
        _heights(upper),
        color=style["color"],
        alpha=0.18,
        linewidth=0,
    )


def _heights(errors: Sequence[float]) -> list[float]:
    """Return percentages; a logarithm has no place for 0, which goes to the lowest tick."""
    return [max(100 * error, TICKS[0]) for error in errors]


def _bar(axes: Any, place: int, row: Row) -> None:
    median, lower, upper = _heights([getattr(row, name) for name in _COLUMNS])
    axes.errorbar(
        [place], [median], [[median - lower], [upper - median]], capsize=4, **_style(place)
    )


def _error_axis(axes: Any) -> None:
    axes.set_yscale("log")
    axes.minorticks_off()
    axes.grid(axis="y", linewidth=0.8)
    axes.set_axisbelow(True)


def _same_errors(grid: Sequence[Any], least: float) -> None:
    """Give all axes one error scale that ends at a round number under the least error."""
    bottom = max((tick for tick in TICKS if tick <= 80 * least), default=TICKS[0])
    for axes in grid:
        axes.set_ylim(bottom, 160)
        axes.set_yticks(*zip(*((t, f"{t:g} %") for t in TICKS if t >= bottom), strict=True))


def _figure(
    name: str,
    title: str,
    caption: str,
    parts: Sequence[tuple[str, Any]],
    rows: Sequence[Row],
    least: float,
) -> Figure:
    import matplotlib
    from matplotlib.figure import Figure as Canvas
    from matplotlib.lines import Line2D

    columns = min(2, len(parts))
    lines = -(-len(parts) // columns)
    style: Any = {**STYLE, "svg.hashsalt": name}
    with matplotlib.rc_context(style):
        canvas = Canvas(figsize=(WIDTH, LEGEND + HEIGHT * lines), layout="constrained")
        grid = canvas.subplots(lines, columns, squeeze=False)
        for axes, (heading, fill) in zip(grid.flat, parts, strict=False):
            fill(axes)
            axes.set_title(heading)
        _same_errors(list(grid.flat), least)
        for axes in grid.flat[len(parts) :]:
            axes.remove()
        for line in grid:
            line[0].set_ylabel("test error")
        handles = [Line2D([], [], label=row.recipe, **_style(at)) for at, row in enumerate(rows)]
        canvas.legend(handles=handles, loc="outside lower center", ncols=min(6, len(rows)))
        svg, png = io.BytesIO(), io.BytesIO()
        # Without a date, so that the same results give the same file.
        canvas.savefig(svg, format="svg", transparent=True, metadata={"Date": None})
        canvas.savefig(png, format="png", dpi=150, facecolor="white")
    return Figure(name, title, caption, svg.getvalue(), png.getvalue())


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
