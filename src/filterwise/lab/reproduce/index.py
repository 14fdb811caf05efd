"""Every table and figure of the papers, whether it has a recipe or not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from filterwise.lab.checking import checked_values, nearest
from filterwise.lab.errors import UsageError
from filterwise.lab.reproduce.documents import read_document
from filterwise.lab.reproduce.experiments import RECIPES, find_experiment, recipe_ids
from filterwise.lab.settings import Frozen

if TYPE_CHECKING:
    from pathlib import Path

    from filterwise.lab.reproduce.experiments import Experiment

__all__ = ["Listed", "find", "listed"]

FILE = "index.yaml"


class _Entry(Frozen):
    id: str
    where: str
    task: str
    title: str
    runs_of: str | None = None


class _Index(Frozen):
    order: tuple[str, ...]
    entries: tuple[_Entry, ...]


@dataclass(frozen=True)
class Listed:
    """One table or figure.

    Attributes:
        id: Its recipe's name.
        where: Section and table or figure.
        task: What is learned.
        title: What it shows.
        rows: Number of rows of its recipe; 0 without one.
        without: Why it cannot be run, where it has no recipe.
    """

    id: str
    where: str
    task: str
    title: str
    rows: int
    without: str | None = None


def listed(root: Path = RECIPES) -> list[Listed]:
    """Return everything in the order of the papers, recipes that are in no list last.

    Raises:
        UsageError: If a file says what it may not say.
    """
    index, entries = _read(root)
    ids = recipe_ids(root)
    found: list[Listed] = []
    for name in (*index, *(each for each in ids if each not in index)):
        if name in ids:
            recipe = find_experiment(name, root).recipe
            rows = len(recipe.rows)
            found.append(Listed(name, recipe.where, recipe.task, recipe.title, rows))
        elif name in entries:
            entry = entries[name]
            found.append(Listed(name, entry.where, entry.task, entry.title, 0, _why(entry)))
    return found


def find(name: str, root: Path = RECIPES) -> Experiment:
    """Return a recipe by id or path.

    Raises:
        UsageError: If there is none, naming the nearest, or saying why one that is in the papers
            cannot be run.
    """
    index, entries = _read(root)
    if name.lower() in recipe_ids(root) or name.endswith((".yaml", ".yml")):
        return find_experiment(name, root)
    if name.lower() in entries:
        raise UsageError(f"{name} cannot be run: {_why(entries[name.lower()])}.")
    known = list(dict.fromkeys([*index, *recipe_ids(root)]))
    raise UsageError(
        f"there is no recipe {name!r}. {nearest(name.lower(), known, 'Recipes')} filterwise"
        " reproduce --list shows all."
    )


def _read(root: Path) -> tuple[tuple[str, ...], dict[str, _Entry]]:
    path = root / FILE
    if not path.exists():
        return (), {}
    document = read_document(path)
    index = checked_values(_Index, document.values, document.where)
    return index.order, {entry.id: entry for entry in index.entries}


def _why(entry: _Entry) -> str:
    if entry.runs_of:
        return f"it is drawn from {entry.runs_of}, and has no recipe of its own"
    return f"it has no recipe yet (task: {entry.task})"
