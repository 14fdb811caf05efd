"""A line of ``results.jsonl``: one finished run of one row of one recipe.

The file is that of `filterwise.lab.results`: whole at every moment, safe to use from several
commands. A line is JSON that pandas and DuckDB open directly.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from filterwise.lab.results import Lines
from filterwise.lab.settings import Frozen
from filterwise.lab.training.record import TrainingRecord

__all__ = ["Budget", "LineFacts", "ReproduceRecord", "ReproduceResults", "read"]

Budget = Literal["smoke", "short", "full"]
"""``full`` is the paper's set-up; the others are the same shrunk by one rule."""


class LineFacts(Frozen):
    """What a line says of a run besides what the run itself came to.

    Attributes:
        recipe: The recipe's id, such as ``wa/table1``.
        recipe_sha256: Digest of its file and of its paper's defaults, in 64 hexadecimal digits.
        row: Label of the row.
        budget: How much of the paper's set-up was run.
        shrunk: What is smaller than in the paper: the name of a setting (``optimization.epochs``),
            and under it the paper's value and this run's. Empty at ``full``, and nowhere else.
    """

    recipe: str
    recipe_sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    row: str
    budget: Budget
    shrunk: dict[str, tuple[Any, Any]]


class ReproduceRecord(LineFacts):
    """A line.

    Attributes:
        run: The finished run. Its seed is ``run.settings.seed``, and ``run.status`` tells a
            diverged one.
    """

    run: TrainingRecord


class ReproduceResults(Lines[ReproduceRecord]):
    """The lines of a folder: one for each run of each row."""

    kind = ReproduceRecord
    option = "--folder"

    @staticmethod
    def key(record: ReproduceRecord) -> str:
        """Return recipe, row and the run's identity: two rows may be one and the same run."""
        return line_key(record, record.run.id)


def line_key(facts: LineFacts, identity: str) -> str:
    """Return what a line is known by: recipe, row and the run's identity."""
    return "\n".join((facts.recipe, facts.row, identity))


def read(folder: Path | str) -> list[ReproduceRecord]:
    """Return the lines of a folder in their order; those of other programs are passed over.

    Raises:
        LabError: If the file is there but cannot be opened.
    """
    return list(ReproduceResults(Path(folder)).read().records.values())
