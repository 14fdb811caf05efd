"""Small models of the blocks that people ship: adopted or converted, folded, ONNX, compared.

``python -m filterwise.lab.shipping`` does the same with the whole ones (`results/shipping`).
"""

from __future__ import annotations

import json

import pytest

from filterwise.lab.shipping import command, ship
from filterwise.lab.shipping.architectures import ARCHITECTURES

REQUIRED = (
    "resnet50",
    "resnext50_32x4d",
    "deeplabv3_resnet50",
    "fasterrcnn_resnet50_fpn backbone",
    "resnet18 with EquiNorm",
    "resnetv2_50x1_bit",
    "nf_resnet50",
    "dm_nfnet_f0",
    "eca_nfnet_l0",
    "vit_base_r50_s16_224",
)


def test_the_list_is_whole():
    assert tuple(ARCHITECTURES) == REQUIRED


@pytest.mark.parametrize("name", REQUIRED)
def test_from_a_model_to_an_onnx_file(name, tmp_path):
    one = ARCHITECTURES[name]
    done = ship.ship(one, tmp_path, small=True)
    assert done.folded < 1e-5
    assert done.files["onnx"] < ship.LIMIT
    assert done.layers > 8
    if one.recipe == "adopt":
        assert done.adopted < 1e-5
    else:
        assert done.adopted is None


def test_the_command_writes_figures_and_page(tmp_path, capsys):
    arguments = ["nf_resnet50", "--small", "--kinds", "pt2", "--out", str(tmp_path)]
    assert command.main(arguments) == 0
    (record,) = map(json.loads, (tmp_path / "results.jsonl").read_text().splitlines())
    assert record["passed"]
    assert record["files"]["pt2"] < ship.LIMIT
    assert record["ran"]["onnxruntime"]
    page = (tmp_path / "README.md").read_text()
    assert "`python -m filterwise.lab.shipping nf_resnet50 --small --kinds pt2" in page
    assert "nf_resnet50" in capsys.readouterr().out


def test_a_file_that_differs_fails(monkeypatch, capsys):
    read = ship._read
    monkeypatch.setattr(ship, "_read", lambda *given: [1.001 * out for out in read(*given)])
    assert command.main(["nf_resnet50", "--small", "--kinds", "pt2"]) == 1
    assert "further from the model than rounding" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["no_such_model"], ["nf_resnet50", "--kinds", "tflite"]])
def test_wrong_use_is_said_in_one_line(arguments, capsys):
    with pytest.raises(SystemExit) as leaving:
        command.main(arguments)
    assert leaving.value.code == 2
    assert "error:" in capsys.readouterr().err
