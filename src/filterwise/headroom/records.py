"""What a head-room report holds, and how it prints."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from filterwise.report import Records, notes_text, text_table

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["END", "HeadRoom", "HeadRoomReport"]

END = torch.finfo(torch.float16).max


@dataclass(frozen=True)
class HeadRoom:
    """What one weight layer leaves of float16.

    Attributes:
        layer: Dotted name.
        kind: Name of its class, before it was converted.
        method: Canonical text of its method; None for a plain layer.
        fan_in: Weights in one filter.
        length: Norm of its longest effective filter, in units of a He filter's, sqrt 2; None where
            that is not known (meta device, EquiNorm).
        largest: Largest magnitude of its output on the input; None without an input.
        norm: Name of the norm that alone takes its output; None where there is no such norm.
        advice: What `rescale_` does to it, or why it does not.
    """

    layer: str
    kind: str
    method: str | None
    fan_in: int
    length: float | None
    largest: float | None
    norm: str | None
    advice: str

    @property
    def room(self) -> float | None:
        """How many times as large the output could be before float16 ends, at 65504."""
        if self.largest is None:
            return None
        return END / self.largest if self.largest else math.inf


@dataclass(frozen=True)
class HeadRoomReport(Records[HeadRoom]):
    """What each weight layer leaves of float16; prints as a table.

    Attributes:
        rows: One per weight layer, in registration order.
        notes: Sentences on the whole model.
    """

    rows: Sequence[HeadRoom]
    notes: Sequence[str] = ()

    def __str__(self) -> str:
        """Return the table, the layer that leaves least, and the notes."""
        right = ["fan-in", "times He", "largest output", "room"]
        cells = [
            (
                row.layer,
                row.method or row.kind,
                row.fan_in,
                _figure(row.length),
                _figure(row.largest),
                _figure(row.room),
                row.norm or "",
                row.advice,
            )
            for row in self.rows
        ]
        headers = ["layer", "what", *right, "norm", "rescale_"]
        keep = [
            place
            for place, header in enumerate(headers)
            if header not in ("largest output", "room")
            or any(row.largest is not None for row in self.rows)
        ]
        table = [[cell[place] for place in keep] for cell in cells]
        names = [headers[place] for place in keep]
        blocks = [text_table(names, table, right=right)] if cells else []
        blocks.append(self.summary)
        if self.notes:
            blocks.append(notes_text(self.notes))
        return "\n\n".join(blocks)

    @property
    def summary(self) -> str:
        """One sentence on the layer that leaves least."""
        seen = [row for row in self.rows if row.room is not None]
        if seen:
            least = min(seen, key=lambda row: row.room or 0.0)
            return (
                f"least room: {least.layer}, whose output reaches {_figure(least.largest)}; float16"
                f" ends at {END:g}, {_figure(least.room)} times that"
            )
        long = [row for row in self.rows if row.length is not None]
        if not long:
            return "no layer whose filters are known"
        longest = max(long, key=lambda row: row.length or 0.0)
        return (
            f"longest filters: {longest.layer}, {_figure(longest.length)} times a He layer's: as"
            " many times nearer to float16's end; give input= to see how much is left"
        )


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"
