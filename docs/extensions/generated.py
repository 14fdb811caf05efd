"""Pages and tables that are made from the library itself, before Sphinx reads."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import formulas
import method_pages
import signal_table

if TYPE_CHECKING:
    from sphinx.application import Sphinx


def write_all(folder: Path) -> None:
    """Write what is generated below the folder of the documentation."""
    files = {
        f"generated/methods/{name}.md": text for name, text in method_pages.pages().items()
    } | {
        "generated/methods-table.md": method_pages.table(),
        "generated/standardization-table.md": formulas.standardization_table(),
        "generated/signals-table.md": signal_table.signals_table(),
        "generated/scaled-table.md": formulas.scaled_table(),
    }
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() or path.read_text() != text:  # an unchanged page is not read again
            path.write_text(text)


def _write(app: Sphinx) -> None:
    write_all(Path(app.srcdir))


def setup(app: Sphinx) -> dict[str, Any]:
    """Write before anything is read."""
    app.connect("builder-inited", _write)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
