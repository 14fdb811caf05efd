"""Settings: what a command line means, and what makes two runs the same."""

from __future__ import annotations

import pytest

from filterwise.errors import RecipeError
from filterwise.lab.errors import UsageError
from filterwise.lab.settings import (
    PANELS,
    CompareSettings,
    RunSettings,
    checked,
    needs_branch_gains,
)

RUN = RunSettings(
    data="digits",
    data_sha256="0" * 64,
    net="plain",
    recipe="gn+ws",
    initialization="default",
    learning_rate=0.1,
    micro_batch=8,
    seed=0,
    epochs=6,
)
OTHER = {
    "data": "mnist",
    "data_sha256": "1" * 64,
    "net": "residual",
    "recipe": "gn",
    "initialization": "branch",
    "learning_rate": 0.3,
    "micro_batch": 1,
    "seed": 1,
    "epochs": 7,
    "step_size": 32,
    "momentum": 0.8,
    "weight_decay": 0.0,
    "device": "cuda",
    "deterministic": True,
}


def test_every_setting_is_part_of_the_identity():
    assert set(OTHER) | {"schedule"} == set(RunSettings.model_fields)
    identities = {RUN.identity}
    for name, value in OTHER.items():
        identities.add(RUN.model_copy(update={name: value}).identity)
    assert len(identities) == 1 + len(OTHER)
    assert RunSettings.model_validate(RUN.model_dump()).identity == RUN.identity


def test_four_panels_are_the_default_and_quick_leaves_the_deep_net_out():
    found = [(p.net, p.learning_rate, p.micro_batch) for p in CompareSettings().panels()]
    assert found == [
        ("plain", 0.1, 64),
        ("plain", 0.3, 64),
        ("plain", 0.1, 1),
        ("residual", 0.1, 64),
    ]
    assert CompareSettings(quick=True).panels() == PANELS[:3]


def test_named_values_are_combined():
    panels = CompareSettings(learning_rates=(0.1, 0.2), micro_batches=(1, 8)).panels()
    assert [(p.net, p.learning_rate, p.micro_batch) for p in panels] == [
        ("plain", 0.1, 1),
        ("plain", 0.1, 8),
        ("plain", 0.2, 1),
        ("plain", 0.2, 8),
    ]


def test_recipes_are_kept_in_their_canonical_text_once():
    settings = CompareSettings(recipes=("WS + GN", "gn+ws", "none + ws"))
    assert settings.recipes == ("gn+ws", "ws")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"seeds": 0}, "--seeds: 0 will not do"),
        ({"micro_batches": (1, 0)}, "--micro-batch: 0 will not do"),
        ({"learning_rates": (-0.1,)}, "--lr: -0.1 will not do"),
        ({"learning_rates": (float("inf"),)}, "--lr: inf will not do"),
        ({"epochs": 0}, "--epochs: 0 will not do"),
        ({"size": 4}, "--size: 4 will not do"),
    ],
)
def test_a_value_out_of_range_names_its_option(values, words):
    with pytest.raises(UsageError, match=words):
        checked(values)


def test_a_wrong_recipe_keeps_its_own_words():
    with pytest.raises(RecipeError, match="Nearest: 'ws'"):
        checked({"recipes": ("gn+wss",)})


@pytest.mark.parametrize(
    ("net", "recipe", "needed"),
    [
        ("residual", "wa", True),
        ("residual", "sws", True),
        ("residual", "gn+wa", False),
        ("residual", "ws", False),
        ("residual", "none", False),
        ("plain", "wa", False),
    ],
)
def test_branch_gains_are_for_gains_without_norms_on_residual_branches(net, recipe, needed):
    assert needs_branch_gains(net, recipe) is needed
