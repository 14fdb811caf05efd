"""Figures of a comparison: error by micro-batch, error by epoch; SVG and PNG."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from filterwise.lab.look.drawing import band, drawn, whiskers

if TYPE_CHECKING:
    from collections.abc import Sequence

    from filterwise.lab.look.drawing import Figure
    from filterwise.lab.summary import Row, Summary, Table

__all__ = ["draw"]

TICKS = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)


def draw(summary: Summary) -> list[Figure]:
    """Draw all figures of a comparison."""
    seeds = summary.tables[0].rows[0].seeds
    bands = f"Median and quartiles over {seeds} seed{'s' if seeds > 1 else ''}"
    groups = _by_micro_batch(summary.tables)
    names = [row.recipe for row in summary.tables[0].rows]
    least = _least(summary)
    return [
        drawn(
            "error_by_micro_batch",
            "Test error by micro-batch",
            f"{bands}, after the last epoch; logarithmic scales, 0 drawn at 0.05 %. Every optimizer"
            " step has the same pictures in all, cut into micro-batches.",
            [(title, lambda axes, tables=tables: _micro(axes, tables)) for title, tables in groups],
            names,
            label="test error",
            finish=lambda grid: _same_errors(grid, least),
        ),
        drawn(
            "error_by_epoch",
            "Test error by epoch",
            f"{bands}, over the seeds that finished the epoch; logarithmic error scale, 0 drawn at"
            " 0.05 %. A line that is missing or ends early belongs to runs that diverged.",
            [
                (_short(table), lambda axes, table=table: _epochs(axes, table))
                for table in summary.tables
            ],
            names,
            label="test error",
            finish=lambda grid: _same_errors(grid, least),
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
            band(axes, place, at, *_quartiles([row for _, row in points]))
        else:
            # One micro-batch leaves no line: the recipes stand side by side instead.
            median, lower, upper = _heights([getattr(points[0][1], name) for name in _COLUMNS])
            whiskers(axes, place, place, median, lower, upper)
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
            columns = (_heights([getattr(point, name) for point in row.curve]) for name in _COLUMNS)
            band(axes, place, at, *columns)
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
    return [_heights([getattr(row, name) for row in rows]) for name in _COLUMNS]


def _heights(errors: Sequence[float]) -> list[float]:
    """Return percentages; a logarithm has no place for 0, which goes to the lowest tick."""
    return [max(100 * error, TICKS[0]) for error in errors]


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
