"""The plain reading of a comparison: sentences made from its numbers, for and against."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

from filterwise.lab.summary import Cell
from filterwise.recipe import Recipe

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from filterwise.lab.settings import Panel
    from filterwise.lab.summary import Difference, Row, Summary, Table

__all__ = ["Sentence", "percent", "read"]

# A step within this factor of the plain network's is not worth a sentence.
SAME_TIME = 1.05


class Sentence(NamedTuple):
    """A sentence and what it speaks for.

    Attributes:
        side: ``for`` or ``against`` normalizing weights, or neither.
        text: The sentence.
    """

    side: Literal["for", "against", "note"]
    text: str


def read(summary: Summary) -> list[Sentence]:
    """Return what the numbers say, what speaks against the weight methods included."""
    sentences: list[Sentence] = []
    for table in summary.tables:
        sentences += _best(summary, table)
        sentences += _against_bn(summary, table)
        sentences += _failures(summary, table)
    sentences += _against_own_norm(summary)
    sentences += _micro_batches(summary)
    sentences += _learning_rates(summary)
    sentences += _step_times(summary)
    sentences += _limits(summary)
    return sentences


def percent(error: float | None) -> str:
    """Write an error of 0 to 1 as percent with one decimal."""
    return "-" if error is None else f"{100 * error:.1f}"


def _called(recipe: str) -> str:
    """Return a recipe as it stands in a sentence, where a bare none would read as nobody."""
    return '"none"' if recipe == "none" else recipe


def _has_method(recipe: str) -> bool:
    return Recipe.parse(recipe).method is not None


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _interval(difference: Difference) -> str:
    points = abs(difference.points)
    ends = sorted((abs(difference.low), abs(difference.high)))
    return f"{points:.1f} points, 95 % interval {ends[0]:.1f} to {ends[1]:.1f}"


def _best(summary: Summary, table: Table) -> Iterator[Sentence]:
    ranked = table.trained()
    if len(ranked) < 2:
        return
    best = ranked[0]
    same = []
    for row in ranked[1:]:
        difference = _between(summary, table, row, best)
        if difference and not difference.seen:
            same.append(f"{_called(row.recipe)} ({percent(row.median)} %)")
    tied = f"; no difference seen to {_listed(same)}" if same else "; all others are above it"
    yield Sentence(
        "note",
        f"Table {table.number}: the lowest error is {percent(best.median)} % with"
        f" {_called(best.recipe)}{tied}.",
    )


def _against_bn(summary: Summary, table: Table) -> Iterator[Sentence]:
    ranked = table.trained()
    bn = next((row for row in ranked if row.recipe == "bn"), None)
    best = next((row for row in ranked if _has_method(row.recipe)), None)
    if bn is None or best is None:
        return
    difference = _between(summary, table, bn, best)
    if difference is None:
        return
    pair = f"bn {percent(bn.median)} %, {best.recipe} {percent(best.median)} %"
    where = f"Table {table.number}"
    if not difference.seen:
        text = f"batch normalization ties the best weight method ({pair}): nothing is gained here."
        yield Sentence("against", f"{where}: {text}")
    elif difference.points < 0:
        text = f"batch normalization beats every weight method ({pair}; {_interval(difference)})."
        yield Sentence("against", f"{where}: {text}")
    else:
        text = f"{best.recipe} beats batch normalization ({pair}; {_interval(difference)})."
        yield Sentence("for", f"{where}: {text}")


def _against_own_norm(summary: Summary) -> Iterator[Sentence]:
    """Compare every weight method with the same norm without it, over all tables."""
    ties: dict[tuple[str, str], list[str]] = {}
    for table in summary.tables:
        rows = {row.recipe: row for row in table.trained()}
        for recipe, row in rows.items():
            parsed = Recipe.parse(recipe)
            if parsed.method is None or parsed.norm not in rows:
                continue
            without = rows[parsed.norm]
            difference = _between(summary, table, without, row)
            if difference is None:
                continue
            alone = "no normalization" if parsed.norm == "none" else f"{parsed.norm} alone"
            pair = f"{percent(row.median)} against {percent(without.median)} %"
            if not difference.seen:
                ties.setdefault((recipe, alone), []).append(f"table {table.number}: {pair}")
                continue
            better = difference.points > 0
            yield Sentence(
                "for" if better else "against",
                f"Table {table.number}: {recipe} is {'better' if better else 'worse'} than {alone}"
                f" ({pair}; {_interval(difference)}).",
            )
    for (recipe, alone), places in ties.items():
        text = f"No difference seen between {recipe} and {alone} ({'; '.join(places)})."
        yield Sentence("against", text)


def _failures(summary: Summary, table: Table) -> Iterator[Sentence]:
    where = f"Table {table.number}"
    for row in table.rows:
        side: Literal["against", "note"] = "against" if _has_method(row.recipe) else "note"
        if row.failed:
            yield Sentence(side, f"{where}: {_called(row.recipe)} cannot be trained: {row.failed}.")
        elif row.diverged:
            runs = "run" if row.seeds == 1 else "runs"
            text = f"{_called(row.recipe)} diverged in {row.diverged} of {row.seeds} {runs}."
            yield Sentence(side, f"{where}: {text}")
        elif row.median is not None and _learned_nothing(summary, row.median):
            text = f"{_called(row.recipe)} learned nothing ({percent(row.median)} %; guessing the"
            chance = f"commonest class is wrong on {percent(summary.chance)} %)"
            yield Sentence(side, f"{where}: {text} {chance}.")


def _learned_nothing(summary: Summary, error: float) -> bool:
    return 100 * error >= 100 * summary.chance - summary.noise(summary.chance)


def _micro_batches(summary: Summary) -> Iterator[Sentence]:
    """Compare the smallest with the largest micro-batch of each network and learning rate."""
    for tables in _groups(summary, lambda panel: (panel.net, panel.learning_rate)):
        ordered = sorted(tables, key=lambda table: table.panel.micro_batch)
        small, large = ordered[0].panel, ordered[-1].panel
        if small.micro_batch == large.micro_batch:
            continue
        where = f"{small.net.capitalize()} net, learning rate {small.learning_rate:g}"
        steps = f"from micro-batch {large.micro_batch} to {small.micro_batch}"
        yield from _moves(summary, small, large, f"{where}, {steps}", method_speaks=True)


def _learning_rates(summary: Summary) -> Iterator[Sentence]:
    """Compare the highest with the lowest learning rate of each network and micro-batch."""
    for tables in _groups(summary, lambda panel: (panel.net, panel.micro_batch)):
        ordered = sorted(tables, key=lambda table: table.panel.learning_rate)
        low, high = ordered[0].panel, ordered[-1].panel
        if low.learning_rate == high.learning_rate:
            continue
        where = f"{low.net.capitalize()} net, micro-batch {low.micro_batch}"
        steps = f"from learning rate {low.learning_rate:g} to {high.learning_rate:g}"
        yield from _moves(summary, high, low, f"{where}, {steps}", method_speaks=False)


def _moves(
    summary: Summary, after: Panel, before: Panel, where: str, *, method_speaks: bool
) -> Iterator[Sentence]:
    """Say which recipes' errors rise or fall between two panels, and which stay."""
    by_panel = {table.panel: table for table in summary.tables}
    stay: list[Row] = []
    for row in by_panel[after].rows:
        difference = summary.difference(Cell(after, row.recipe), Cell(before, row.recipe))
        if difference is None:
            continue
        if not difference.seen:
            stay.append(row)
            continue
        other = next(old for old in by_panel[before].rows if old.recipe == row.recipe)
        verb = "rises" if difference.points > 0 else "falls"
        side: Literal["against", "note"] = (
            "against" if difference.points > 0 and _has_method(row.recipe) else "note"
        )
        text = (
            f"{_called(row.recipe)} {verb} from {percent(other.median)} to {percent(row.median)} %"
        )
        yield Sentence(side, f"{where}: {text} ({_interval(difference)}).")
    if stay:
        named = [_called(row.recipe) for row in stay]
        speaks = method_speaks and any(
            _has_method(row.recipe)
            and row.median is not None
            and not row.diverged
            and not _learned_nothing(summary, row.median)
            for row in stay
        )
        yield Sentence(
            "for" if speaks else "note", f"{where}: no difference seen with {_listed(named)}."
        )


def _step_times(summary: Summary) -> Iterator[Sentence]:
    """Say what each weight method costs on every network and micro-batch."""
    costs: dict[str, dict[float, list[str]]] = {}
    for table in summary.tables:
        for row in table.rows:
            if row.step and _has_method(row.recipe) and row.step.ratio > SAME_TIME:
                tables = costs.setdefault(row.recipe, {}).setdefault(row.step.ratio, [])
                tables.append(str(table.number))
    for recipe, ratios in costs.items():
        times = [
            f"{ratio:.2f} (table{'s' if len(tables) > 1 else ''} {_listed(tables)})"
            for ratio, tables in ratios.items()
        ]
        yield Sentence(
            "against",
            f"An optimizer step with {recipe} takes longer than the plain network's, by a factor of"
            f" {_listed(times)}.",
        )


def _limits(summary: Summary) -> Iterator[Sentence]:
    medians = [row.median for table in summary.tables for row in table.trained()]
    if not medians:
        return
    best = min(median for median in medians if median is not None)
    seeds = summary.tables[0].rows[0].seeds
    yield Sentence(
        "note",
        f"Differences under {summary.noise(best):.1f} points mean nothing at {summary.pictures}"
        f" test pictures, and {seeds} {'seed is' if seeds == 1 else 'seeds are'} few; small"
        " networks on small pictures say little about large ones.",
    )


def _groups(summary: Summary, key: Callable[[Panel], object]) -> list[list[Table]]:
    groups: dict[object, list[Table]] = {}
    for table in summary.tables:
        groups.setdefault(key(table.panel), []).append(table)
    return [tables for tables in groups.values() if len(tables) > 1]


def _between(summary: Summary, table: Table, row: Row, other: Row) -> Difference | None:
    return summary.difference(Cell(table.panel, row.recipe), Cell(table.panel, other.recipe))
