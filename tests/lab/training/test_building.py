"""A run's network: selection, first values, decay, and other runs' weights."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from filterwise import host
from filterwise.lab.errors import LabError, UsageError
from filterwise.lab.nets import make
from filterwise.lab.training.building import build_model
from filterwise.lab.training.optimizers import make_optimizer
from filterwise.lab.training.settings import Execution, ModelSettings, Optimization
from filterwise.lab.training.train import train
from support.trainings import settings, weights


def built(classes=10, runs=".", command=None, **values):
    torch.manual_seed(0)
    execution = Execution(runs=str(runs), start_command=command)
    return build_model(
        ModelSettings(**values), 1, classes, execution, lambda: torch.rand(8, 1, 8, 8)
    )


def test_patterns_choose_the_layers():
    plain = built(name="pws_plain_cifar", width=0.25, recipe="pws")
    assert "head.1" not in plain.report.converted
    every = built(name="pws_plain_cifar", width=0.25, recipe="pws", select=["*"])
    assert {*every.report.converted} - {*plain.report.converted} == {"head.1", "stage1.0"}
    less = built(recipe="gn+ws", exclude=["features.3"])
    assert "features.3" not in less.report.converted


def gains(model):
    layers = [(name, m) for name, m in model.named_modules() if host.is_converted(m)]
    return {name: host.gain_of(layer) for name, layer in layers}


def test_first_values():
    start = built(recipe="wn", initialization="unit-gains").model
    for name, gain in gains(start).items():
        assert gain.eq(1).all(), name
        raw = start.get_submodule(name).weight
        assert float(raw.detach().std()) == pytest.approx(0.05, rel=0.15)
    data = built(recipe="pws", initialization="data").model
    assert all(len(set(gain.tolist())) == 1 for gain in gains(data).values())
    assert any(abs(gain[0].item() - 1) > 0.01 for gain in gains(data).values())
    branch = built(name="residual", recipe="bn+wa", initialization="branch").model
    assert gains(branch)["blocks.0.branch.4"][0].item() == pytest.approx(24**-0.5)
    kaiming = built(recipe="wa", initialization="kaiming").model
    assert not torch.equal(kaiming.features[3].weight, built(recipe="wa").model.features[3].weight)
    with pytest.raises(UsageError, match="unit-gains is for converted layers"):
        built(recipe="bn", initialization="unit-gains")


def test_signs_are_balanced():
    def of_one_sign(initialization):
        values = {"recipe": "equinorm", "initialization": initialization}
        torch.manual_seed(0)
        found = []
        for _ in range(60):
            given = ModelSettings(**values), 1, 10, Execution(), list
            rows = build_model(*given).model.features[0].weight.flatten(1)
            found.append((rows > 0).all(1) | (rows < 0).all(1))
        return int(torch.cat(found).sum())

    # Of 960 filters of nine weights 0.39 % are expected.
    assert of_one_sign("own") > 0
    assert of_one_sign("balanced") == 0


def test_decay_of_all_but_gains():
    model = built(recipe="gn+pws").model
    groups = make_optimizer(model, Optimization(decay="all-but-gains")).param_groups
    decayed, free = ({id(p) for p in group["params"]} for group in groups)
    assert free == {id(gain) for gain in gains(model).values()}
    assert decayed == {id(p) for p in model.parameters()} - free
    assert [group["weight_decay"] for group in groups] == [5e-4, 0.0]
    only = make_optimizer(built(recipe="gn").model, Optimization(decay="all-but-gains"))
    assert len(only.param_groups) == 1


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Give the folder of a finished run with BatchNorm."""
    folder = tmp_path_factory.mktemp("runs") / "bn"
    train(settings(model={"recipe": "bn"}, optimization={"epochs": 1}), folder)
    return folder


def test_a_run_starts_from_another_run(source):
    found = built(recipe="bn+wa", start="bn", runs=source.parent)
    left = weights(source)
    state = found.model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in left.items())
    assert set(state) - set(left) == {f"features.{place}.gain" for place in (3, 6, 9, 12)}
    record = json.loads((source / "record.json").read_text())
    assert found.facts["start"]["id"] == record["id"]
    again = built(recipe="bn", start=str(source))
    assert all(torch.equal(again.model.state_dict()[name], left[name]) for name in left)


def test_the_function_of_the_start_is_kept(source):
    torch.manual_seed(5)
    x = torch.rand(8, 1, 8, 8)
    wanted, plain, kept = (
        built(recipe=recipe, start="bn", runs=source.parent, preserve=keep).model.eval()(x)
        for recipe, keep in (("bn", False), ("bn+wa", False), ("bn+wa", True))
    )
    torch.testing.assert_close(kept, wanted, rtol=1e-4, atol=1e-4)
    assert (plain - wanted).abs().max() > 0.1


def test_a_classifier_for_other_classes_is_drawn_anew(source):
    found = built(classes=7, recipe="bn+wa", start="bn", runs=source.parent)
    left, state = weights(source), found.model.state_dict()
    assert found.facts["start"]["drawn_anew"] == "classifier"
    assert state["classifier.weight"].shape == (7, 128)
    others = [name for name in left if not name.startswith("classifier")]
    assert all(torch.equal(state[name], left[name]) for name in others)


def test_a_run_says_what_it_started_from(source, tmp_path):
    wanted = settings(
        model={"recipe": "bn+wa", "start": "bn"},
        optimization={"epochs": 1, "learning_rate": 1e-9},
        execution={"runs": str(source.parent)},
    )
    record = train(wanted, tmp_path)
    assert record.facts["start"]["path"] == "bn"
    other = settings(
        model={"recipe": "bn+wa", "start": "bn"},
        optimization={"epochs": 1, "learning_rate": 1e-9},
        execution={"runs": "elsewhere"},
    )
    assert other.identity == record.id


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_checkpoint_file(tmp_path, wrapped):
    torch.manual_seed(3)
    state = make("resnet18_cifar", 1, 10, 0.25).state_dict()
    saved = {f"module.{name}": value for name, value in state.items()} if wrapped else state
    torch.save({"epoch": 3, "state_dict": saved} if wrapped else saved, tmp_path / "net.pt")
    values = {"name": "resnet18_cifar", "width": 0.25, "start": "net.pt", "runs": tmp_path}
    found = built(**values, classes=4, recipe="bn+ws").model.state_dict()
    assert torch.equal(found["layer1.0.conv1.weight"], state["layer1.0.conv1.weight"])
    assert found["fc.weight"].shape == (4, 128)
    converted = built(name="resnet18_cifar", width=0.25, recipe="bn+wa").model
    with torch.no_grad():
        converted.layer1[0].conv1.gain.fill_(3.0)
    torch.save(converted.state_dict(), tmp_path / "net.pt")
    assert built(**values, recipe="bn+wa").model.layer1[0].conv1.gain.eq(3).all()


@pytest.mark.parametrize(
    ("values", "error", "words"),
    [
        (
            {"start": "nothing", "command": "filterwise reproduce wa/table1"},
            UsageError,
            "neither a run nor a checkpoint at .*nothing. This makes it: filterwise reproduce",
        ),
        ({"start": "unfinished"}, UsageError, "not the folder of a finished run. Train that run"),
        ({"start": "bn", "name": "residual"}, UsageError, "trained plain of width 1, and here"),
        (
            {"start": "ws", "recipe": "bn+wa"},
            UsageError,
            "recipe 'gn.ws'.*it can start the same",
        ),
        ({"start": "net.pt"}, UsageError, "net.pt"),
        ({"start": "text.pt"}, LabError, "text.pt"),
        ({"start": "none"}, UsageError, "the run in .*none failed, and its weights are no start"),
    ],
)
def test_starts_that_cannot_be(source, tmp_path, values, error, words):
    (tmp_path / "bn").symlink_to(source)
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "text.pt").write_text("not a checkpoint")
    torch.save({"other.weight": torch.zeros(2, 2)}, tmp_path / "net.pt")
    if values["start"] == "ws":
        train(settings(optimization={"epochs": 1}), tmp_path / "ws")
    if values["start"] == "none":
        one = {"train_samples": 4, "test_samples": 8}
        wanted = settings(
            data={**one, "augmentation": {"crop": 1}},
            model={"recipe": "bn"},
            optimization={"epochs": 1, "step_size": 1, "micro_batch": 1},
        )
        assert train(wanted, tmp_path / "none").status == "failed"
    with pytest.raises(error, match=words):
        built(**{"recipe": "bn+wa", **values}, runs=tmp_path)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"preserve": True}, "name its start"),
        ({"start": "bn", "initialization": "kaiming"}, "would draw over the weights"),
        ({"norms": {"kind": "switchable", "fraction": 0.5}}, "goes with kind: recipe"),
        ({"width": 0}, "greater than 0"),
    ],
)
def test_settings_that_contradict_each_other(values, words):
    with pytest.raises(UsageError, match=words):
        settings(model=values)


@pytest.mark.parametrize(
    ("net", "mixing"),
    [("pws_plain_cifar", "none"), ("pws_plain_cifar", "mixup"), ("vgg16_cifar", "none")],
)
def test_pictures_that_are_too_small(net, mixing):
    model = {"name": net, "width": 0.25, "recipe": "bn"}
    with pytest.raises(UsageError, match=f"pictures of 8x8 pixels are too small for {net}: "):
        train(settings(model=model, mixing={"kind": mixing}))


def test_pairs_need_two():
    with pytest.raises(UsageError, match="mixup needs pairs, and a micro-batch is one sample"):
        settings(mixing={"kind": "mixup"}, optimization={"micro_batch": 1})


def test_half_precision_order_and_compilation_together(monkeypatch):
    """What a GPU runs by, here on the CPU: bfloat16, channels last, compiled, mixed.

    The graphs are compiled without machine code, which alone takes a minute. Shares and orders are
    drawn anew at each of 18 micro-batches; what is compiled depends on the place only.
    """
    compile_ = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda model: compile_(model, backend="aot_eager"))
    values = {
        "model": {"recipe": "bn+ws", "width": 0.5},
        "optimization": {"epochs": 3, "step_size": 50, "micro_batch": 25, "ragged": "drop"},
        "mixing": {"kind": "manifold", "places": ["input", "features.2"]},
    }
    plain = train(settings(**values))
    torch.compiler.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    how = {"compile": True, "channels_last": True}
    fast = train(settings(**values, precision="bf16-mixed", execution=how))
    assert fast.status == "finished"
    assert fast.curve[0]["train_loss"] == pytest.approx(plain.curve[0]["train_loss"], rel=0.05)
    # Two places and evaluation, each within deferral and without.
    assert counters["stats"]["unique_graphs"] <= 6
