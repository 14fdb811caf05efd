"""Figures of a table: curves with quartile bands, sweeps over the batch size, bars."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from filterwise.lab.look.drawing import INK, LIGHT, band, drawn, whiskers
from filterwise.lab.reporting import words
from filterwise.lab.statistics import Quartiles, quartiles

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from filterwise.lab.look.drawing import Figure
    from filterwise.lab.reporting.tables import Line, Table
    from filterwise.lab.reproduce.schema import Metric

__all__ = ["draw"]

TICKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)
# Where the largest of some errors is this many times the least, their axis is logarithmic.
WIDE = 5
FAR = 3
BAR, MARGIN = 0.34, 1.0
"""Inches of a bar and its gap, and of what stands around all bars."""


def draw(table: Table) -> list[Figure]:
    """Draw all figures of a table; one metric of several rows at least gives one."""
    found: list[Figure] = []
    seen: set[str] = set()
    for name, metric in table.metrics.items():
        if metric.statistic != "median" or metric.measured in seen:
            continue
        seen.add(metric.measured)
        found += _curves(table, name, metric)
        found += _sweep(table, name, metric)
        found += _bars(table, name, metric)
    return found


def _curves(table: Table, name: str, metric: Metric) -> Iterator[Figure]:
    lines = [line for line in table.lines if any(_curve(line, metric))]
    if not lines:
        return
    series, groups = _groups(lines)
    yield drawn(
        f"{table.name}-{words.slug(name)}-curves",
        f"{metric.title} by epoch [{table.budget}]",
        f"Median over the seeds that finished the epoch, and the band between the quartiles."
        f" {_runs(lines)}{_all_lost(lines)}",
        [
            (heading, lambda axes, mine=mine: _epochs(axes, mine, series, metric))
            for heading, mine in groups
        ],
        list(series.values()),
        label=_label(metric),
        finish=lambda grid: _scale(grid, metric),
    )


def _sweep(table: Table, name: str, metric: Metric) -> Iterator[Figure]:
    """Draw what the batch size does, where one method was run with several."""
    key = next((key for line in table.lines for key in line.at if "batch" in key), "")
    lines = [
        line
        for line in table.lines
        if isinstance(line.at.get(key), int | float) and line.metrics[name].spread
    ]
    methods = list(dict.fromkeys(line.method for line in lines))
    parts: dict[str, list[Line]] = {}
    varied = [name for name in _varied(lines) if name != key]
    for line in lines:
        parts.setdefault(_conditions(line, varied), []).append(line)
    parts = {
        heading: mine for heading, mine in parts.items() if len({line.at[key] for line in mine}) > 1
    }
    if not parts:
        return
    yield drawn(
        f"{table.name}-{words.slug(name)}-{words.slug(key)}",
        f"{metric.title} by {key} [{table.budget}]",
        f"Median over the seeds after the last epoch, and the band between the quartiles."
        f" {_runs(lines)} The horizontal scale is logarithmic.",
        [
            (heading, lambda axes, mine=mine: _batches(axes, mine, methods, name, key))
            for heading, mine in parts.items()
        ],
        methods,
        label=_label(metric),
        finish=lambda grid: _scale(grid, metric),
    )


def _bars(table: Table, name: str, metric: Metric) -> Iterator[Figure]:
    lines = [line for line in table.lines if line.metrics[name].spread]
    if not lines:
        return
    papers = [line.metrics[name].paper for line in lines]
    shown = table.comparable and any(paper and paper.value is not None for paper in papers)
    paper = " Hollow diamond: the paper's number." if shown else ""
    what = "Bar: median" if metric.better == "lower" else "Square: median"
    yield drawn(
        f"{table.name}-{words.slug(name)}-rows",
        f"{metric.title} by row [{table.budget}]",
        f"{what} over the seeds after the last epoch; whiskers: quartiles. {_runs(lines)}{paper}",
        [("", lambda axes: _rows(axes, lines, name, metric, papers=shown))],
        (),
        label="",
        height=MARGIN + BAR * len(lines),
    )


def _rows(axes: Any, lines: Sequence[Line], name: str, metric: Metric, *, papers: bool) -> None:
    ours = LIGHT[1]
    for place, line in enumerate(lines):
        found = line.metrics[name]
        if found.spread is None:
            continue
        lower, median, upper = found.spread
        # A bar stands for an amount and begins at 0; high accuracies would all look the same.
        if metric.better == "lower":
            axes.barh([place], [median], height=0.62, color=ours, alpha=0.55, linewidth=0)
        axes.errorbar(
            [median],
            [place],
            xerr=[[median - lower], [upper - median]],
            color=ours,
            ecolor=INK,
            marker="s",
            markersize=4,
            capsize=3,
            linestyle="",
        )
        if papers and found.paper and found.paper.value is not None:
            look = {"marker": "D", "markersize": 7, "fillstyle": "none", "linestyle": ""}
            axes.plot([found.paper.value], [place], color=INK, markeredgewidth=1.6, **look)
    _shorten(axes, lines, name)
    names = [f"{line.name}{_lost(line)}" for line in lines]
    axes.set_yticks(range(len(lines)), names)
    axes.set_ylim(len(lines) - 0.4, -0.6)
    axes.grid(axis="x", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_xlabel(_label(metric))


def _shorten(axes: Any, lines: Sequence[Line], name: str) -> None:
    """Cut bars that are far above the others at the figure's edge, and write their value there.

    One run that learned nothing would else leave no difference to be seen between the others.
    """
    tops = [line.metrics[name].spread for line in lines]
    uppers = sorted(spread.upper for spread in tops if spread is not None)
    usual = uppers[len(uppers) // 2]
    edge = 1.3 * max(upper for upper in uppers if upper <= FAR * usual)
    if uppers[-1] <= edge or usual <= 0:
        return
    axes.set_xlim(0, edge)
    for place, spread in enumerate(tops):
        if spread is not None and spread.median > edge:
            text = f"{words.number(spread.median)} \N{RIGHTWARDS ARROW}"
            axes.text(0.985 * edge, place, text, ha="right", va="center")


def _epochs(axes: Any, lines: Sequence[Line], series: dict[str, str], metric: Metric) -> None:
    last = 1
    for line in lines:
        curve = _curve(line, metric)
        if curve:
            spreads = list(curve.values())
            last = max(last, *curve)
            place = list(series).index(_key(line, series))
            median, lower, upper = _columns(spreads)
            band(axes, place, list(curve), median, lower, upper, marks=len(curve) <= 12)
    stride = max(1, last // 6)
    axes.set_xticks(sorted({1, last, *range(stride, last - stride // 2, stride)}))
    axes.set_xlabel("epoch")


def _columns(spreads: Sequence[Quartiles]) -> tuple[list[float], list[float], list[float]]:
    """Return medians, first and third quartiles."""
    return (
        [each.median for each in spreads],
        [each.lower for each in spreads],
        [each.upper for each in spreads],
    )


def _batches(axes: Any, lines: Sequence[Line], methods: list[str], name: str, key: str) -> None:
    for method in dict.fromkeys(line.method for line in lines):
        points = sorted(
            ((line.at[key], line.metrics[name].spread) for line in lines if line.method == method),
            key=lambda point: point[0],
        )
        spreads = [spread for _, spread in points if spread is not None]
        place = methods.index(method)
        if len(points) > 1:
            band(axes, place, [at for at, _ in points], *_columns(spreads))
        else:
            lower, median, upper = spreads[0]
            whiskers(axes, place, points[0][0], median, lower, upper)
    sizes = sorted({line.at[key] for line in lines})
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [f"{size:g}" for size in sizes])
    axes.minorticks_off()
    axes.set_xlabel(key)


def _curve(line: Line, metric: Metric) -> dict[int, Quartiles]:
    """Return the quartiles over the seeds after each epoch that was evaluated."""
    by_epoch: dict[int, list[float]] = {}
    for record in line.runs.values():
        for point in record.run.curve:
            value = metric.printed(point.get(metric.measured))
            if value is not None:
                by_epoch.setdefault(int(point["epoch"]), []).append(value)
    return {epoch: quartiles(values) for epoch, values in sorted(by_epoch.items())}


def _groups(lines: Sequence[Line]) -> tuple[dict[str, str], list[tuple[str, list[Line]]]]:
    """Return names by key of the series, and under each condition the lines that stand together.

    The series are the methods and the conditions stand apart, unless there is one method alone or
    a method comes twice under one condition.
    """
    methods = list(dict.fromkeys(line.method for line in lines))
    by_place: dict[str, list[Line]] = {}
    varied = _varied(lines)
    for line in lines:
        by_place.setdefault(_conditions(line, varied), []).append(line)
    twice = any(len({each.method for each in mine}) < len(mine) for mine in by_place.values())
    if len(methods) > 1 and not twice:
        return {method: method for method in methods}, list(by_place.items())
    return {line.name: line.name for line in lines}, [("", list(lines))]


def _key(line: Line, series: dict[str, str]) -> str:
    return line.name if line.name in series else line.method


def _varied(lines: Sequence[Line]) -> list[str]:
    """Return the conditions under which a method was run in more ways than one.

    What a method has always is part of what it is, and tells no parts of a figure apart.
    """
    values: dict[tuple[str, str], set[str]] = {}
    for line in lines:
        for name, value in line.at.items():
            values.setdefault((line.method, name), set()).add(str(value))
    return list(dict.fromkeys(name for (_, name), found in values.items() if len(found) > 1))


def _conditions(line: Line, names: Sequence[str]) -> str:
    named = [f"{name} {words.value(line.at[name])}" for name in names if name in line.at]
    return ", ".join([*named, line.variant] if line.variant else named)


def _lost(line: Line) -> str:
    return f", {line.diverged} of {len(line.runs)} diverged" if line.diverged else ""


def _all_lost(lines: Sequence[Line]) -> str:
    """Say whose lines end early."""
    lost = [f"{words.quoted([line.name])} ({line.diverged})" for line in lines if line.diverged]
    return f" A line ends where no run is left; diverged: {', '.join(lost)}." if lost else ""


def _runs(lines: Sequence[Line]) -> str:
    least, most = (choose(len(line.runs) for line in lines) for choose in (min, max))
    return f"{words.count(most, 'run') if least == most else f'{least} to {most} runs'} a row."


def _label(metric: Metric) -> str:
    return f"{metric.title}, {metric.unit}"


def _scale(grid: Sequence[Any], metric: Metric) -> None:
    """Give all axes one scale, logarithmic where errors lie far apart."""
    bottoms, tops = zip(*(axes.dataLim.intervaly for axes in grid), strict=True)
    bottom, top = min(bottoms), max(tops)
    wide = metric.better == "lower" and bottom > 0 and bottom * WIDE < top
    pad = 0.04 * (top - bottom) or 0.5
    for axes in grid:
        if wide:
            axes.set_yscale("log")
            axes.set_ylim(bottom / 1.1, top * 1.1)
            inside = [tick for tick in TICKS if bottom / 1.1 <= tick <= top * 1.1]
            axes.set_yticks(inside, [f"{tick:g}" for tick in inside])
        else:
            axes.set_ylim(bottom - pad, top + pad)
        axes.minorticks_off()
        axes.grid(axis="y", linewidth=0.8)
        axes.set_axisbelow(True)
