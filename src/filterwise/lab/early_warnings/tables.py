"""What the runs say: warnings before a collapse, how far ahead, and for nothing."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

from filterwise.lab.early_warnings.measure import Measured

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = ["COLLAPSED", "ends", "kinds_table", "page", "runs_table"]

COLLAPSED = ("diverged", "fell back", "never learned", "fails in evaluation")
ANY, ANY_LIVE, ANY_CHECK = "any warning", "any of the monitor's", "any of check's"
LIVE = {
    "turn": "turn of the filters",
    "shift": "shift of the average gradient",
    "collapse": "Var[W] under decay",
    "damped": "gamma or eps beside Var[W]",
    "steep": "gamma no longer bounds the step",
    "one-signed": "filters of one sign",
    "not finite": "NaN or infinity",
}


def _first(run: Measured, kind: str) -> int | None:
    """Return the step at which a kind was first heard, no later than the collapse."""
    end = run.collapse if run.collapse is not None else len(run.losses)
    steps = [one.step for one in run.heard if one.step <= end and _is(one.kind, kind)]
    return min(steps, default=None)


def _is(kind: str, asked: str) -> bool:
    checked = kind.startswith("check: ")
    if asked == ANY:
        return True
    if asked in (ANY_LIVE, ANY_CHECK):
        return checked == (asked == ANY_CHECK)
    return kind == asked


def _before(run: Measured, kind: str) -> bool:
    first = _first(run, kind)
    return first is not None and (run.collapse is None or first < run.collapse)


def kinds_table(found: Sequence[Measured]) -> tuple[list[str], list[list[str]]]:
    """Return headers and cells: for each kind of warning what it came before, and where not."""
    lost = [run for run in found if run.end in COLLAPSED]
    healthy = [run for run in found if run.end == "healthy"]
    between = [run for run in found if run.end == "between"]
    heard = {one.kind for run in found for one in run.heard}
    kinds = [kind for kind in LIVE if kind in heard]
    kinds += sorted(kind for kind in heard if kind.startswith("check: "))
    headers = [
        "warning",
        f"before a collapse (of {len(lost)})",
        "steps ahead: median (least to most)",
        f"healthy runs (of {len(healthy)})",
        f"between (of {len(between)})",
    ]
    rows = []
    for kind in [ANY, ANY_LIVE, ANY_CHECK, *kinds]:
        ahead = [
            run.collapse - first
            for run in lost
            if run.collapse is not None
            and _before(run, kind)
            and (first := _first(run, kind)) is not None
        ]
        rows.append(
            [
                LIVE.get(kind, kind),
                str(sum(_before(run, kind) for run in lost)),
                _spread(ahead),
                str(sum(_first(run, kind) is not None for run in healthy)),
                str(sum(_first(run, kind) is not None for run in between)),
            ]
        )
    return headers, rows


def _spread(values: Sequence[int]) -> str:
    if not values:
        return "-"
    return f"{statistics.median(values):g} ({min(values)} to {max(values)})"


def ends(found: Iterable[Measured]) -> dict[str, int]:
    """Count what the runs came to."""
    counts: dict[str, int] = {}
    for run in found:
        counts[run.end] = counts.get(run.end, 0) + 1
    return counts


def runs_table(found: Sequence[Measured]) -> tuple[list[str], list[list[str]]]:
    """Return headers and cells: a row for each run."""
    headers = ["run", "seed", "came to", "at step", "test error", "warnings (step)"]
    rows = []
    order = (*COLLAPSED, "between", "healthy")
    for run in sorted(found, key=lambda run: (order.index(run.end), run.settings.title)):
        words = ", ".join(dict.fromkeys(f"{one.kind} ({one.step})" for one in run.heard))
        step = "-" if run.collapse is None else str(run.collapse)
        rows.append(
            [
                run.settings.title,
                str(run.settings.seed),
                run.end,
                step,
                f"{100 * run.error:.1f} %",
                words or "-",
            ]
        )
    return headers, rows


def _markdown(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [headers, ["---"] * len(headers), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def page(groups: dict[str, list[Measured]], command: str, origin: str) -> str:
    """Return the results as Markdown."""
    titles = {
        "judge": "Runs that judge: other seeds, rates and decays, and a net of twelve layers",
        "choose": "Runs on which the thresholds were chosen",
    }
    parts = ["# Warnings before a collapse"]
    for group, title in titles.items():
        found = groups.get(group, [])
        if not found:
            continue
        counted = ", ".join(f"{count} {end}" for end, count in sorted(ends(found).items()))
        parts += [f"## {title}", f"{len(found)} runs: {counted}.", _markdown(*kinds_table(found))]
    every = [run for found in groups.values() for run in found]
    parts.append(
        "\n".join(
            [
                f"- Command: `{command}`",
                f"- Data: {origin}.",
                "- Training: SGD at a constant learning rate, decay 5e-4, momentum 0.9, 64 pictures"
                " a step, 8 epochs, where a row does not say otherwise. `fw.monitor` at its"
                " defaults, with the micro-batch and the first pictures as input.",
                "- A warning counts as *before a collapse* if it came at an earlier step, and in a"
                " run that never learned at any; *steps ahead* are of the collapses that have a"
                " step.",
                "- *Diverged*: the loss was not finite. *Fell back*: the mean of ten losses went"
                " back to 0.9 ln(classes) and over, for good. *Never learned*: it never was below."
                " *Fails in evaluation*: the loss fell, and half of the test pictures or more are"
                " wrong. *Healthy*: 15 % or less are. *Between*: the rest; a warning is neither"
                " right nor wrong there.",
            ]
        )
    )
    for group, title in titles.items():
        found = groups.get(group, [])
        if found:
            parts += [f"## Each run: {title[0].lower()}{title[1:]}", _markdown(*runs_table(found))]
    if every:
        used = every[-1]
        parts.append(
            f"Ran on: {used.hardware['processor']}, {used.hardware['threads']} thread(s); "
            + ", ".join(f"{name} {number}" for name, number in used.versions.items())
            + "."
        )
    return "\n\n".join(parts) + "\n"
