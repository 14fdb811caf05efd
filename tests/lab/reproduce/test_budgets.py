"""The one rule by which a set-up is shrunk, and the papers' recipes under it."""

from __future__ import annotations

import pytest

from filterwise.lab.data.loading import NAMES
from filterwise.lab.nets import make
from filterwise.lab.reproduce.budgets import SIZES, shrunk_to
from filterwise.lab.reproduce.experiments import find_experiment, recipe_ids
from filterwise.lab.reproduce.index import find, listed
from filterwise.lab.training.settings import checked_training

PAPER = checked_training(
    {
        "data": {"name": "cifar10"},
        "model": {"name": "pws_resnet_cifar", "recipe": "gn(16)+ws"},
        "optimization": {
            "epochs": 300,
            "schedule": {"kind": "steps", "milestones": [150, 225], "warm_up": 5},
        },
    }
)


def test_smoke_is_a_hundredth_of_the_epochs_some_pictures_and_a_quarter_of_the_planes():
    left, shrunk = shrunk_to(PAPER, "smoke")
    assert left.optimization.epochs == 3
    assert left.optimization.schedule.milestones == (1.5, 2.25)
    assert left.optimization.schedule.warm_up == pytest.approx(0.05)
    assert (left.data.train_samples, left.data.test_samples) == (500, 500)
    assert left.model.width == 0.25
    assert left.model.recipe == "gn(4)+ws"
    assert left.optimization.learning_rate == PAPER.optimization.learning_rate
    assert shrunk == {
        "data.train_samples": (50_000, 500),
        "data.test_samples": (10_000, 500),
        "model.width": (1.0, 0.25),
        "model.recipe": ("gn(16)+ws", "gn(4)+ws"),
        "optimization.schedule.milestones": ([150.0, 225.0], [1.5, 2.25]),
        "optimization.schedule.warm_up": (5.0, 0.05),
        "optimization.epochs": (300, 3),
    }


def test_full_is_the_papers_set_up():
    assert shrunk_to(PAPER, "full") == (PAPER, {})


def test_nothing_is_made_larger():
    few = checked_training(
        {
            "data": {"name": "office31/dslr"},
            "model": {"name": "resnet18d"},
            "optimization": {"epochs": 1},
        }
    )
    left, shrunk = shrunk_to(few, "smoke")
    assert (left, shrunk) == (
        few,
        {},
    )  # 425 pictures, one epoch, a net that no width is written for


@pytest.mark.parametrize("name", recipe_ids())
def test_every_recipe_of_the_papers_can_be_set_up(name):
    """Keys, values, networks and data sets are there, and a shrunk row says what is smaller."""
    experiment = find_experiment(name)
    for row in experiment.recipe.rows:
        if row.not_run:
            continue
        settings = experiment.settings(row)
        assert settings.data.name in (*NAMES, "imagenet")
        assert settings.data.name in SIZES
        small, shrunk = shrunk_to(settings, "smoke")
        assert {"optimization.epochs", "model.width"} <= set(shrunk)
        assert small.identity != settings.identity
        if row.start:
            assert find_experiment(row.start.recipe).row(row.start.row)


def test_the_wanted_tables_and_figures_are_all_there():
    wanted = {f"wa/table{number}" for number in range(1, 7)} | {f"ws/table{n}" for n in (1, 2, 3)}
    wanted |= {"wa/fig3", "wa/fig6", "wa/wn", "wa/finetune", "pws/table4", "pws/table5"}
    wanted |= {f"equinorm/fig{figure}" for figure in ("2", "3", "4a", "4b", "4c", "4d")}
    wanted |= {f"equinorm/{name}" for name in ("quarter-batch", "mixup", "step-sizes")}
    assert wanted <= set(recipe_ids())
    entries = listed()
    assert len(entries) >= 56
    assert wanted <= {each.id for each in entries if each.rows}
    assert all(each.rows or each.without for each in entries)


def test_one_that_is_drawn_from_others_says_so():
    from filterwise.lab.errors import UsageError

    with pytest.raises(UsageError, match="pws/fig5 cannot be run: it is drawn from pws/table5"):
        find("pws/fig5")


def test_every_network_of_the_recipes_is_built_at_a_quarter_of_its_planes():
    import torch

    found = {}
    for name in recipe_ids():
        experiment = find_experiment(name)
        for row in experiment.recipe.rows:
            if not row.not_run:
                model = experiment.settings(row).model
                found[model.name] = model
    with torch.device("meta"):
        for name in found:
            whole, quarter = make(name, 3, 10), make(name, 3, 10, 0.25)
            count = [sum(each.numel() for each in net.parameters()) for net in (whole, quarter)]
            assert count[1] < 0.3 * count[0], name
