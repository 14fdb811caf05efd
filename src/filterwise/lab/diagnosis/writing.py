"""The files of a diagnosis: figures with their data, TensorBoard, and the page to step through."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filterwise.lab.errors import UsageError, reason
from filterwise.lab.look.pages import placed, render
from filterwise.lab.results import write_whole

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from filterwise.lab.diagnosis.canvas import Plot

    Records = Sequence[Mapping[str, Any]]

__all__ = ["explorable", "made_folder", "write"]

CHANNELS = 8
DISTRIBUTIONS = {
    "channel_histogram": "activations of the layer",
    "effective_weight_histogram": "effective weight",
    "weight_histogram": "raw weight",
}


def write(
    folder: Path,
    plots: Sequence[Plot],
    nets: Mapping[str, Records],
    facts: Mapping[str, str],
) -> dict[str, Path]:
    """Write everything of a diagnosis into its folder.

    Args:
        folder: Made if it is not there.
        plots: The figures.
        nets: Records with histograms to step through, by net; the step is the epoch.
        facts: What is said on the page of how it came about.

    Returns:
        Path by what is in it.

    Raises:
        LabError: If the disk refuses.
    """
    made_folder(folder)
    files: dict[str, Path] = {"page": folder / "index.html"}
    for plot in plots:
        figure = plot.figure
        contents = (("svg", figure.svg), ("png", figure.png), ("csv", plot.data.encode()))
        for ending, content in contents:
            path = folder / f"{figure.name}.{ending}"
            write_whole(path, content)
            files[path.name] = path
    page = render(
        Path(__file__).with_name("page.html"),
        {},
        figures=placed(plot.figure for plot in plots),
        explorable=explorable(nets),
        facts=facts,
    )
    write_whole(files["page"], page.encode())
    _to_tensorboard(folder / "tensorboard", plots, nets)
    files["tensorboard"] = folder / "tensorboard"
    return files


def made_folder(folder: Path) -> None:
    """Make the folder.

    Raises:
        UsageError: If it cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".writable").touch()
        (folder / ".writable").unlink()
    except OSError as error:
        raise UsageError(f"--out {folder}: it cannot be written: {reason(error)}.") from None


def explorable(nets: Mapping[str, Records]) -> str:
    """Return the distributions of all nets, layers and epochs as JSON for a script element."""
    found: dict[str, Any] = {}
    for net, records in nets.items():
        for record in records:
            words = DISTRIBUTIONS.get(record["signal"])
            if words is None:
                continue
            rows = [
                [round(row[0], 6), round(row[1], 6), [int(count) for count in row[2:]]]
                for row in record["value"][:CHANNELS]
                if row[1] > row[0]
            ]
            layers = found.setdefault(net, {}).setdefault(f"{record['layer']}: {words}", {})
            layers[str(record["step"])] = rows
    # A name that closes the element or opens a comment must not leave the text.
    return json.dumps(found, separators=(",", ":")).replace("<", "\\u003c")


def _to_tensorboard(folder: Path, plots: Sequence[Plot], nets: Mapping[str, Records]) -> None:
    import numpy as np
    from PIL import Image
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder)) as writer:
        for plot in plots:
            picture = np.asarray(Image.open(io.BytesIO(plot.figure.png)).convert("RGB"))
            writer.add_image(plot.figure.name, picture, dataformats="HWC")
        for net, records in nets.items():
            for record in records:
                if record["signal"] in DISTRIBUTIONS:
                    _add_histogram(writer, net, record)


def _add_histogram(writer: Any, net: str, record: Mapping[str, Any]) -> None:
    """Add the first channel of a layer."""
    low, high, *counts = record["value"][0]
    total = sum(counts)
    if not total or not high > low:
        return
    width = (high - low) / len(counts)
    centres = [low + width * (place + 0.5) for place in range(len(counts))]
    pairs = list(zip(centres, counts, strict=True))
    writer.add_histogram_raw(
        f"{net}/{record['layer']}/{record['signal']}",
        min=low,
        max=high,
        num=total,
        sum=sum(x * n for x, n in pairs),
        sum_squares=sum(x * x * n for x, n in pairs),
        bucket_limits=[low + width * (place + 1) for place in range(len(counts))],
        bucket_counts=counts,
        global_step=record["step"],
    )
