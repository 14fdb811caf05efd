"""``filterwise export``: from a name and a checkpoint to a verified file, or one line why not."""

from __future__ import annotations

import argparse
import json
import re
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import filterwise as fw
from support.commands import call, one_line

MODULE = "own_models_of_test_exporting"
SOURCE = """
import torch
from torch import nn

class Small(nn.Module):
    def __init__(self, classes=4):
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 32, 3, bias=False),
            nn.BatchNorm2d(32), nn.ReLU())
        self.head = nn.Linear(32, classes)

    def forward(self, x):
        return self.head(self.backbone(x).mean((2, 3)))

class Detector(nn.Module):
    def __init__(self):
        super().__init__()
        self.small = Small()

    def forward(self, pictures):
        return [self.small(picture.get("image")[None]) for picture in pictures]

def ready():
    import filterwise as fw
    torch.manual_seed(5)
    model = Small()
    fw.convert_(model, "gn+ws")
    return model
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    (tmp_path / f"{MODULE}.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    yield tmp_path
    sys.modules.pop(MODULE, None)


def trained(recipe):
    """Return a converted model with weights of its own, and what it answers."""
    import importlib

    torch.manual_seed(1)
    model = importlib.import_module(MODULE).Small()
    fw.convert_(model, recipe)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        model(torch.randn(8, 3, 12, 12) + 1)
    return model.eval()


X = torch.randn(1, 3, 12, 12, generator=torch.Generator().manual_seed(2))


def answer(path):
    with torch.no_grad():
        return torch.export.load(path).module()(X)


def export(*words, model=f"{MODULE}:Small", to="out.pt2", size="12"):
    return call("export", model, "--to", to, "--size", size, *words)


def metadata_lost(state):
    return dict(state)


def wrapped(state):
    renamed = type(state)((f"module._orig_mod.{name}", value) for name, value in state.items())
    renamed._metadata = {"": {}, "module": {}, "module._orig_mod": {}} | {
        f"module._orig_mod.{name}".rstrip("."): entry for name, entry in state._metadata.items()
    }
    return renamed


def of_a_script(state):
    return {"epoch": 3, "args": argparse.Namespace(lr=0.1), "state_dict": state, "optimizer": {}}


FORMS = {
    "bare": (lambda state: state, None),
    "metadata lost": (metadata_lost, "has lost its metadata"),
    "wrapped": (wrapped, "the prefix 'module._orig_mod.' of the names"),
    "of a script": (of_a_script, None),
    "with an average": (
        lambda state: {"model": state, "model_ema": {k: v + 1 for k, v in state.items()}},
        "also holds model_ema; model was taken",
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_checkpoint_in_every_form_that_people_have(here, form):
    recipe = "bn+wa"
    model = trained(recipe)
    make, words = FORMS[form]
    torch.save(make(model.state_dict()), here / "best.pt")
    result = export("--checkpoint", "best.pt", "--recipe", recipe)
    assert result.exit_code == 0, result.output
    with torch.no_grad():
        torch.testing.assert_close(answer(here / "out.pt2"), model(X), rtol=1e-5, atol=1e-5)
    assert "folded: 2 layers; BatchNorms merged: 2; norms that stay: 0" in result.stdout
    assert re.search(r"verified with torch.export \S+ against the converted model", result.stdout)
    notes = result.stderr
    assert (words in notes) if words else notes == "", notes


def test_another_entry_by_key(here):
    model = trained("gn+ws")
    other = {"model": {k: v + 1 for k, v in model.state_dict().items()}}
    torch.save(other | {"model_ema": model.state_dict()}, here / "best.pt")
    words = ["--checkpoint", "best.pt", "--recipe", "gn+ws", "--key"]
    assert export(*words, "model_ema").exit_code == 0
    with torch.no_grad():
        torch.testing.assert_close(answer(here / "out.pt2"), model(X), rtol=1e-5, atol=1e-5)
    assert "States in it: model, model_ema." in one_line(export(*words, "ema"), 2)


def test_safetensors_in_and_out(here):
    model = trained("gn+ws(eps=1e-3)")
    header = {"filterwise": json.dumps(fw.describe(model))}
    save_file(model.state_dict(), here / "best.safetensors", metadata=header)
    words = ["--checkpoint", "best.safetensors", "--recipe"]
    message = one_line(export(*words, "gn+ws"), 2)
    assert "backbone.0 was trained as ws(eps=0.001)" in message
    assert "so for 2 layers" in message
    result = export(*words, "gn+ws(eps=1e-3)", "--json", to="out.safetensors")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (found["recipe"], found["folded"], found["merged"]) == ("gn+ws(eps=0.001)", 2, 0)
    assert found["notes"] == []
    assert all(one["difference"] <= 1e-5 for one in found["comparisons"])
    plain = fw.fold(model)
    for name, value in load_file(here / "out.safetensors").items():
        assert torch.equal(value, plain.state_dict()[name]), name
    # What was folded is not normalized again, and goes on as it is.
    words[1] = "out.safetensors"
    message = one_line(export(*words, "gn+ws(eps=1e-3)"), 2)
    assert "was folded (ws(eps=0.001))" in message
    assert export(*words, "gn").exit_code == 0
    with torch.no_grad():
        torch.testing.assert_close(answer(here / "out.pt2"), model(X), rtol=1e-5, atol=1e-5)


def test_other_options_in_the_metadata_are_refused(here):
    torch.save(trained("gn+pws(gamma=0.5)").state_dict(), here / "best.pt")
    message = one_line(export("--checkpoint", "best.pt", "--recipe", "gn+pws"), 2)
    assert "backbone.0 was trained as pws(gamma=0.5) (best.pt says so) and is pws here" in message
    message = one_line(export("--checkpoint", "best.pt", "--recipe", "gn"), 2)
    assert "is plain here" in message
    assert not (here / "out.pt2").exists()


def test_a_plain_checkpoint_under_a_method_is_said(here):
    import importlib

    model = importlib.import_module(MODULE).Small()
    fw.convert_(model, "gn")
    torch.save(model.state_dict(), here / "plain.pt")
    result = export("--checkpoint", "plain.pt", "--recipe", "gn+ws")
    assert result.exit_code == 0, result.output
    assert "a plain model's, or another library's" in result.stderr


def test_a_part_of_a_model_and_a_model_that_comes_with_its_weights(here):
    result = export(model=f"{MODULE}:ready")
    assert result.exit_code == 0, result.output
    assert "folded: 2 layers" in result.stdout
    assert result.stderr == ""
    message = one_line(export(model=f"{MODULE}:Detector"), 1)
    assert "does not run on example_input" in message
    assert "--part exports a submodule" in message
    result = export("--part", "small.backbone", "--recipe", "gn+wa", model=f"{MODULE}:Detector")
    assert result.exit_code == 0, result.output
    assert answer(here / "out.pt2").shape == (1, 32, 8, 8)
    message = one_line(export("--part", "body", model=f"{MODULE}:Detector"), 2)
    assert "It consists of small." in message


@pytest.mark.usefixtures("here")
def test_options_reach_the_file():
    result = call(
        *["export", "resnet18", "--recipe", "bn+ws", "--classes", 7, "--batch", 2, "--size", 40],
        *["--to", "out.onnx", "--dynamic-batch", "--keep-bn", "--opset", 18],
        *["--precision", "float32", "--json"],
    )
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (found["opset"], found["dynamic_batch"], found["merged"]) == (18, True, 0)
    assert [one["shapes"] for one in found["comparisons"]] == [
        [[samples, 3, 40, 40]] for samples in (2, 3, 1)
    ]
    assert any("random" in note for note in found["notes"])
    import onnxruntime

    session = onnxruntime.InferenceSession("out.onnx")
    (out,) = session.run(None, {"input": torch.randn(4, 3, 40, 40).numpy()})
    assert out.shape == (4, 7)


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--to", "out.bin"], 2, "it must end in one of .onnx, .pt2, .safetensors"),
        (["--to", "no/out.pt2"], 2, "there is no folder no"),
        (["--opset", "18"], 2, "--opset is for .onnx"),
        (["--precision", "int8"], 2, "one of float32, float16"),
        (["--batch", "0"], 2, "must be at least 1"),
        (["--key", "ema"], 2, "give --checkpoint too"),
        (["--size", "big"], 2, "numbers such as 224"),
        (["--size", "3x4"], 1, "does not run on example_input"),
        (["--recipe", "gn+wss"], 2, "unknown norm or method"),
        (["--recipe", "gn(5)+ws"], 2, "The model is unchanged"),
        (["--checkpoint", "no.pt"], 2, "there is no checkpoint no.pt"),
        (["--checkpoint", "text.pt"], 1, "it is none, or torn"),
        (["--checkpoint", "text.safetensors"], 1, "cannot be read as safetensors"),
        (
            ["--checkpoint", "code.pt"],
            1,
            "holds more than tensors (torch.nn.modules.linear.Linear)",
        ),
        (["--checkpoint", "list.pt"], 2, "holds a list"),
        (["--checkpoint", "numbers.pt"], 2, "It holds: epoch, loss."),
        (["--checkpoint", "other.pt"], 2, "15 are missing"),
        (["--checkpoint", "classes.pt"], 2, "head.weight is 7x32 and not 4x32"),
        (["--classes", "7"], 2, "called without arguments"),
    ],
)
def test_what_a_person_can_mend_is_one_line(here, words, code, message):
    import importlib

    (here / "text.pt").write_text("not a checkpoint")
    (here / "text.safetensors").write_text("not a checkpoint")
    torch.save(nn.Linear(2, 2), here / "code.pt")
    torch.save([1, 2], here / "list.pt")
    torch.save({"epoch": 1, "loss": 0.5}, here / "numbers.pt")
    torch.save(nn.Linear(2, 2).state_dict(), here / "other.pt")
    torch.save(importlib.import_module(MODULE).Small(7).state_dict(), here / "classes.pt")
    files = sorted(here.iterdir())
    result = call("export", f"{MODULE}:Small", "--to", "out.pt2", "--size", "12", *words)
    assert message in one_line(result, code)
    assert sorted(here.iterdir()) == files


@pytest.mark.usefixtures("here")
def test_timms_size_is_taken_and_a_video_asks_for_one():
    from filterwise.lab.models import picture_shape

    assert picture_shape("inception_v3") == (3, 299, 299)
    assert picture_shape("tf_efficientnet_b4") == (3, 380, 380)
    assert picture_shape("deeplabv3_resnet50") is None
    message = one_line(call("export", "r3d_18", "--to", "out.pt2"), 2)
    assert "begins with a Conv3d: give the whole input with --size" in message


@pytest.mark.usefixtures("here")
def test_layers_that_normalize_their_own_weight_are_adopted():
    """A model of timm with its own checkpoint: constants in the file, and what was done is said."""
    import onnx
    import timm

    model = timm.create_model("test_nfnet", num_classes=4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    torch.save(model.state_dict(), "timm.pt")
    words = ["export", "test_nfnet", "--classes", "4", "--checkpoint", "timm.pt", "--to", "a.onnx"]
    done = call(*words, "--size", "64")
    assert done.exit_code == 0, done.output
    assert "layers that normalize their own weight were adopted: sws(" in done.stderr
    computing = {"Sqrt", "ReduceL2", "BatchNormalization", "ReduceSumSquare"}
    assert not computing & {node.op_type for node in onnx.load("a.onnx").graph.node}
    assert "are constants" in done.stdout
