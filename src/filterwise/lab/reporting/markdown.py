"""The report as Markdown, for documentation; its figures lie beside it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from filterwise.lab.look.drawing import Figure
    from filterwise.lab.reporting.sections import Grid, Section

__all__ = ["markdown"]


def markdown(
    sections: Sequence[tuple[Section, Sequence[tuple[Figure, str]]]], facts: dict[str, Any]
) -> str:
    """Return the text.

    Args:
        sections: What stands in it; each figure with the path of its file, as seen from the text.
        facts: As in `filterwise.lab.reporting.command`.
    """
    lines = [f"# {_text(facts['title'])}", "", _text(facts["sentence"]), ""]
    lines += ["Written by this command; do not edit it.", "", f"    {facts['command']}", ""]
    lines += [*(f"- {_text(sentence)}" for sentence in facts["legend"]), ""]
    for note in facts["notes"]:
        lines += [f"**Note.** {_text(note)}", ""]
    for section, figures in sections:
        lines += _section(section, figures)
    lines += ["## How it was made", ""]
    lines += [f"- {_text(name)}: {_text(value)}" for name, value in facts["rows"]]
    return "\n".join(lines).rstrip() + "\n"


def _section(section: Section, figures: Sequence[tuple[Figure, str]]) -> Iterator[str]:
    yield from (f"## {_text(section.title)}", "", f"**{_text(section.budget)}**", "")
    yield from (_text(section.lead), "")
    yield from _list(section.reading)
    for grid in section.ours + section.derived:
        yield from _grid(grid)
    if section.apart:
        yield from ("### The paper's numbers, apart", "")
        for grid in section.apart:
            yield from _grid(grid)
    for figure, path in figures:
        yield from (f"### {_text(figure.title)}", "", f"![{_text(figure.caption)}]({path})", "")
        yield from (_text(figure.caption), "")
    yield from ("### Deviations from the paper", "")
    if section.shrunk:
        yield from _grid(section.shrunk)
    elif section.table.comparable:
        yield from ("Nothing is smaller than in the paper.", "")
    yield from _list(section.deviations)
    if section.silent:
        yield from ("Where the paper is silent:", "")
        yield from _list([f"{what}: {choice}. Why: {why}." for what, choice, why in section.silent])
    if section.notes:
        yield from ("Doubts about the paper's numbers:", "")
        yield from _list(section.notes)


def _list(sentences: Sequence[str]) -> Iterator[str]:
    if sentences:
        yield from (f"- {_text(sentence)}" for sentence in sentences)
        yield ""


def _grid(grid: Grid) -> Iterator[str]:
    yield from (f"{_text(grid.caption)}:", "")
    yield _row(grid.headers)
    yield _row(["---:" if right else "---" for right in grid.right], escape=False)
    yield from (_row(row) for row in grid.rows)
    yield ""


def _row(cells: Sequence[str], *, escape: bool = True) -> str:
    return f"| {' | '.join(_text(cell) if escape else cell for cell in cells)} |"


def _text(text: str) -> str:
    """Return a text in which nothing means anything to Markdown."""
    text = " ".join(text.split())
    for mark in "\\`*_[]<>|#$":
        text = text.replace(mark, f"\\{mark}")
    return text
