"""How much of a paper's set-up is run: all of it, or less by one rule.

==========  ======================  ===================  ================  =======
budget      epochs                  pictures to train    planes            seeds
==========  ======================  ===================  ================  =======
``full``    the paper's             all                  all               paper's
``short``   a tenth, at least 10    5,000, test 2,000    a half            3
``smoke``   a hundredth, at least 2  500, test 500       a quarter         1
==========  ======================  ===================  ================  =======

Never more than the paper's. Milestones and warm-up move with the epochs, a stated number of groups
with the planes; learning rate, batch, decay and augmentation stay. Networks that no width is
written for keep their planes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from filterwise.lab.architectures import ARCHITECTURES, NARROWED
from filterwise.lab.training.settings import TrainingSettings
from filterwise.recipe import Recipe

if TYPE_CHECKING:
    from filterwise.lab.reproduce.records import Budget

__all__ = ["RULES", "SIZES", "Rule", "shrunk_to"]


class Rule(NamedTuple):
    """How much of a set-up is left.

    Attributes:
        epochs: Share of the epochs.
        least: Epochs at least.
        train: Pictures to train on at most.
        test: Pictures to test on at most.
        width: Share of the planes.
        seeds: Seeds at most, where their number is not given.
    """

    epochs: float
    least: int
    train: int
    test: int
    width: float
    seeds: int


RULES: dict[Budget, Rule | None] = {
    "smoke": Rule(0.01, 2, 500, 500, 0.25, 1),
    "short": Rule(0.1, 10, 5_000, 2_000, 0.5, 3),
    "full": None,
}

SIZES = {
    "digits": (898, 899),
    "cifar10": (50_000, 10_000),
    "cifar100": (50_000, 10_000),
    "svhn": (73_257, 26_032),
    "svhn+extra": (604_388, 26_032),
    "imagenet": (1_281_167, 50_000),
    "office31/amazon": (2_402, 415),
    "office31/dslr": (425, 415),
    "office31/webcam": (665, 415),
}
"""Pictures to train and to test on; of several sets to test on, the largest."""


def shrunk_to(
    settings: TrainingSettings, budget: Budget
) -> tuple[TrainingSettings, dict[str, tuple[Any, Any]]]:
    """Return a set-up under a budget, and what of it is smaller: before and after, by name."""
    rule = RULES[budget]
    if rule is None:
        return settings, {}
    before: dict[str, Any] = settings.model_dump(mode="json")
    after: dict[str, Any] = settings.model_dump(mode="json")
    _shrink_time(after["optimization"], rule)
    train, test = SIZES.get(settings.data.name.lower(), (None, None))
    for key, size, most in (
        ("train_samples", train, rule.train),
        ("test_samples", test, rule.test),
    ):
        there = before["data"][key] or size
        if there is not None:
            before["data"][key] = there
            after["data"][key] = most if there > most else settings.data.model_dump()[key]
    if settings.model.name in (*ARCHITECTURES, *NARROWED):
        _shrink_planes(after["model"], rule.width)
    return TrainingSettings.model_validate(after), _differences(before, after)


def _shrink_time(optimization: dict[str, Any], rule: Rule) -> None:
    epochs = optimization["epochs"]
    left = min(epochs, max(rule.least, round(epochs * rule.epochs)))
    share = left / epochs
    schedule = optimization["schedule"]
    if "milestones" in schedule:
        schedule["milestones"] = [each * share for each in schedule["milestones"]]
    if "warm_up" in schedule:
        schedule["warm_up"] *= share
    optimization["epochs"] = left


def _shrink_planes(model: dict[str, Any], width: float) -> None:
    model["width"] *= width
    recipe = Recipe.parse(model["recipe"])
    groups = recipe.norm.removeprefix("gn(").removesuffix(")")
    if groups.isdigit():
        norm = f"gn({max(1, round(int(groups) * width))})"
        model["recipe"] = str(Recipe(norm, recipe.method))


def _differences(
    before: dict[str, Any], after: dict[str, Any], place: str = ""
) -> dict[str, tuple[Any, Any]]:
    found: dict[str, tuple[Any, Any]] = {}
    for key, value in after.items():
        name, old = f"{place}{key}", before[key]
        if isinstance(value, dict):
            found |= _differences(old, value, f"{name}.")
        elif value is not None and value != old:
            found[name] = (old, value)
    return found
