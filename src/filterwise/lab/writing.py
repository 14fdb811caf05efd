"""The files of a comparison beside its results: figures and the page."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filterwise.lab.figures import draw
from filterwise.lab.pages import page
from filterwise.lab.results import write_whole

if TYPE_CHECKING:
    from collections.abc import Sequence

    from filterwise.lab.compare import Comparison
    from filterwise.lab.results import Record

__all__ = ["pairs_of", "write"]


def write(comparison: Comparison) -> dict[str, Path]:
    """Write figures and page into the run's folder.

    Returns:
        Path by what is in it: ``page``, ``results``, and the names of the figures' files.

    Raises:
        LabError: If the disk refuses.
    """
    folder = Path(comparison.settings.out)
    files = {"page": folder / "index.html", "results": folder / "results.jsonl"}
    figures = draw(comparison.summary)
    for figure in figures:
        for ending, content in (("svg", figure.svg), ("png", figure.png)):
            path = folder / f"{figure.name}.{ending}"
            write_whole(path, content)
            files[path.name] = path
    text = page(comparison.summary, comparison.sentences, figures, _facts(comparison))
    write_whole(files["page"], text.encode())
    return files


def _facts(comparison: Comparison) -> dict[str, Any]:
    settings, data, records = comparison.settings, comparison.data, comparison.records
    nets = {table.panel.net: table for table in reversed(comparison.summary.tables)}
    return {
        "command": comparison.command,
        "folder": str(Path.cwd()),
        "finished": datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        "runs": len(records),
        "data": {
            "name": data.name,
            "origin": data.origin[0].upper() + data.origin[1:],
            "train": len(data.train_labels),
            "classes": len(data.classes),
        },
        "settings": {"epochs": settings.epochs, "rows": _setting_rows(records)},
        "versions": pairs_of(records, "versions"),
        "hardware": pairs_of(records, "hardware"),
        "notes": comparison.notes,
        "nets": list(nets.values()),
    }


def _setting_rows(records: Sequence[Record]) -> list[tuple[str, str]]:
    first = records[0].settings
    seconds = sum(record.times["seconds"] for record in records)
    rows = [
        (
            "Optimizer",
            f"SGD, momentum {first.momentum:g}, weight decay {first.weight_decay:g} on weights"
            " (none on gains, biases and norms), learning rate falling to zero along a cosine",
        ),
        (
            "Step",
            f"{first.step_size} pictures, whatever the micro-batch: gradients are added up and one"
            " optimizer step is taken; what is left over at the end of an epoch is left out of it",
        ),
        ("Seeds", _seeds([record.settings.seed for record in records])),
    ]
    if any(record.settings.initialization == "branch" for record in records):
        rows.append(
            (
                "Start",
                "He et al. (2015), fan-in; on the residual net, recipes with gains and without an"
                " activation norm start with gains of 1/sqrt(24) at the end of the 24 branches",
            )
        )
    rows.append(("Training time", f"{seconds:.0f} s over all runs, several at a time"))
    return rows


def _seeds(seeds: Sequence[int]) -> str:
    found = sorted(set(seeds))
    words = ", ".join(str(seed) for seed in found)
    return f"{words}; the same first weights and order of pictures for all recipes of a seed"


def pairs_of(records: Sequence[Any], name: str) -> str:
    """Write what all records have under a name; several values where they differ."""
    values: dict[str, list[str]] = {}
    for record in records:
        for key, value in getattr(record, name).items():
            seen = values.setdefault(key, [])
            if str(value) not in seen:
                seen.append(str(value))
    return ", ".join(f"{key} {' and '.join(found)}" for key, found in values.items())
