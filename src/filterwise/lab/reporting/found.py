"""The runs in a folder, and what in it is no run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from filterwise.lab.errors import UsageError
from filterwise.lab.reproduce.records import ReproduceResults

if TYPE_CHECKING:
    from filterwise.lab.reproduce.records import ReproduceRecord

__all__ = ["Found", "find"]

FILE = "results.jsonl"


@dataclass(frozen=True)
class Found:
    """What a folder holds.

    Attributes:
        records: Finished runs in their order.
        files: Where they stand.
        notes: One sentence for each file with lines that cannot be read.
    """

    records: tuple[ReproduceRecord, ...]
    files: tuple[Path, ...]
    notes: tuple[str, ...]


def find(folder: Path) -> Found:
    """Return the runs of a folder: of its ``results.jsonl``, or of all those in the folders below.

    Raises:
        UsageError: If there is no folder, no such file, or no run.
        LabError: If a file cannot be opened.
    """
    files = _files(folder)
    records: dict[str, ReproduceRecord] = {}
    notes = []
    for path in files:
        results = ReproduceResults(path.parent)
        contents = results.read()
        # Copies of one run in several folders are one run.
        records |= contents.records
        if contents.complaints:
            notes.append(_note(path, contents.complaints))
    if not records:
        where = (
            files[0] if len(files) == 1 else f"any of the {len(files)} results files in {folder}"
        )
        why = f" {notes[0]}" if notes else ""
        raise UsageError(
            f"no finished run of filterwise reproduce is in {where} yet.{why} Give the command that"
            " makes them again; it carries on with what is missing."
        )
    return Found(tuple(records.values()), tuple(files), tuple(notes))


def _files(folder: Path) -> list[Path]:
    if not folder.exists():
        raise UsageError(f"{folder}: there is no such folder.")
    if not folder.is_dir():
        raise UsageError(f"{folder} is a file: name the folder that {FILE} lies in.")
    own = folder / FILE
    files = [own] if own.exists() else sorted(folder.rglob(FILE))
    if not files:
        raise UsageError(
            f"{folder} has no {FILE}, nor has a folder in it. `filterwise reproduce ID --folder"
            f" {folder}` writes one."
        )
    return files


def _note(path: Path, complaints: tuple[str, ...]) -> str:
    if len(complaints) == 1:
        return complaints[0]
    first = complaints[0].removeprefix(f"{path} ").partition(";")[0]
    return f"{path}: {len(complaints)} lines are not counted (the first: {first})."
