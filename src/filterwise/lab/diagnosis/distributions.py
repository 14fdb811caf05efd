"""Distributions: channels side by side, and one channel over the epochs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from filterwise.lab.diagnosis.canvas import Plot, paint, table_of, values_of
from filterwise.lab.diagnosis.densities import density
from filterwise.lab.look.drawing import INK, LIGHT, LINES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from filterwise.lab.diagnosis.densities import Density

    Records = Sequence[Mapping[str, Any]]

__all__ = ["channel_distributions", "ridgelines"]

SMOOTHED = (
    "Densities are smoothed with a normal kernel of Silverman's width; what lies more than five"
    " deviations out is counted at the ends."
)


def channel_distributions(
    name: str,
    title: str,
    caption: str,
    panels: Mapping[str, Records],
    layers: Mapping[str, str],
    channels: int = 8,
) -> Plot:
    """Draw the density of the first channels, a row a panel and a column a layer.

    Args:
        name: Stem of the files.
        title: Heading.
        caption: What is seen; how curves are made is added.
        panels: Records with ``channel_histogram``, by heading.
        layers: Heading of each column by the layer's dotted name.
        channels: How many channels, from the first on.
    """
    rows: list[dict[str, Any]] = []

    def fill(grid: Any) -> None:
        for line, (heading, records) in zip(grid, panels.items(), strict=True):
            for axes, (layer, words) in zip(line, layers.items(), strict=True):
                found = values_of(records, "channel_histogram", layer)
                curves = [density(row) for row in found[-1][2][:channels]] if found else []
                _curves(axes, curves)
                axes.set_title(f"{heading}: {words}")
                rows.extend(_rows({"panel": heading, "layer": layer}, "channel", curves))
            line[0].set_ylabel("density")
        for axes in grid[-1]:
            axes.set_xlabel(f"activation\n(n = {_count(axes)} values a channel)")

    def legend(canvas: Any) -> None:
        from matplotlib.lines import Line2D

        handles = [Line2D([], [], label=str(place), **_line(place)) for place in range(channels)]
        canvas.legend(handles=handles, loc="outside lower center", ncols=channels, title="channel")

    shape = (len(panels), len(layers))
    figure = paint(name, title, f"{caption} {SMOOTHED}", shape, fill, height=1.75, legend=legend)
    return Plot(figure, table_of(rows))


def ridgelines(
    name: str,
    title: str,
    caption: str,
    panels: Mapping[str, Records],
    signal: str,
    layer: str,
    *,
    channel: int = 0,
    quantity: str,
) -> Plot:
    """Draw the density of one filter or channel over the epochs, the first one on top.

    Args:
        name: Stem of the files.
        title: Heading.
        caption: What is seen; how curves are made is added.
        panels: Records of a histogram signal, whose step is the epoch, by heading.
        signal: The signal.
        layer: Dotted name.
        channel: Which filter or channel.
        quantity: What stands on the horizontal axis.
    """
    rows: list[dict[str, Any]] = []
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)

    def fill(grid: Any) -> None:
        for axes, (heading, records) in zip(grid.flat, panels.items(), strict=False):
            found = [
                (epoch, density(value[channel]))
                for epoch, _, value in values_of(records, signal, layer)
            ]
            curves = {epoch: curve for epoch, curve in found if curve is not None}
            _ridges(axes, curves)
            axes.set_title(heading)
            count = max((curve.total for curve in curves.values()), default=0)
            axes.set_xlabel(f"{quantity} (n = {count} an epoch)")
            for epoch, curve in curves.items():
                rows.extend(_rows({"panel": heading, "layer": layer}, "epoch", {epoch: curve}))
        for line in grid:
            line[0].set_ylabel("epoch")
        for axes in grid.flat[len(panels) :]:
            axes.remove()

    figure = paint(name, title, f"{caption} {SMOOTHED}", (lines, columns), fill, height=2.9)
    return Plot(figure, table_of(rows))


def _line(place: int) -> dict[str, Any]:
    return {
        "color": LIGHT[place % len(LIGHT)],
        "linestyle": LINES[place % 4],
        "linewidth": 1.3 if place < 4 else 1.0,
    }


def _curves(axes: Any, curves: Sequence[Density | None]) -> None:
    seen = 0
    for place, curve in enumerate(curves):
        if curve is None:
            continue
        axes.plot(curve.at, curve.height, **_line(place))
        seen = max(seen, curve.total)
    axes.filterwise_count = seen
    lost = sum(curve is None for curve in curves)
    if lost or not curves:
        words = f"{lost} of {len(curves)} constant or not finite" if curves else "no finite values"
        axes.text(0.98, 0.96, words, transform=axes.transAxes, ha="right", va="top", size=8)
    axes.set_ylim(bottom=0)
    axes.axvline(0, color=INK, linewidth=0.6, zorder=0)


def _count(axes: Any) -> str:
    column = axes.get_subplotspec().colspan.start
    counts = [
        other.filterwise_count
        for other in axes.figure.axes
        if other.get_subplotspec().colspan.start == column
    ]
    return f"{max(counts):,}"


def _ridges(axes: Any, curves: Mapping[int, Density]) -> None:
    """Draw one curve an epoch, each over the one above it."""
    tallest = max((max(curve.height) for curve in curves.values()), default=1.0) or 1.0
    for place, (epoch, curve) in enumerate(curves.items()):
        base = -place
        line = [base + 1.8 * height / tallest for height in curve.height]
        axes.fill_between(curve.at, base, line, color=LIGHT[1], alpha=0.30, linewidth=0)
        axes.plot(curve.at, line, color=LIGHT[1], linewidth=1.0)
        del epoch
    axes.axvline(0, color=INK, linewidth=0.6, zorder=0)
    stride = max(1, len(curves) // 8)
    shown = [(-place, epoch) for place, epoch in enumerate(curves) if place % stride == 0]
    if shown:
        axes.set_yticks([at for at, _ in shown], [str(epoch) for _, epoch in shown])
    else:
        axes.text(0.5, 0.5, "no finite values", transform=axes.transAxes, ha="center")
        axes.set_yticks([])


def _rows(
    known: dict[str, Any], key: str, curves: Sequence[Density | None] | Mapping[int, Density]
) -> list[dict[str, Any]]:
    pairs = curves.items() if isinstance(curves, Mapping) else enumerate(curves)
    return [
        {**known, key: place, "n": curve.total, "value": f"{x:.6g}", "density": f"{y:.6g}"}
        for place, curve in pairs
        if curve is not None
        for x, y in zip(curve.at, curve.height, strict=True)
    ]
