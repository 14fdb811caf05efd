"""A measure over layers, steps or epochs."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from filterwise.lab.diagnosis.canvas import Plot, paint, table_of, values_of
from filterwise.lab.look.drawing import GRID, INK, style

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    Records = Sequence[Mapping[str, Any]]

__all__ = ["Measure", "over_layers", "over_steps", "parts_by_sign", "share_curves", "totals"]


@dataclass(frozen=True)
class Measure:
    """What one panel shows.

    Attributes:
        heading: Of the panel.
        label: Of the vertical axis, with unit.
        signal: Which records.
        value: From a record's value to numbers; several are drawn as median and range.
        log: Logarithmic scale.
    """

    heading: str
    label: str
    signal: str
    value: Callable[[Any], Sequence[float]] = lambda value: (
        value if isinstance(value, list) else [value]
    )
    log: bool = False


def over_layers(
    name: str,
    title: str,
    caption: str,
    panels: Mapping[str, Records],
    measures: Sequence[Measure],
    *,
    repeats: str,
) -> Plot:
    """Draw measures against the layer: a line a net, its median over the steps, the range a band.

    Args:
        name: Stem of the files.
        title: Heading.
        caption: What is seen.
        panels: Records by net.
        measures: A panel each.
        repeats: What the range is over, for the axis: "batches".
    """
    rows: list[dict[str, Any]] = []

    def fill(grid: Any) -> None:
        for axes, measure in zip(grid.flat, measures, strict=True):
            most = 0
            for place, (net, records) in enumerate(panels.items()):
                by_layer: dict[str, list[float]] = {}
                steps = set()
                for step, layer, value in values_of(records, measure.signal):
                    steps.add(step)
                    numbers = [one for one in measure.value(value) if math.isfinite(one)]
                    by_layer.setdefault(layer, []).extend(numbers)
                most = max(most, len(steps))
                points = [_spread(values) for values in by_layer.values()]
                at = range(1, len(points) + 1)
                _band(axes, place, list(at), points)
                rows.extend(
                    {
                        "panel": measure.heading, "net": net, "layer": layer, "n": len(steps),
                        "median": middle, "least": low, "most": high,
                    }
                    for layer, (middle, low, high) in zip(by_layer, points, strict=True)
                )  # fmt: skip
            _finish(axes, measure, f"weight layer (n = {most} {repeats})")
            axes.xaxis.get_major_locator().set_params(integer=True)

    figure = paint(
        name, title, caption, (1, len(measures)), fill, height=3.1, legend=_legend(list(panels))
    )
    return Plot(figure, table_of(rows))


def over_steps(
    name: str,
    title: str,
    caption: str,
    panels: Mapping[str, Records],
    measures: Sequence[Measure],
    *,
    at: str,
) -> Plot:
    """Draw measures against the step: a line a net; with several numbers a step, their median.

    Args:
        name: Stem of the files.
        title: Heading.
        caption: What is seen.
        panels: Records by net, of one layer.
        measures: A panel each.
        at: Label of the horizontal axis.
    """
    rows: list[dict[str, Any]] = []

    def fill(grid: Any) -> None:
        for axes, measure in zip(grid.flat, measures, strict=True):
            for place, (net, records) in enumerate(panels.items()):
                found = values_of(records, measure.signal)
                points = [(step, _spread(list(measure.value(value)))) for step, _, value in found]
                _band(axes, place, [step for step, _ in points], [point for _, point in points])
                rows.extend(
                    {
                        "panel": measure.heading, "net": net, "step": step,
                        "median": middle, "least": low, "most": high,
                    }
                    for step, (middle, low, high) in points
                )  # fmt: skip
            _finish(axes, measure, at)

    figure = paint(
        name, title, caption, (1, len(measures)), fill, height=3.1, legend=_legend(list(panels))
    )
    return Plot(figure, table_of(rows))


def totals(records: Records, parts: Sequence[str]) -> dict[int, dict[str, float]]:
    """Return the shares of the squared gradient norm by step: over a layer's filters, then layers.

    A filter's share weighs as its ``|G|^2``; layers weigh alike. The parts of a step add to one.
    """
    norms = {(s, layer): v for s, layer, v in values_of(records, "effective_gradient_norm")}
    layers: dict[int, dict[str, list[float]]] = {}
    for part in parts:
        for step, layer, shares in values_of(records, part):
            squares = [norm**2 for norm in norms[step, layer]]
            whole = sum(squares)
            if not whole or not math.isfinite(whole):
                continue
            pairs = zip(shares, squares, strict=True)
            own = sum(share * square for share, square in pairs if square) / whole
            layers.setdefault(step, {}).setdefault(part, []).append(own)
    return {
        step: {part: statistics.fmean(values) for part, values in found.items()}
        for step, found in sorted(layers.items())
    }


SHARES = {
    "lipschitz_radial": "removed by dividing (Eq. 6)",
    "lipschitz_mean": "removed by centring (Eq. 5)",
    "lipschitz_kept": "left",
}


def share_curves(
    name: str,
    title: str,
    caption: str,
    curves: Mapping[str, Sequence[Mapping[str, float]]],
    records: Records,
    *,
    pictures: tuple[int, int],
) -> Plot:
    """Draw error by epoch of several nets, and the three shares of one of them.

    Args:
        name: Stem of the files.
        title: Heading.
        caption: What is seen.
        curves: By net, for each epoch ``epoch``, ``train_error`` and ``test_error``.
        records: Shares and norms of gradients, whose step is the epoch.
        pictures: How many there are to train and to test on.
    """
    rows: list[dict[str, Any]] = []
    shares = totals(records, list(SHARES))
    layers = len({record["layer"] for record in records})

    def fill(grid: Any) -> None:
        for axes, key, n in zip(grid.flat, ("train_error", "test_error"), pictures, strict=False):
            for place, (net, curve) in enumerate(curves.items()):
                at = [point["epoch"] for point in curve]
                values = [100 * point[key] for point in curve]
                axes.plot(at, values, **style(place))
                rows.extend(
                    {"panel": key, "line": net, "epoch": int(x), "value": y}
                    for x, y in zip(at, values, strict=True)
                )
            words = "training" if key == "train_error" else "test"
            _finish(axes, Measure(f"{words} error", "error, %", ""), f"epoch (n = {n} pictures)")
            axes.legend(handles=_handles(list(curves)), fontsize=7.5)
        for place, (part, words) in enumerate(SHARES.items()):
            values = [found[part] for found in shares.values()]
            grid[0][2].plot(list(shares), values, label=words, **style(place))
            rows.extend(
                {"panel": "shares", "line": part, "epoch": step, "value": found[part]}
                for step, found in shares.items()
            )
        measure = Measure("squared gradient norm by part", "share of |G|²", "", log=True)
        _finish(grid[0][2], measure, f"epoch (n = {layers} layers)")
        grid[0][2].legend(fontsize=7.5, loc="center right")

    return Plot(paint(name, title, caption, (1, 3), fill, height=3.1), table_of(rows))


def parts_by_sign(
    name: str, title: str, caption: str, kernels: Mapping[int, Sequence[float]], records: Records
) -> Plot:
    """Draw a kernel's weights by sign at several epochs, and what each sign adds to the output.

    Args:
        name: Stem of the files.
        title: Heading.
        caption: What is seen.
        kernels: Effective weights of one kernel by epoch.
        records: Positive and negative contributions of one layer of one channel, whose step is the
            epoch, summed over its outputs.
    """
    rows: list[dict[str, Any]] = []
    epochs = list(kernels)

    def fill(grid: Any) -> None:
        most = max(abs(weight) for kernel in kernels.values() for weight in kernel)
        for axes, (epoch, kernel) in zip(grid.flat, kernels.items(), strict=False):
            at = range(1, len(kernel) + 1)
            colours = [style(1)["color"] if weight > 0 else style(2)["color"] for weight in kernel]
            bars = axes.bar(at, kernel, color=colours)
            for bar, weight in zip(bars, kernel, strict=True):
                bar.set_hatch("" if weight > 0 else "///")
                bar.set_edgecolor("white")
            axes.axhline(0, color=INK, linewidth=0.8)
            axes.set_ylim(-1.1 * most, 1.1 * most)
            axes.set_title(f"epoch {epoch}")
            axes.set_xticks(list(at))
            axes.set_xlabel(f"weight of the kernel (n = {len(kernel)})")
            rows.extend(
                {"panel": "kernel", "line": place, "epoch": epoch, "value": weight}
                for place, weight in zip(at, kernel, strict=True)
            )
        grid[0][0].set_ylabel("effective weight, value")
        axes = grid[0][-1]
        for place, sign in ((1, "positive"), (2, "negative")):
            found = values_of(records, f"{sign}_contribution")
            steps, values = [step for step, _, _ in found], [value[0] for _, _, value in found]
            every = max(1, len(steps) // 8)
            axes.plot(steps, values, label=f"{sign} weights", markevery=every, **style(place))
            rows.extend(
                {"panel": "contribution", "line": sign, "epoch": step, "value": value}
                for step, value in zip(steps, values, strict=True)
            )
        _finish(axes, Measure("summed over the outputs", "contribution, sum", ""), "epoch")
        axes.legend(fontsize=8, loc="center right")

    return Plot(paint(name, title, caption, (1, len(epochs) + 1), fill, height=2.7), table_of(rows))


def _spread(values: Sequence[float]) -> tuple[float, float, float]:
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return math.nan, math.nan, math.nan
    return statistics.median(finite), min(finite), max(finite)


def _band(
    axes: Any, place: int, at: Sequence[float], points: Sequence[tuple[float, float, float]]
) -> None:
    look = style(place)
    if len(at) > 30:
        look |= {"markevery": max(1, len(at) // 10)}
    axes.plot(at, [point[0] for point in points], **look)
    low, high = [point[1] for point in points], [point[2] for point in points]
    if low != high:
        axes.fill_between(at, low, high, color=look["color"], alpha=0.15, linewidth=0)


def _finish(axes: Any, measure: Measure, at: str) -> None:
    axes.set_title(measure.heading)
    axes.set_xlabel(at)
    # Within a decade a logarithmic axis has no round number to show.
    log = measure.log and _spans_a_decade(axes)
    axes.set_ylabel(f"{measure.label}, logarithmic" if log else measure.label)
    if log:
        axes.set_yscale("log")
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)


def _spans_a_decade(axes: Any) -> bool:
    values = [value for line in axes.lines for value in line.get_ydata() if value > 0]
    return bool(values) and max(values) > 10 * min(values)


def _handles(names: Sequence[str]) -> list[Any]:
    from matplotlib.lines import Line2D

    return [Line2D([], [], label=one, **style(place)) for place, one in enumerate(names)]


def _legend(names: Sequence[str]) -> Callable[[Any], None]:
    def legend(canvas: Any) -> None:
        canvas.legend(handles=_handles(names), loc="outside lower center", ncols=min(6, len(names)))

    return legend
