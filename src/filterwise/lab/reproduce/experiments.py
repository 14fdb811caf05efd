"""Recipes by id or path, and the settings that their rows mean."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filterwise.lab.checking import checked_values, nearest
from filterwise.lab.errors import UsageError
from filterwise.lab.reproduce.documents import Document, read_document
from filterwise.lab.reproduce.schema import PaperDefaults, ReproduceRecipe, Row
from filterwise.lab.training.settings import TrainingSettings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from filterwise.lab.reproduce.documents import Place

__all__ = ["RECIPES", "Experiment", "find_experiment", "read_experiment", "recipe_ids"]

RECIPES = Path(__file__).parent.parent / "recipes"
"""Where the recipes lie, a folder for each paper."""
DEFAULTS = "defaults.yaml"


@dataclass(frozen=True)
class Experiment:
    """A recipe with the defaults of its paper.

    Attributes:
        recipe: What its file says.
        paper: What the defaults beside it say.
        sha256: Digest of both files.
        file: The recipe's.
        defaults: The paper's.
    """

    recipe: ReproduceRecipe
    paper: PaperDefaults
    sha256: str
    file: Document
    defaults: Document

    @property
    def seeds(self) -> int:
        """How many seeds the full set-up has."""
        return self.recipe.seeds or self.paper.seeds

    def row(self, label: str) -> Row:
        """Return a row by its label.

        Raises:
            UsageError: If there is none.
        """
        for row in self.recipe.rows:
            if row.label == label:
                return row
        hint = nearest(label, [row.label for row in self.recipe.rows], "Rows")
        raise UsageError(f"{self.recipe.id} has no row {label!r}. {hint}")

    def rows(self, names: Sequence[str]) -> list[Row]:
        """Return the rows that names mean, labels or methods in any case; all without a name.

        Raises:
            UsageError: If a name means none.
        """
        if not names:
            return list(self.recipe.rows)
        found: list[Row] = []
        for name in names:
            same = [row for row in self.recipe.rows if row.label.lower() == name.lower()]
            same = same or [row for row in self.recipe.rows if row.method.lower() == name.lower()]
            found += same or [self.row(name)]
        return [row for row in self.recipe.rows if row in found]

    def settings(self, row: Row) -> TrainingSettings:
        """Return the paper's set-up of a row, under seed 0.

        Raises:
            UsageError: If a key is unknown or a value cannot be, with file, line and nearest name.
        """
        number = self.recipe.rows.index(row)
        layers: list[tuple[Document, Place, dict[str, Any]]] = [
            (self.defaults, ("run",), self.paper.run),
            (self.file, ("run",), self.recipe.run),
            (self.file, ("rows", number, "run"), row.run),
        ]
        values: dict[str, Any] = {"task": self.recipe.task}
        for _, _, more in layers:
            values = merged(values, more)
        if row.start:
            # Until it is known which run that is.
            values = merged(values, {"model": {"start": f"{row.start.recipe}: {row.start.row}"}})

        def where(place: Place) -> str:
            # The last that says something there; without one, the row.
            for length in range(len(place), 0, -1):
                for document, before, _ in reversed(layers):
                    if document.has((*before, *place[:length])):
                        return document.where((*before, *place[:length]))
            return f"{self.file.where(('rows', number))}: row {row.label!r}"

        return checked_values(TrainingSettings, values, where)


def merged(values: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """Return nested values with others over them.

    A mapping of another ``kind`` (a schedule's) takes the place of the one before as a whole.
    """
    found = dict(values)
    for key, value in more.items():
        before = found.get(key)
        found[key] = value
        if isinstance(before, dict) and isinstance(value, dict):
            kind = before.get("kind")
            found[key] = merged(before, value) if value.get("kind", kind) == kind else value
    return found


def recipe_ids(root: Path = RECIPES) -> list[str]:
    """Return the ids of all recipes there are."""
    files = sorted(root.glob("*/*.yaml"))
    return [f"{file.parent.name}/{file.stem}" for file in files if file.name != DEFAULTS]


def find_experiment(name: str, root: Path = RECIPES) -> Experiment:
    """Return a recipe by its id, or by the path of a file of one's own.

    Raises:
        UsageError: If there is none, or it says what it may not say.
    """
    if name.endswith((".yaml", ".yml")):
        path = Path(name).expanduser()
        if not path.is_file():
            raise UsageError(f"there is no recipe file {name}.")
        return read_experiment(path)
    known = recipe_ids(root)
    if name.lower() not in known:
        raise UsageError(f"there is no recipe {name!r}. {nearest(name.lower(), known, 'Recipes')}")
    return read_experiment(root / f"{name.lower()}.yaml")


def read_experiment(path: Path) -> Experiment:
    """Read a recipe file and the ``defaults.yaml`` beside it, and check every row.

    Raises:
        UsageError: If a key or a value is unknown, with file, line and nearest name.
        LabError: If a file cannot be opened.
    """
    file, defaults = read_document(path), read_document(path.with_name(DEFAULTS))
    recipe = checked_values(ReproduceRecipe, file.values, file.where)
    paper = checked_values(PaperDefaults, defaults.values, defaults.where)
    expected = f"{paper.paper}/{path.stem}"
    if recipe.id != expected:
        raise UsageError(
            f"{file.where(('id',))}: id: {recipe.id!r} is not that of this file of this paper,"
            f" {expected!r}."
        )
    digest = hashlib.sha256(defaults.content + b"\0" + file.content).hexdigest()
    experiment = Experiment(recipe, paper, digest, file, defaults)
    for row in recipe.rows:
        if not row.not_run:
            experiment.settings(row)
    return experiment
