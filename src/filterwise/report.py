"""What was done to a model, as records and as a plain-text table."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar, overload

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

__all__ = ["Action", "FoldReport", "FoldRow", "Report", "Row", "notes_text", "text_table"]

_RowT = TypeVar("_RowT", bound=Any)

Action = Literal["convert", "keep", "replace", "remove", "add", "refuse"]
"""What happens to a layer, a norm or a parameter."""


@dataclass(frozen=True)
class Row:
    """What happens to one weight layer, activation norm or added parameter.

    Attributes:
        name: Dotted name in the model.
        kind: Name of the class before the call.
        action: ``convert``: a weight layer gets a method. ``keep``: left alone. ``replace``: a norm
            by a norm. ``remove``: a norm by an identity, or a layer's method. ``add``: a parameter
            that was not there. ``refuse``: what `convert_` would raise on (`plan` only).
        method: Canonical text of the method, or None.
        reason: Why, in words.
        fan_in: Weights in one filter; None for a norm and for an added parameter.
        filters: Number of filters; None for a norm and for an added parameter.
        difference: With ``preserve=True`` how far the row's output is from what it was, relative to
            its largest entry (`convert_`); None where that was not measured.
    """

    name: str
    kind: str
    action: Action
    method: str | None = None
    reason: str = ""
    fan_in: int | None = None
    filters: int | None = None
    difference: float | None = None


class Records(Sequence[_RowT]):
    """Rows in registration order, and sentences on the whole model."""

    rows: Sequence[_RowT]
    notes: Sequence[str]

    def __post_init__(self) -> None:
        """Keep rows and notes as tuples."""
        object.__setattr__(self, "rows", tuple(self.rows))
        object.__setattr__(self, "notes", tuple(self.notes))

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> _RowT: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[_RowT]: ...

    def __getitem__(self, index: int | slice) -> _RowT | Sequence[_RowT]:
        """Return a row by its place, or rows by a slice."""
        return self.rows[index]

    def __iter__(self) -> Iterator[_RowT]:
        """Go through the rows."""
        return iter(self.rows)

    def to_dicts(self) -> list[dict[str, Any]]:
        """Return the rows as plain dictionaries."""
        return [dataclasses.asdict(row) for row in self.rows]


@dataclass(frozen=True)
class Report(Records[Row]):
    """Rows in registration order, and sentences on the whole; prints as a table.

    Attributes:
        rows: One per weight layer, activation norm and added parameter.
        notes: Sentences on the whole model.
        recipe: Canonical text of the recipe; empty where none was given.
        verb: What the summary says of the rows ``convert``: "converted", or "set" by
            `initialize_`, which reports values in the same rows.

    Example:
        >>> print(Report([Row("conv1", "Conv2d", "convert", "ws", fan_in=147, filters=64)]))
        layer  kind    what        why  fan-in
        conv1  Conv2d  convert ws          147
        <BLANKLINE>
        1 converted
    """

    rows: Sequence[Row]
    notes: Sequence[str] = ()
    recipe: str = ""
    verb: str = "converted"

    @property
    def converted(self) -> list[str]:
        """Names of the layers that got a method."""
        return [row.name for row in self.rows if row.action == "convert"]

    @property
    def summary(self) -> str:
        """One line that counts the rows by what was done."""
        counts: dict[tuple[str, str], int] = {}
        for row in self.rows:
            words = _words(row)
            counts[words] = counts.get(words, 0) + 1
        parts = [
            f"{counts[words]} {self._said(words, counts[words])}"
            for words in _ORDER
            if words in counts
        ]
        return ", ".join(parts) if parts else "no layer and no norm to report"

    def _said(self, words: tuple[str, str], count: int) -> str:
        return self.verb if words == _CONVERTED else words[0] if count == 1 else words[1]

    def __str__(self) -> str:
        """Return the table, a line that counts, and the notes; nothing is shortened."""
        cells = [
            (
                row.name,
                row.kind,
                f"{row.action} {row.method}" if row.method else row.action,
                row.reason,
                "" if row.fan_in is None else str(row.fan_in),
                _figure(row.difference),
            )
            for row in self.rows
        ]
        blocks = []
        if cells:
            headers = ["layer", "kind", "what", "why", "fan-in", "difference"]
            if all(row.difference is None for row in self.rows):
                headers, cells = headers[:-1], [cell[:-1] for cell in cells]
            blocks.append(text_table(headers, cells, right={"fan-in", "difference"}))
        recipe = f" ({self.recipe})" if self.recipe else ""
        blocks.append(self.summary + recipe)
        if self.notes:
            blocks.append(notes_text(self.notes))
        return "\n\n".join(blocks)


_CONVERTED = ("converted", "converted")
_KEPT = ("kept", "kept")
_NORM_KEPT = ("norm kept", "norms kept")
_NORM_REPLACED = ("norm replaced", "norms replaced")
_NORM_REMOVED = ("norm removed", "norms removed")
_METHOD_REMOVED = ("method removed", "methods removed")
_ADDED = ("parameter added", "parameters added")
_REFUSED = ("refused", "refused")
_ORDER = (
    _CONVERTED,
    _KEPT,
    _NORM_KEPT,
    _NORM_REPLACED,
    _NORM_REMOVED,
    _METHOD_REMOVED,
    _ADDED,
    _REFUSED,
)


def _words(row: Row) -> tuple[str, str]:
    """Return what the summary calls a row, for one and for several; a norm has no fan-in."""
    if row.action == "convert":
        return _CONVERTED
    if row.action == "keep":
        return _NORM_KEPT if row.fan_in is None else _KEPT
    if row.action == "replace":
        return _NORM_REPLACED
    if row.action == "remove":
        return _NORM_REMOVED if row.fan_in is None else _METHOD_REMOVED
    return _ADDED if row.action == "add" else _REFUSED


@dataclass(frozen=True)
class FoldRow:
    """What became of one converted layer or activation norm.

    Attributes:
        layer: Dotted name.
        kind: Name of the class in the folded model; for a norm, in the original.
        action: ``fold``: a converted layer got its effective weight. ``merge``: a BatchNorm went
            into the layer before it. ``keep``: a norm stays.
        difference: Largest difference of the layer's output on a seeded input, relative to its
            largest entry; None where the layer was not compared alone.
        reason: Why, in words.
    """

    layer: str
    kind: str
    action: Literal["fold", "merge", "keep"]
    difference: float | None
    reason: str = ""


@dataclass(frozen=True)
class FoldReport(Records[FoldRow]):
    """What was folded and how far the result is from the original; prints as a table.

    Attributes:
        rows: One per converted layer and activation norm, in registration order.
        end_to_end: Largest relative difference of the whole model on the example input; None
            without one.
        notes: Sentences on the whole model.
    """

    rows: Sequence[FoldRow]
    end_to_end: float | None = None
    notes: Sequence[str] = ()

    @property
    def largest(self) -> float | None:
        """The largest difference, of the whole model too; None if none was measured."""
        figures = [row.difference for row in self.rows] + [self.end_to_end]
        return max((figure for figure in figures if figure is not None), default=None)

    def __str__(self) -> str:
        """Return the table, the largest difference, and the notes."""
        headers = ("layer", "kind", "what", "difference", "why")
        cells = [
            (row.layer, row.kind, row.action, _figure(row.difference), row.reason)
            for row in self.rows
        ]
        actions = [row.action for row in self.rows]
        closing = (
            f"{actions.count('fold')} folded, {actions.count('merge')} norms merged,"
            f" {actions.count('keep')} norms kept;"
            f" largest relative difference {_figure(self.largest) or 'not measured'}"
        )
        if self.end_to_end is not None:
            closing += f" (whole model {_figure(self.end_to_end)})"
        blocks = [text_table(headers, cells, right={"difference"})] if cells else []
        blocks.append(closing)
        if self.notes:
            blocks.append(notes_text(self.notes))
        return "\n\n".join(blocks)


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.2g}"


def text_table(
    headers: Sequence[str],
    rows: Sequence[Sequence[object]],
    *,
    right: Collection[str] = (),
) -> str:
    """Lay out a plain-text table; columns are as wide as their widest cell.

    Args:
        headers: Column names; a column without any cell text is left as narrow as its name.
        rows: Cells, as many in each row as there are headers; line breaks become spaces.
        right: Names of the columns that are aligned to the right.

    Returns:
        Lines joined by newlines, without spaces at their ends.

    Raises:
        ValueError: If a row has another number of cells than there are headers.
    """
    lines = [tuple(headers)]
    for row in rows:
        if len(row) != len(headers):
            raise ValueError(f"a row has {len(row)} cells, the table {len(headers)} columns")
        lines.append(tuple(" ".join(str(cell).split("\n")) for cell in row))
    widths = [max(len(line[column]) for line in lines) for column in range(len(headers))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if header in right else cell.ljust(width)
            for cell, width, header in zip(line, widths, headers, strict=True)
        ).rstrip()
        for line in lines
    )


def notes_text(notes: Sequence[str]) -> str:
    """Lay out sentences one a line, each behind the word "note"."""
    return "\n".join(f"note: {' '.join(note.split())}" for note in notes)
