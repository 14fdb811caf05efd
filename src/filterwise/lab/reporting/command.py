"""From a folder of runs to a page, and to Markdown with its figures."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filterwise.lab.errors import LabError, UsageError, reason
from filterwise.lab.look.pages import placed, render
from filterwise.lab.reporting.figures import draw
from filterwise.lab.reporting.found import Found, find
from filterwise.lab.reporting.markdown import markdown
from filterwise.lab.reporting.sections import Section, section
from filterwise.lab.reporting.tables import BUDGETS, tables
from filterwise.lab.reporting.words import count
from filterwise.lab.reproduce.experiments import find_experiment, recipe_ids
from filterwise.lab.results import write_whole
from filterwise.lab.writing import pairs_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from filterwise.lab.look.drawing import Figure
    from filterwise.lab.reproduce.experiments import Experiment
    from filterwise.lab.reproduce.records import ReproduceRecord
    from filterwise.lab.terminal import Terminal

__all__ = ["Report", "report"]

LEGEND = (
    "A number is the median over the seeds after the last epoch, with the quartiles beside it;"
    " best epoch is the median of each seed's best, chosen on the test set as some papers do.",
    "A run diverges when its loss is no longer finite. It ends there and counts with the value its"
    " network then has, where an answer that is not a finite number is wrong.",
    "A difference has the interval of a bootstrap over the seeds, at 95 per cent. Where it covers"
    " zero: no difference seen. The paper's number is one value whose spread is not known, so the"
    " interval says how much other seeds would have moved ours, not theirs. With fewer than six"
    " seeds it reaches at most from the least to the largest run, which is too narrow.",
    "Differences between rows are drawn over the seeds that both rows have, which gave both the"
    " same order of samples.",
    "full, short and smoke say how much of the paper's set-up was run; only at full do the paper's"
    " numbers stand beside ours.",
)


@dataclass(frozen=True)
class Report:
    """What was written.

    Attributes:
        sections: A recipe at a budget each.
        notes: What could not be read.
        page: The HTML file.
        markdown: The Markdown file, if it was asked for.
    """

    sections: tuple[Section, ...]
    notes: tuple[str, ...]
    page: Path
    markdown: Path | None

    def show(self, terminal: Terminal) -> None:
        """Write the tables, what the numbers say, and where the page is."""
        for each in self.sections:
            for grid in (*each.ours, *each.derived, *each.apart):
                right = {
                    header
                    for header, is_right in zip(grid.headers, grid.right, strict=True)
                    if is_right
                }
                terminal.table(grid.caption, grid.headers, grid.rows, right=right)
                terminal.print()
            terminal.fields([("-", sentence) for sentence in (*each.reading, *each.deviations)])
        for note in self.notes:
            terminal.warn(note)
        terminal.print(f"Page with figures: {self.page}")
        if self.markdown:
            terminal.print(f"Markdown: {self.markdown}")

    def to_dict(self) -> dict[str, Any]:
        """Return the tables as plain values."""
        return {
            "page": str(self.page),
            "markdown": str(self.markdown) if self.markdown else None,
            "notes": list(self.notes),
            "tables": [
                {
                    "recipe": each.table.id,
                    "budget": each.table.budget,
                    "comparable": each.table.comparable,
                    "reading": list(each.reading),
                    "rows": [_plain(line) for line in each.table.lines],
                }
                for each in self.sections
            ],
        }


def report(
    folder: Path,
    command: str,
    *,
    out: Path | None = None,
    markdown_file: Path | None = None,
    recipes: Sequence[str] = (),
) -> Report:
    """Make a report of the runs in a folder.

    Args:
        folder: Where ``results.jsonl`` lies, or folders that hold such files.
        command: As it was typed.
        out: The page; in the folder, named after the budgets in it, if it is not given.
        markdown_file: Where to write Markdown; its figures go beside it.
        recipes: Files of recipes of one's own.

    Raises:
        UsageError: If there is no run, or a file of a recipe cannot be read.
        LabError: If the disk refuses.
    """
    own = {each.recipe.id: each for each in map(find_experiment, recipes)}
    found = find(folder)
    made = tables(found.records, lambda id: own.get(id) or _known(id))
    sections = [section(table) for table in made]
    figures = [draw(table) for table in made]
    budgets = [budget for budget in BUDGETS if any(table.budget == budget for table in made)]
    page = out or folder / f"report-{'-'.join(budgets)}.html"
    facts = _facts(found, sections, command)
    text = render(
        Path(__file__).with_name("page.html"),
        {},
        sections=[(each, placed(drawn)) for each, drawn in zip(sections, figures, strict=True)],
        facts=facts,
    )
    _write(page, text.encode())
    if markdown_file:
        _write_markdown(markdown_file, sections, figures, facts)
    return Report(tuple(sections), found.notes, page, markdown_file)


def _known(id: str) -> Experiment | None:
    return find_experiment(id) if id in recipe_ids() else None


def _write(path: Path, content: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LabError(f"{path.parent} cannot be made: {reason(error)}.") from None
    if path.is_dir():
        raise UsageError(f"{path} is a folder: name a file.")
    write_whole(path, content)


def _write_markdown(
    path: Path,
    sections: Sequence[Section],
    figures: Sequence[Sequence[Figure]],
    facts: dict[str, Any],
) -> None:
    named = []
    for each, drawn in zip(sections, figures, strict=True):
        beside = [(figure, f"{path.stem}-{figure.name}.png") for figure in drawn]
        for figure, name in beside:
            _write(path.with_name(name), figure.png)
        named.append((each, beside))
    _write(path, markdown(named, facts).encode())


def _facts(found: Found, sections: Sequence[Section], command: str) -> dict[str, Any]:
    ids = list(dict.fromkeys(each.table.id for each in sections))
    budgets = list(dict.fromkeys(each.table.budget for each in sections))
    seconds = sum(record.run.times["seconds"] for record in found.records)
    commits = dict.fromkeys(str(record.run.facts.get("commit")) for record in found.records)
    precisions = dict.fromkeys(record.run.settings.precision for record in found.records)
    runs = [record.run for record in found.records]
    what = ids[0] if len(ids) == 1 else count(len(ids), "recipe")
    return {
        "title": f"{what}, {' and '.join(budgets)}",
        "sentence": f"{count(len(found.records), 'training run')} of {', '.join(ids)}, and what"
        " the papers print of them.",
        "legend": LEGEND,
        "notes": found.notes,
        "command": command,
        "folder": str(Path.cwd()),
        "finished": datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        "rows": [
            ("Runs", ", ".join(str(path) for path in found.files)),
            ("Data", ", ".join(_origins(found.records))),
            ("Training time", _hours(seconds)),
            ("Precision", ", ".join(precisions)),
            ("Versions", pairs_of(runs, "versions")),
            ("Commit", ", ".join(commits)),
            ("Hardware", pairs_of(runs, "hardware")),
        ],
    }


def _origins(records: Sequence[ReproduceRecord]) -> list[str]:
    return list(dict.fromkeys(str(record.run.facts.get("origin")) for record in records))


def _hours(seconds: float) -> str:
    text = f"{seconds:.0f} s" if seconds < 600 else f"{seconds / 3600:.1f} h"
    return f"{text} over all runs, whether beside each other or not"


def _plain(line: Any) -> dict[str, Any]:
    return {
        "row": line.name,
        "seeds": list(line.runs),
        "diverged": line.diverged,
        "failed": line.failed,
        "metrics": {
            name: {
                "value": found.value,
                "quartiles": list(found.spread) if found.spread else None,
                "best": found.best,
                "paper": found.paper.model_dump() if found.paper else None,
                "difference": _ends(found.difference),
            }
            for name, found in line.metrics.items()
        },
    }


def _ends(difference: Any) -> dict[str, Any] | None:
    if difference is None:
        return None
    return {
        "value": difference.value,
        "low": difference.low,
        "high": difference.high,
        "seen": difference.seen,
    }
