"""Models of timm and torchvision: the fixed sample itself, and what the command does around it."""

from __future__ import annotations

import functools
import json
import math
import os
import time

import pytest
import torch
from typer.testing import CliRunner

import filterwise as fw
from filterwise.lab.compatibility import architectures, command, examine, inputs, workers
from filterwise.lab.compatibility.architectures import Architecture
from filterwise.lab.compatibility.page import Scope, page
from filterwise.lab.compatibility.records import Records

every = functools.cache(lambda: {str(one): one for one in architectures.all_architectures()})


@functools.cache
def prepared(name):
    torch.set_num_threads(1)
    return inputs.prepare(every()[name])


def sampled():
    """Yield the sample; over the larger models the recipes take turns."""
    turn = 0
    for name in architectures.SAMPLE:
        if name.startswith("timm/test_"):
            recipes = examine.RECIPES
        else:
            recipes = tuple(examine.RECIPES[(turn + step) % 6] for step in (0, 3))
            turn += 1
        yield pytest.param(name, recipes, id=name)


BLIND = ("torchvision/ssdlite320_mobilenet_v3_large", "equinorm")
"""Its boxes come out of the biases of the heads alone, with raw weights and with effective ones."""


@pytest.mark.parametrize(("name", "recipes"), list(sampled()))
def test_sample(name, recipes):
    one = every()[name]
    for recipe in recipes:
        found = examine.examine(one, recipe, prepared(name))
        if name == "timm/test_nfnet":
            assert found["outcome"] == "refused"
            assert "(ScaledStdConv2d), which would be done twice; adopt_(model)" in found["reason"]
            continue
        assert found["outcome"] == "passed", (recipe, found)
        assert found["converted"] > 0
        if (name, recipe) != BLIND:
            assert found["depends"] > 0, "the comparison of the folded model shows nothing"
        if examine.is_widened(one, recipe):
            assert found["difference64"] <= 1e-9


# What an examination must notice.


def break_fold(monkeypatch):
    fold = fw.fold

    def broken(model):
        folded = fold(model)
        with torch.no_grad():
            list(folded.parameters())[-1].add_(1.0)
        return folded

    monkeypatch.setattr(fw, "fold", broken)


def break_class(monkeypatch):
    fold = fw.fold

    def broken(model):
        folded = fold(model)
        module = next(m for m in folded.modules() if isinstance(m, torch.nn.Conv2d))
        module.__class__ = type("Other", (type(module),), {})
        return folded

    monkeypatch.setattr(fw, "fold", broken)


def break_conversion(monkeypatch):
    convert = fw.convert_

    def broken(model, recipe):
        report = convert(model, recipe)
        module = model.get_submodule(report.converted[0])
        with torch.no_grad():
            module.weight.fill_(float("nan"))
        return report

    monkeypatch.setattr(fw, "convert_", broken)


def break_refusal(monkeypatch):
    def broken(model, recipe):
        del recipe
        model.get_submodule("conv1.0").weight.data.zero_()
        model.register_buffer("left", torch.zeros(1))
        raise fw.ConversionError("no")

    monkeypatch.setattr(fw, "convert_", broken)


@pytest.mark.parametrize(
    ("fault", "step", "words"),
    [
        (break_fold, "fold in float64", "differs by"),
        (break_class, "fold", "has not the class it had"),
        (break_conversion, "train", "is not finite"),
        (break_refusal, "convert", "was refused and has changed"),
    ],
)
def test_faults_are_failures(fault, step, words, monkeypatch):
    one = every()["timm/test_resnet"]
    plain = prepared("timm/test_resnet")
    fault(monkeypatch)
    found = examine.examine(one, "gn+ws", plain)
    assert (found["outcome"], found["step"]) == ("failed", step)
    assert words in found["reason"]


def test_writing_over_a_shortcut_is_a_failure(monkeypatch):
    one = every()["timm/resnetv2_18"]
    plain = prepared("timm/resnetv2_18")
    assert examine.examine(one, "wa", plain)["outcome"] == "passed"
    monkeypatch.setattr("filterwise.draft.out_of_place", lambda *_: ([], ""))
    found = examine.examine(one, "wa", plain)
    assert (found["outcome"], found["step"]) == ("failed", "in-place activations")


def change_conversion(monkeypatch, change):
    convert = fw.convert_

    def broken(model, recipe):
        report = convert(model, recipe)
        with torch.no_grad():
            for name in report.converted:
                change(model.get_submodule(name))
        return report

    monkeypatch.setattr(fw, "convert_", broken)


def test_a_network_that_overflows_by_itself_diverges(monkeypatch):
    change_conversion(monkeypatch, lambda layer: layer.gain.fill_(1e20))
    found = examine.examine(every()["timm/test_resnet"], "wa", prepared("timm/test_resnet"))
    assert (found["outcome"], found["step"]) == ("diverges", "train")
    assert "the output holds NaN or infinity on the input" in found["reason"]


def test_an_overflow_that_float64_does_not_have_is_a_failure(monkeypatch):
    def overflow_in_float32(layer):
        layer.register_forward_hook(
            lambda _layer, _inputs, y: y if y.dtype == torch.float64 else y * math.inf
        )

    change_conversion(monkeypatch, overflow_in_float32)
    found = examine.examine(every()["timm/test_resnet"], "wa", prepared("timm/test_resnet"))
    assert (found["outcome"], found["step"]) == ("failed", "train")


def test_refusals_have_the_reason():
    found = examine.examine(every()["timm/test_resnet"], "gn(7)+ws", prepared("timm/test_resnet"))
    assert found["outcome"] == "refused"
    assert "do not divide into 7 groups" in found["reason"]


# Which architectures.


def test_smallest_of_each_family_and_modules_first():
    names = ["timm/vgg11", "timm/vgg13", "timm/repvgg_a0", "timm/repvgg_a1", "timm/gernet_s"]
    chosen = [every()[name] for name in [*names, "timm/test_byobnet", "torchvision/vgg11"]]
    sizes = {
        str(one): 10 + place if one.library == "torchvision" else 10 - place
        for place, one in enumerate(chosen)
    }
    found = architectures.representatives(chosen, sizes)
    assert [str(one) for one in found] == [
        "timm/gernet_s",
        "timm/vgg13",
        "torchvision/vgg11",
        "timm/repvgg_a1",
        "timm/test_byobnet",
    ]


def test_kinds():
    kinds = {one.kind for one in every().values()}
    assert kinds == {*architectures.KINDS.values(), "classification"}
    assert every()["torchvision/quantized_resnet18"].kind == "quantizable"
    assert len(every()) > 1000


def test_parameters_are_counted_without_memory():
    one = every()["torchvision/vit_l_32"]
    assert architectures.count_parameters(one) == 306_535_400


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("timm/test_resnet", "32 px"),  # any side
        ("timm/convit_tiny", "32 px"),  # a side that its builder is told
        ("timm/crossvit_9_240", "240 px"),  # the one that it was made for
        ("torchvision/r3d_18", "4 x 32 px"),
        ("torchvision/mvit_v2_s", "4 x 32 px"),  # its builder does not take it
    ],
)
def test_smallest_inputs(name, size):
    assert prepared(name).size == size


# Processes that die, hang or raise.


def misbehave(one, words):
    del one
    for word in words:
        if word == "die":
            os.kill(os.getpid(), 9)
        if word == "hang":
            time.sleep(600)
        if word == "leave":
            os._exit(3)
        yield word, {"outcome": "passed", "pid": os.getpid()}


def test_a_crash_ends_one_word_only():
    jobs = [
        workers.Job(Architecture("timm", "bad", "bad", "classification"), ("a", "die", "b")),
        workers.Job(Architecture("timm", "slow", "slow", "classification"), ("hang", "c")),
        workers.Job(Architecture("timm", "left", "left", "classification"), ("leave", "d")),
    ]
    found = {
        (one.name, word): what
        for one, word, what in workers.run_guarded(misbehave, jobs, 2, 10.0, lambda: False)
    }
    passed = {pair for pair, what in found.items() if what["outcome"] == "passed"}
    assert passed == {("bad", "a"), ("bad", "b"), ("slow", "c"), ("left", "d")}
    assert found["bad", "die"]["reason"] == "the process was ended by SIGKILL"
    assert found["slow", "hang"]["reason"] == "took longer than 10 s"
    assert found["left", "leave"]["reason"] == "the process ended with exit code 3"


def test_nothing_starts_when_it_is_over():
    jobs = [workers.Job(every()["timm/test_vit"], ("a",))]
    assert list(workers.run_guarded(misbehave, jobs, 1, 4.0, lambda: True)) == []


# Records and the page.


def test_a_torn_line_is_done_again(tmp_path):
    one, records = every()["timm/test_vit"], Records(tmp_path)
    records.add_pair(one, "wa", {"outcome": "passed"}, "c0de")
    records.add_pair(one, "pws", {"outcome": "failed"}, "c0de")
    path = tmp_path / "pairs.jsonl"
    torn = path.read_bytes()[:-1] + b'\n{"architecture": "timm/te'
    path.write_bytes(torn)
    assert records.finished() == {("timm/test_vit", "wa")}
    records.add_pair(one, "sws", {"outcome": "refused"}, "c0de")
    assert path.read_bytes().startswith(torn)
    assert records.finished() == {("timm/test_vit", "wa"), ("timm/test_vit", "sws")}


def test_records_of_other_versions_are_not_read(tmp_path):
    one, records = every()["timm/test_vit"], Records(tmp_path)
    records.add_pair(one, "wa", {"outcome": "passed"}, "c0de")
    records.about = {"torch": "1.0"}
    assert records.pairs() == {}


def test_page_counts_and_gives_reasons():
    chosen = [every()[name] for name in ("timm/vgg11", "timm/vgg13", "torchvision/raft_small")]
    line = {"step": "", "reason": "", "seconds": 1.0, "difference": 1e-6, "code": "a"}
    refused = 'conv1 (StdConv) is 3 wide|tall; leave it out with exclude="conv1"'
    pairs = {
        ("timm/vgg11", "wa"): {**line, "outcome": "passed"},
        ("timm/vgg13", "wa"): {**line, "outcome": "refused", "reason": refused},
        ("timm/vgg11", "pws"): {**line, "outcome": "refused", "reason": refused.replace("3", "4")},
        ("torchvision/raft_small", "wa"): {
            **line,
            "outcome": "failed",
            "step": "train",
            "reason": "gone",
        },
    }
    text = page(Scope("python -m x", chosen, chosen, 7, 100, {"torch": "9"}), pairs)
    assert "    python -m x\n" in text
    assert "torch 9." in text
    assert (
        "| timm | vgg | 2 architectures | - | - | 1 passed, 1 refused (1) | 1 refused (1) | - | - |"
        in text
    )
    assert (
        "| torchvision | optical_flow.raft | raft_small | - | - | failed (2) | - | - | - |" in text
    )
    assert "1. 2 pairs; timm/vgg13, wa: conv1 (StdConv) is 3 wide\\|tall;" in text
    assert "2. 1 pair; torchvision/raft_small, wa: train: gone" in text
    assert "it had not come to the end of 3 of them" in text
    assert "## Not examined" not in text
    text = page(Scope("python -m x", chosen[:1], chosen, 7, 100, {"torch": "9"}), {})
    assert "No architecture of 2 families was examined" in text
    assert "\n- timm: vgg.\n\n- torchvision: optical_flow.raft.\n" in text


# The command.


def run(tmp_path, *words):
    to = ("--out", tmp_path / "out", "--page", tmp_path / "docs/page.md", "--processes", "1")
    return CliRunner().invoke(command.app, [str(word) for word in (*words, *to)])


def test_the_command_writes_a_page_and_carries_on(tmp_path):
    words = ("--only", "timm/test_v*t", "--recipes", "wa,gn+ws")
    result = run(tmp_path, *words)
    assert result.exit_code == 0, result.output
    assert "passed: 2\nrefused: 0\ndiverges: 0\nfailed: 0" in result.stdout
    assert "2 pairs of architecture and recipe to examine." in result.stderr
    text = (tmp_path / "docs/page.md").read_text()
    assert "| timm | vision_transformer: vit | test_vit | passed | - | passed |" in text
    command = (
        "    python -m filterwise.lab.compatibility --only 'timm/test_v*t' --recipes wa,gn+ws\n"
    )
    assert command in text
    lines = (tmp_path / "out/pairs.jsonl").read_text().splitlines()
    assert {json.loads(line)["outcome"] for line in lines} == {"passed"}
    again = run(tmp_path, *words)
    assert again.exit_code == 0
    assert "0 pairs of architecture and recipe to examine." in again.stderr
    assert (tmp_path / "out/pairs.jsonl").read_text().splitlines() == lines


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--only", "timm/nothing"), "--only 'timm/nothing' matches none of"),
        (("--recipes", "wa,ws2"), "--recipes: 'ws2' is none of gn+ws, bn+ws, wa"),
        (("--all", "--sample"), "give one of --sample, --families, --all and --only"),
    ],
)
def test_wrong_use_is_one_line(tmp_path, words, said):
    result = run(tmp_path, *words)
    assert result.exit_code == 2
    assert said in result.stderr
    assert "Traceback" not in result.output


def test_two_commands_on_one_folder(tmp_path):
    with Records(tmp_path / "out").claim():
        result = run(tmp_path, "--only", "timm/test_vit")
    assert result.exit_code == 2
    assert "another command is at work" in result.stderr
