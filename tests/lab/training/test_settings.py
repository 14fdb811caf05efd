"""Settings and schedules: what is refused and with which words; rates against the formulas."""

from __future__ import annotations

import math

import pytest
from pydantic import TypeAdapter

from filterwise.lab.errors import UsageError
from filterwise.lab.training.schedules import Schedule
from filterwise.lab.training.seeds import generator, seed_of
from filterwise.lab.training.settings import TrainingSettings, checked_training

KINDS = ("constant", "cosine", "polynomial", "super-convergence")


def schedule(**values):
    return TypeAdapter(Schedule).validate_python(values)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"sede": 1}, "there is no key sede. Nearest: seed."),
        ({"model": {"recipee": "ws"}}, "there is no key model.recipee. Nearest: recipe."),
        (
            {"optimization": {"schedule": {"kind": "steps", "milestone": [1]}}},
            "there is no key optimization.schedule.milestone. Nearest: milestones.",
        ),
        (
            {"optimization": {"schedule": {"kind": "step"}}},
            "optimization.schedule: input tag 'step'",
        ),
        ({"optimization": {"schedule": {"kind": "steps"}}}, "schedule.milestones is missing"),
        ({"optimization": {"learning_rate": -1}}, "optimization.learning_rate: -1: "),
        ({"data": {"zzz": 1}}, "there is no key data.zzz. Keys here: name, reading, size, "),
        ({"model": {"recipe": "gn+wss"}}, "model.recipe"),
        (
            {
                "optimization": {
                    "epochs": 3,
                    "schedule": {"kind": "steps", "milestones": [1, 3]},
                }
            },
            "the schedule's milestone 3 is never reached in 3 epochs",
        ),
        (
            {
                "optimization": {
                    "epochs": 9,
                    "schedule": {"kind": "steps", "milestones": [3, 2]},
                }
            },
            "milestones must rise",
        ),
    ],
)
def test_what_is_wrong_is_named(values, words):
    if values.get("optimization", {}).get("schedule", {}).get("milestone"):
        values["optimization"]["schedule"]["milestones"] = [1]
        values["optimization"]["epochs"] = 2
    with pytest.raises(UsageError) as caught:
        checked_training(values, "recipe.yaml")
    assert str(caught.value).startswith("recipe.yaml: ")
    assert words in str(caught.value)


def test_identity_is_that_of_what_decides_the_outcome():
    plain = TrainingSettings()
    assert checked_training({"execution": {"device": "cuda:1"}}).identity == plain.identity
    assert checked_training({"seed": 1}).identity != plain.identity
    assert checked_training({"model": {"recipe": "WS + GN"}}).identity == (
        checked_training({"model": {"recipe": "gn+ws"}}).identity
    )
    again = TrainingSettings.model_validate_json(plain.model_dump_json())
    assert again == plain
    # Two kinds that say nothing else are two runs, and what is named as it is anyway is the same.
    kinds = [checked_training({"optimization": {"schedule": {"kind": kind}}}) for kind in KINDS]
    assert len({settings.identity for settings in kinds}) == len(KINDS)
    assert kinds[0].identity == plain.identity


def test_a_setting_that_a_later_version_adds_leaves_identities_as_they_are():
    class Later(TrainingSettings):
        more: int = 3

    values = {"seed": 2, "optimization": {"schedule": {"kind": "cosine"}}}
    assert Later.model_validate(values).identity == checked_training(values).identity
    assert Later.model_validate({**values, "more": 4}).identity != Later(**values).identity


def test_steps_fall_at_their_milestones():
    steps = schedule(kind="steps", milestones=[150, 225])
    found = [steps.at(epoch, 300).factor for epoch in (0, 149.99, 150, 224.99, 225, 299.9)]
    assert found == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])


def test_cosine_polynomial_and_warm_up():
    assert schedule(kind="cosine").at(3, 12).factor == pytest.approx((1 + math.sqrt(0.5)) / 2)
    assert schedule(kind="polynomial").at(3, 12).factor == pytest.approx(0.75**0.9)
    warmed = schedule(kind="constant", warm_up=4)
    assert [warmed.at(epoch, 12).factor for epoch in (0, 1, 4, 9)] == [0, 0.25, 1, 1]


def test_super_convergence_is_that_of_the_paper():
    """From 0.1 to 0.5 by epoch 13, to 0.1 by 26, to 0.001 by 30; momentum the other way."""
    shape = schedule(kind="super-convergence")
    rates = {epoch: shape.at(epoch, 30) for epoch in (0, 6.5, 13, 19.5, 25.999, 26, 28, 30)}
    found = {epoch: 0.1 * rate.factor for epoch, rate in rates.items()}
    wanted = {0: 0.1, 6.5: 0.3, 13: 0.5, 19.5: 0.3, 25.999: 0.1, 26: 0.1, 28: 0.01, 30: 0.001}
    assert found == pytest.approx(wanted, rel=1e-3)
    momenta = {epoch: rate.momentum for epoch, rate in rates.items()}
    wanted = {0: 0.95, 6.5: 0.9, 13: 0.85, 19.5: 0.9, 25.999: 0.95, 26: 0.85, 28: 0.85, 30: 0.85}
    assert momenta == pytest.approx(wanted, abs=1e-4)


def test_seeds_are_apart_and_stay():
    assert len({seed_of(0, "order", epoch) for epoch in range(1000)}) == 1000
    assert seed_of(0, 11) != seed_of(0, 1, 1)
    first = generator(3, "x").get_state()
    assert (generator(3, "x").get_state() == first).all()
