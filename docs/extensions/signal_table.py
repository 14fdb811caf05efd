"""The table of all signals that a recorder knows."""

from __future__ import annotations

from tables import table

import filterwise as fw


def signals_table() -> str:
    """Return every signal with what there is one of, formula, cost and source."""
    return table(
        ("signal", "one a", "is", "costs", "source"),
        [
            (
                f"`{one.name}`" + ("" if one.default else " (by name only)"),
                one.per,
                one.formula.replace("*", "\\*").replace("_", "\\_"),
                one.cost,
                one.source,
            )
            for one in fw.diagnose.signals()
        ],
    )
