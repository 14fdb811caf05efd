"""The page: per family what passed, what was refused and why, and what failed."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from filterwise.lab.compatibility.examine import RECIPES

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from filterwise.lab.compatibility.architectures import Architecture

__all__ = ["Scope", "page"]

KINDS = ("classification", "detection", "segmentation", "video", "optical flow", "quantizable")
WORDS = {
    "passed": "passed",
    "refused": "refused",
    "diverges": "diverges",
    "failed": "failed",
    "unfit": "plain model does not run",
}
HEAD = """# Compatibility

Which models of timm and torchvision `filterwise.convert_` converts, and what it does with the
rest. This page is written by a command; do not edit it.

    {command}

{versions}. Written on {date}.

Each architecture is built with random weights and run on two inputs of the smallest size it takes.
A pair of architecture and recipe *passed* when all of this held:

1. `convert_` converts it.
2. In training mode the output is finite, one backward pass gives finite gradients, and after one
   step of Adam every parameter is finite.
3. In evaluation mode the output is finite, and equal to 1e-4 of the largest when no activation
   works in place: none writes over what a shortcut reads.
4. `fold` gives a model in which every layer has the class it had before, and whose outputs are
   equal to 1e-4 of the largest (float32; where it is more, to 1e-9 on float64 copies). One recipe
   of each architecture is folded in float64 too and must be equal to 1e-9.
5. A deepcopy computes the same to the bit.
6. The state loads with `strict=True` into a model that was converted anew, which then computes the
   same to the bit; the plain model's state loads into the converted one, and the converted one's
   into the plain one, raw weights as they are, with no key missing or left over but those of norms
   that were replaced and of parameters that the conversion added.

*Refused* means that `convert_` raised a `ConversionError` and left the model as it was; the reasons
stand below the tables.

*Diverges* means that the network, converted, computes numbers beyond float32's range, that a
float64 copy computes numbers as large (beyond 1e18, whose squares float32 cannot hold), and that
`check(model, input=...)` says so as an error or a warning, its first words standing below. Nothing
is wrong with the arithmetic then: with random weights and the norms taken away, or with inputs that
the method is not made for, nothing holds the activations any more. Gates and squared activations,
which multiply them with each other, are one such case; EquiNorm behind linear depthwise
convolutions, whose outputs have no positive mean, is the other. *Failed* is anything else.
"""


@dataclass(frozen=True)
class Scope:
    """What a page is about.

    Attributes:
        command: How it was made.
        wanted: Architectures that the command examines.
        every: All that there are.
        too_large: How many of all are above the limit on parameters.
        limit: That limit.
        about: Versions of the libraries.
    """

    command: str
    wanted: Sequence[Architecture]
    every: Sequence[Architecture]
    too_large: int
    limit: int
    about: Mapping[str, str]


class _Reasons:
    """Numbers for reasons; those that differ in names and figures alone have one."""

    def __init__(self) -> None:
        self.first: dict[str, tuple[str, str]] = {}
        self.counts: Counter[str] = Counter()

    def number(self, pair: tuple[str, str], line: Mapping[str, Any]) -> int:
        text = (
            f"{line['step']}: {line['reason']}" if line["outcome"] != "refused" else line["reason"]
        )
        key = _likeness(text)
        self.first.setdefault(key, (f"{pair[0]}, {pair[1]}", text))
        self.counts[key] += 1
        return list(self.first).index(key) + 1

    def lines(self) -> Iterable[str]:
        for number, (key, (where, text)) in enumerate(self.first.items(), 1):
            count = self.counts[key]
            pairs = "1 pair" if count == 1 else f"{count} pairs"
            yield f"{number}. {pairs}; {where}: {_escaped(text)}"


def _likeness(text: str) -> str:
    text = re.sub(r'"[^"]*"', '""', text)
    text = re.sub(r"^\S+ \(", "(", text)
    text = re.sub(r"\b[\w]+(\.[\w]+)+\b", "", text)
    return re.sub(r"[0-9][0-9.e+-]*", "0", text)


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


def page(scope: Scope, pairs: Mapping[tuple[str, str], Mapping[str, Any]]) -> str:
    """Write the page.

    Args:
        scope: What it is about.
        pairs: What was found, by architecture and recipe.
    """
    families = {str(one): one for one in scope.every}
    kept = {pair: line for pair, line in pairs.items() if pair[0] in families}
    versions = ", ".join(f"{name} {number}" for name, number in scope.about.items())
    date = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    lines = [HEAD.format(command=scope.command, versions=versions, date=date)]
    lines += ["## How far", "", *_how_far(scope, kept), ""]
    lines += _not_examined(scope, kept)
    reasons = _Reasons()
    for kind in KINDS:
        table = list(_table([one for one in scope.every if one.kind == kind], kept, reasons))
        if table:
            lines += [f"## {kind.capitalize()}", "", *table, ""]
    if reasons.first:
        lines += ["## Reasons", "", *reasons.lines(), ""]
    return "\n".join(lines)


def _how_far(scope: Scope, pairs: Mapping[tuple[str, str], Mapping[str, Any]]) -> Iterable[str]:
    names = {name for name, _ in pairs}
    whole = {name for name in names if all((name, recipe) in pairs for recipe in RECIPES)}
    small = len(scope.every) - scope.too_large
    yield (
        f"timm and torchvision have {len(scope.every)} architectures in {_families(scope.every)}"
        f" families, {small} of them below {scope.limit / 1e6:.0f} M parameters. Examined were"
        f" {len(names)} architectures of {_families(scope.every, names)} families, {len(whole)} of"
        " them with every recipe."
    )
    if left := len({str(one) for one in scope.wanted} - whole):
        yield (
            f"The command wants {len(scope.wanted)} architectures, with every recipe; it had not"
            f" come to the end of {left} of them, and carries on with those when it is given again."
        )
    codes = {line.get("code", "") for line in pairs.values()}
    if len(codes) > 1:
        yield (
            f"{len(codes)} states of the library's code were examined one after the other: after a"
            " repair, what had failed was examined again and what had passed was not."
        )
    yield ""
    yield f"| recipe | {' | '.join(WORDS.values())} |"
    yield "|---|--:|--:|--:|--:|--:|"
    for recipe in RECIPES:
        mine = [line for (_, other), line in pairs.items() if other == recipe]
        counts = Counter(line["outcome"] for line in mine)
        numbers = [counts[word] for word in WORDS]
        yield f"| `{recipe}` | {' | '.join(map(str, numbers))} |"
    differences = [line["difference"] for line in pairs.values() if "difference" in line]
    wide = [line["difference64"] for line in pairs.values() if "difference64" in line]
    if differences:
        yield ""
        yield (
            f"Largest relative difference of a folded model: {max(differences):.2g} in float32"
            f" ({len(differences)} pairs)"
            + (f", {max(wide):.2g} in float64 ({len(wide)} pairs)." if wide else ".")
        )
    blind = sum(line.get("depends") == 0 for line in pairs.values())
    if blind:
        yield (
            f"In {blind} pair{'s' * (blind > 1)} raw weights gave the same outputs as effective"
            " ones (detectors that found nothing, say): there the comparison of the folded model"
            " shows nothing."
        )


def _not_examined(
    scope: Scope, pairs: Mapping[tuple[str, str], Mapping[str, Any]]
) -> Iterable[str]:
    """Yield the families of which no architecture was examined, by library."""
    seen = {name for name, _ in pairs}
    known = {(one.library, one.family) for one in scope.every if str(one) in seen}
    left = {(one.library, one.family) for one in scope.every} - known
    if not left:
        return
    yield "## Not examined"
    yield ""
    yield (
        f"No architecture of {len(left)} families was examined, some of which have none below"
        f" {scope.limit / 1e6:.0f} M parameters."
    )
    for library in sorted({library for library, _ in left}):
        families = sorted(family for home, family in left if home == library)
        yield ""
        yield f"- {library}: {', '.join(families)}."
    yield ""


def _families(architectures: Iterable[Architecture], names: Iterable[str] | None = None) -> int:
    chosen = None if names is None else set(names)
    found = {
        (one.library, one.family) for one in architectures if chosen is None or str(one) in chosen
    }
    return len(found)


def _table(
    architectures: Sequence[Architecture],
    pairs: Mapping[tuple[str, str], Mapping[str, Any]],
    reasons: _Reasons,
) -> Iterable[str]:
    families: dict[tuple[str, str], list[str]] = {}
    for one in architectures:
        if any((str(one), recipe) in pairs for recipe in RECIPES):
            families.setdefault((one.library, one.family), []).append(str(one))
    if not families:
        return
    yield f"| library | family | examined | {' | '.join(f'`{recipe}`' for recipe in RECIPES)} |"
    yield "|---|---|---|" + "---|" * len(RECIPES)
    for (library, family), names in families.items():
        short = [name.partition("/")[2] for name in names]
        shown = short[0] if len(short) == 1 else f"{len(short)} architectures"
        cells = [_cell(names, recipe, pairs, reasons) for recipe in RECIPES]
        yield f"| {library} | {family} | {shown} | {' | '.join(cells)} |"


def _cell(
    names: Sequence[str],
    recipe: str,
    pairs: Mapping[tuple[str, str], Mapping[str, Any]],
    reasons: _Reasons,
) -> str:
    found = {name: pairs[name, recipe] for name in names if (name, recipe) in pairs}
    parts = []
    for outcome, word in WORDS.items():
        mine = [(name, line) for name, line in found.items() if line["outcome"] == outcome]
        if not mine:
            continue
        count = f"{len(mine)} " if len(names) > 1 else ""
        numbers = ""
        if outcome != "passed":
            known = sorted({reasons.number((name, recipe), line) for name, line in mine})
            numbers = f" ({', '.join(map(str, known))})"
        parts.append(f"{count}{word}{numbers}")
    return ", ".join(parts) or "-"
