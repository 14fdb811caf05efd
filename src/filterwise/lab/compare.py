"""One comparison, from settings to tables and what they say."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from filterwise.lab.data import load
from filterwise.lab.errors import LabError
from filterwise.lab.pool import expected_work, train_all
from filterwise.lab.preflight import check_device, try_out
from filterwise.lab.reading import read
from filterwise.lab.results import Results
from filterwise.lab.settings import RunSettings, needs_branch_gains
from filterwise.lab.summary import Cell, summarize
from filterwise.lab.timing import kept_step_times

if TYPE_CHECKING:
    from collections.abc import Sequence

    from filterwise.lab.data import PictureSet
    from filterwise.lab.reading import Sentence
    from filterwise.lab.results import Record
    from filterwise.lab.settings import CompareSettings, Panel
    from filterwise.lab.summary import Summary
    from filterwise.lab.terminal import Terminal

__all__ = ["Comparison", "compare"]


@dataclass(frozen=True)
class Comparison:
    """What a comparison came to.

    Attributes:
        settings: What was asked for.
        command: The command line that asks for it.
        data: The pictures.
        records: The runs, of which some may be from earlier commands.
        summary: Tables and differences.
        sentences: The plain reading.
        notes: What the reader should know of the runs (mixed versions, unreadable lines).
    """

    settings: CompareSettings
    command: str
    data: PictureSet
    records: tuple[Record, ...]
    summary: Summary
    sentences: tuple[Sentence, ...]
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return plain data: what ``--json`` prints."""
        return {
            "command": self.command,
            "data": {
                "name": self.data.name,
                "origin": self.data.origin,
                "sha256": self.data.sha256,
                "test_pictures": self.summary.pictures,
                "chance_error": self.summary.chance,
            },
            "panels": [
                {
                    **table.panel.model_dump(),
                    "rows": [
                        {**asdict(row), "curve": [point._asdict() for point in row.curve]}
                        for row in table.rows
                    ],
                }
                for table in self.summary.tables
            ],
            "reading": [sentence._asdict() for sentence in self.sentences],
            "notes": list(self.notes),
        }


def compare(settings: CompareSettings, command: str, terminal: Terminal) -> Comparison:
    """Train what is missing, time the steps, and put together what came out.

    Args:
        settings: What to compare.
        command: The command line, as the page repeats it.
        terminal: Where progress and remarks go.

    Raises:
        UsageError: If data, network or device are not there; nothing was written.
        ConversionError: If a recipe does not fit a network; nothing was written.
        LabError: If something failed on the way; finished runs are kept.
    """
    check_device(settings.device)
    data = _load(settings, terminal)
    panels = settings.panels()
    runs = _runs(settings, panels, data)
    for sentence in try_out(_nets(panels), settings.recipes, data):
        terminal.warn(sentence)

    results = Results(Path(settings.out))
    results.prepare()
    before = results.read()
    notes = list(before.complaints)
    missing = [run for run in runs if run.identity not in before.records]
    _announce(runs, missing, results, terminal)
    for complaint in notes:
        terminal.warn(complaint)
    _train(missing, data, results, settings, terminal)

    records = results.read().records
    mine = [records[run.identity] for run in runs if run.identity in records]
    if len(mine) < len(runs):
        raise LabError(f"{len(runs) - len(mine)} runs are missing from {results.path}.")
    others = len(records) - len(mine)
    if others:
        notes.append(f"{results.path} also holds {others} runs of other settings, not shown here.")
    notes += _mixed_versions(mine)
    kinds = list(dict.fromkeys((panel.net, panel.micro_batch) for panel in panels))
    with terminal.progress("timing steps", len(kinds)) as advance:
        times = kept_step_times(
            kinds, settings.recipes, data, settings.device, results.folder, advance
        )
    steps = {
        Cell(panel, recipe): step
        for panel in panels
        for recipe, step in times[panel.net, panel.micro_batch].items()
    }
    summary = summarize(panels, settings.recipes, mine, data, steps)
    return Comparison(
        settings, command, data, tuple(mine), summary, tuple(read(summary)), tuple(notes)
    )


def _nets(panels: Sequence[Panel]) -> list[str]:
    return list(dict.fromkeys(panel.net for panel in panels))


def _load(settings: CompareSettings, terminal: Terminal) -> PictureSet:
    with terminal.progress("reading pictures", 1.0) as advance:
        return load(
            settings.data,
            root=settings.root,
            size=settings.size,
            download=settings.download,
            progress=advance,
        )


def _runs(
    settings: CompareSettings, panels: Sequence[Panel], data: PictureSet
) -> list[RunSettings]:
    """Return every run, seed by seed, so that what is finished first has all recipes in it."""
    runs = [
        RunSettings(
            data=data.name,
            data_sha256=data.sha256,
            net=panel.net,
            recipe=recipe,
            initialization="branch" if needs_branch_gains(panel.net, recipe) else "default",
            learning_rate=panel.learning_rate,
            micro_batch=panel.micro_batch,
            seed=seed,
            epochs=settings.epochs,
            device=torch.device(settings.device).type,
            deterministic=settings.deterministic,
        )
        for panel in panels
        for recipe in settings.recipes
        for seed in range(settings.seeds)
    ]
    pictures = len(data.train_labels)
    return sorted(runs, key=lambda run: (run.seed, -expected_work(run, pictures)))


def _announce(
    runs: Sequence[RunSettings],
    missing: Sequence[RunSettings],
    results: Results,
    terminal: Terminal,
) -> None:
    done = len(runs) - len(missing)
    if not done:
        terminal.say(f"{len(runs)} runs into {results.folder}")
    elif missing:
        terminal.say(f"{len(runs)} runs, {done} of them in {results.path} already")
    else:
        terminal.say(f"all {len(runs)} runs are in {results.path} already")


def _train(
    missing: Sequence[RunSettings],
    data: PictureSet,
    results: Results,
    settings: CompareSettings,
    terminal: Terminal,
) -> None:
    if not missing:
        return
    pictures = len(data.train_labels)
    total = sum(expected_work(run, pictures) for run in missing)
    done = 0
    with terminal.progress("training", max(total, 1.0)) as advance:

        def finished(run: RunSettings) -> None:
            nonlocal done
            done += 1
            advance(expected_work(run, pictures))

        try:
            train_all(
                missing,
                data,
                results,
                device=settings.device,
                processes=settings.processes,
                finished=finished,
            )
        except KeyboardInterrupt:
            raise LabError(
                f"Stopped. {done} of {len(missing)} runs finished and are kept in"
                f" {results.path}; the same command carries on with the others."
            ) from None


def _mixed_versions(records: Sequence[Record]) -> list[str]:
    """Say which packages the runs were made with several versions of."""
    notes = []
    for name in sorted({name for record in records for name in record.versions}):
        found = sorted({record.versions.get(name, "none") for record in records})
        if len(found) > 1:
            notes.append(
                f"These runs were made with several versions of {name}: {', '.join(found)}. Another"
                " --out trains all anew."
            )
    return notes
