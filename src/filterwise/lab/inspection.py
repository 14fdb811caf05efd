"""What a recipe would do to a model, and what `filterwise.check` finds in the outcome."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import filterwise as fw
from filterwise.lab.models import find_model

if TYPE_CHECKING:
    from collections.abc import Sequence

    from filterwise.check import Finding
    from filterwise.lab.terminal import Terminal

__all__ = ["Inspection", "inspect"]


@dataclass(frozen=True)
class Inspection:
    """A model, the plan of a recipe for it, and findings.

    Attributes:
        model: Name as it was given.
        origin: Where the model was found.
        report: The plan.
        findings: Of the model as the recipe leaves it, or as it is where the plan refuses.
        converted: Whether the findings are those of the converted model.
    """

    model: str
    origin: str
    report: fw.Report
    findings: Sequence[Finding]
    converted: bool

    def to_dict(self) -> dict[str, Any]:
        """Return plain data: what ``--json`` prints."""
        return {
            "model": self.model,
            "origin": self.origin,
            "recipe": self.report.recipe,
            "rows": self.report.to_dicts(),
            "notes": list(self.report.notes),
            "findings_of": "converted model" if self.converted else "model as it is",
            "findings": [asdict(finding) for finding in self.findings],
        }

    def show(self, terminal: Terminal) -> None:
        """Write the plan and the findings as tables."""
        headers = ("layer", "kind", "what", "why", "fan-in")
        terminal.table(
            f"{self.model} ({self.origin}), recipe {self.report.recipe}",
            headers,
            [
                (
                    row.name,
                    row.kind,
                    f"{row.action} {row.method or ''}".strip(),
                    row.reason,
                    "" if row.fan_in is None else str(row.fan_in),
                )
                for row in self.report
            ],
            right={"fan-in"},
        )
        terminal.print()
        terminal.print(self.report.summary)
        for note in self.report.notes:
            terminal.print(f"note: {note}")
        terminal.print()
        state = "converted" if self.converted else "as it is"
        if not self.findings:
            terminal.print(f"Findings ({state}): none.")
            return
        terminal.print(f"Findings ({state}): {len(self.findings)}")
        for group in _alike(self.findings):
            first = group[0]
            at = ", ".join(finding.layer or "the model" for finding in group)
            terminal.print()
            terminal.fields(
                [
                    (first.level, first.what),
                    ("at", f"{at} ({len(group)} layers)" if len(group) > 1 else at),
                    ("why", _for_all([finding.why for finding in group], first.layer)),
                    ("do", _for_all([finding.fix for finding in group], first.layer)),
                ]
            )


def _alike(findings: Sequence[Finding]) -> list[list[Finding]]:
    """Group findings that say the same of several layers, but for their figures."""
    groups: dict[tuple[str, str, str], list[Finding]] = {}
    for finding in findings:
        fix = finding.fix.replace(finding.layer, "") if finding.layer else finding.fix
        groups.setdefault((finding.level, finding.what, fix), []).append(finding)
    return list(groups.values())


def _for_all(texts: Sequence[str], layer: str) -> str:
    """Return the one text that all have, or the first with the name of its layer."""
    return texts[0] if len(set(texts)) == 1 else f"{layer}: {texts[0]}"


def inspect(name: str, recipe: fw.Recipe) -> Inspection:
    """Plan a recipe for a model and check what would come out.

    Raises:
        UsageError: If there is no such model.
        LabError: If it cannot be built.
    """
    # What somebody's factory prints is no part of what this command prints.
    with redirect_stdout(sys.stderr):
        model, origin = find_model(name)
    report = fw.plan(model, recipe)
    refused = any(row.action == "refuse" for row in report)
    if not refused:
        fw.convert_(model, recipe)
    return Inspection(name, origin, report, fw.check(model), converted=not refused)
