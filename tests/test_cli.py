"""The doors of the command line: methods, inspect, help, and what is said without the extra."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest

import filterwise as fw
from support.commands import call, one_line


def test_methods_are_listed_with_formula_and_source():
    result = call("methods")
    assert result.exit_code == 0
    for info in fw.methods():
        (line,) = [row for row in result.stdout.splitlines() if row.startswith(f"{info.name} ")]
        assert info.title in line
        assert info.formula in line
        assert info.source in line


def test_methods_as_json():
    found = json.loads(call("methods", "--json").stdout)
    assert [row["name"] for row in found] == [info.name for info in fw.methods()]
    assert found[0]["needs_norm"] is True
    assert found[0]["options"]["eps"] == 1e-5


def test_inspect_shows_plan_and_findings():
    result = call("inspect", "resnet18", "--recipe", "ws")
    assert result.exit_code == 0
    assert "resnet18 (torchvision), recipe ws" in result.stdout
    assert re.search(r"layer1\.0\.conv1 +Conv2d +convert ws .* 576", result.stdout)
    assert re.search(r"bn1 +BatchNorm2d +remove", result.stdout)
    assert "Findings (converted)" in result.stdout
    assert "…" not in result.stdout


def test_inspect_as_json_agrees_with_plan():
    from torchvision.models import resnet18

    found = json.loads(call("inspect", "resnet18", "--recipe", "gn+ws", "--json").stdout)
    assert found["rows"] == fw.plan(resnet18(), "gn+ws").to_dicts()
    assert found["recipe"] == "gn+ws"
    assert found["findings_of"] == "converted model"


def test_inspect_without_recipe_shows_the_model_as_it_is():
    found = json.loads(call("inspect", "resnet18", "--json").stdout)
    assert {row["action"] for row in found["rows"]} == {"keep"}


def test_inspect_shows_what_would_be_refused():
    result = call("inspect", "resnet18", "--recipe", "gn(7)")
    assert result.exit_code == 0
    assert "refuse" in result.stdout
    assert "Findings (as it is)" in result.stdout


def test_inspect_finds_models_of_timm():
    result = call("inspect", "resnetv2_50", "--recipe", "gn+ws")
    assert result.exit_code == 0
    assert "resnetv2_50 (timm)" in result.stdout


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    (tmp_path / "own_models_of_test_cli.py").write_text(
        "from torch import nn\n"
        "def small():\n"
        "    return nn.Sequential(nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.Conv2d(32, 4, 3))\n"
        "def wrong():\n"
        "    return 3\n"
        "def failing():\n"
        "    raise KeyError('depth')\n"
        "def talking():\n"
        "    print('built')\n"
        "    return small()\n"
        "number = 4\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield "own_models_of_test_cli"
    sys.modules.pop("own_models_of_test_cli", None)


def test_inspect_finds_a_factory_in_the_current_folder(own_module):
    result = call("inspect", f"{own_module}:small", "--recipe", "gn+ws", "--json")
    assert result.exit_code == 0, result.output
    assert [row["name"] for row in json.loads(result.stdout)["rows"]] == ["0", "1", "2"]


def test_what_a_factory_prints_stays_out_of_the_json(own_module):
    result = call("inspect", f"{own_module}:talking", "--json")
    assert json.loads(result.stdout)["model"] == f"{own_module}:talking"
    assert "built" in result.stderr


def test_a_detection_model_is_built_without_fetching_weights(monkeypatch):
    from torch import hub

    def fetch(*_, **__):
        raise AssertionError("weights were fetched")

    monkeypatch.setattr(hub, "load_state_dict_from_url", fetch)
    result = call("inspect", "fcos_resnet50_fpn", "--json")
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    ("factory", "code", "words"),
    [
        ("smal", 2, "has no smal. Nearest: small"),
        ("wrong", 2, "gave a int, not a torch.nn.Module"),
        ("failing", 1, r"failed: KeyError at \S+own_models_of_test_cli.py:7: 'depth'"),
        ("number", 2, "is a int, not a function"),
    ],
)
def test_a_factory_that_will_not_do_is_one_line(own_module, factory, code, words):
    assert re.search(words, one_line(call("inspect", f"{own_module}:{factory}"), code))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("resnet_18", "Nearest: resnet18"),
        ("no.such.module:model", "there is no module no in the environment"),
        ("torchvision.models:resnet8", "torchvision.models has no resnet8. Nearest: resnet18"),
    ],
)
def test_an_unknown_model_names_the_nearest(name, words):
    assert words in one_line(call("inspect", name), 2)


def test_a_wrong_recipe_of_inspect_is_told_before_the_model_is_built():
    message = one_line(call("inspect", "no_such_model", "--recipe", "gn+wss"), 2)
    assert "unknown norm or method" in message


@pytest.mark.parametrize("command", ["compare", "export", "inspect", "methods"])
def test_help_shows_an_example_that_works_as_typed(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = call(command, "-h")
    assert result.exit_code == 0
    (example,) = re.findall(r"Example: filterwise (.+)", result.stdout)
    assert example.split()[0] == command
    words = example.split()
    if command == "compare":
        # As typed, but for the size: 2 epochs fewer pictures would not change what is tried.
        words += ["--recipes", "none", "--epochs", "1", "--out", os.devnull + "/x"]
        assert "--out" in one_line(call(*words), 1)
    else:
        assert call(*words).exit_code == 0


@pytest.mark.parametrize("words", [["--nope"], ["compare", "--nope"], ["nope"], ["inspect"]])
def test_wrong_use_is_exit_code_2(words):
    result = call(*words)
    assert result.exit_code == 2
    assert "Traceback" not in result.output


@pytest.mark.parametrize("missing", ["typer", "sklearn"])
def test_without_the_extra_one_line_says_what_to_install(missing):
    code = f"import sys; sys.modules[{missing!r}] = None; from filterwise.cli import main; main()"
    found = subprocess.run(
        [sys.executable, "-c", code, "methods"], capture_output=True, text=True, timeout=60
    )
    package = {"sklearn": "scikit-learn"}.get(missing, missing)
    assert found.returncode == 1
    assert found.stdout == ""
    assert found.stderr == (
        f"filterwise: the command line needs {package}; install its extra with"
        " pip install 'filterwise[lab]'\n"
    )


def test_the_extra_holds_what_the_command_line_asks_for():
    from importlib.metadata import requires

    from filterwise.cli import NEEDED

    extra = [line for line in requires("filterwise") or () if re.search("extra == .lab", line)]
    assert {re.match(r"[\w-]+", line)[0] for line in extra} == set(NEEDED.values())


def test_the_installed_command_is_this_one():
    from importlib.metadata import entry_points

    (script,) = entry_points(group="console_scripts", name="filterwise")
    from filterwise.cli import main

    assert script.load() is main
