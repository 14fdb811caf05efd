"""Exported files: what is in them, that they were compared, and that nothing half-made is left."""

from __future__ import annotations

import json
import os
import sys

import pytest
import torch
from torch import nn

import filterwise as fw
from filterwise import formats

pytestmark = pytest.mark.filterwarnings("ignore::filterwise.NormalizationWarning")

ENDINGS = ["onnx", "pt2", "safetensors"]


class Net(nn.Module):
    """Convolutions of three kinds, a BatchNorm and a GroupNorm, two outputs in a dictionary."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.bn = nn.BatchNorm2d(16)
        self.grouped = nn.Conv2d(16, 8, 3, groups=2, bias=False)
        self.gn = nn.GroupNorm(2, 8)
        self.up = nn.ConvTranspose2d(8, 6, 3, stride=2)
        self.head = nn.Linear(6, 5)

    def forward(self, x):
        x = torch.relu(self.bn(self.first(x)))
        features = self.up(torch.relu(self.gn(self.grouped(x))))
        return {"features": features, "out": self.head(features.mean((2, 3)))}


def network(recipe="keep+wa", **options):
    torch.manual_seed(0)
    net = Net()
    fw.convert_(net, recipe, **options)
    for _ in range(3):
        net(torch.randn(4, 3, 9, 9) + 0.3)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return net


X = torch.randn(1, 3, 9, 9, generator=torch.Generator().manual_seed(1))


def run(path, x):
    """Run a file as somebody would who has no filterwise."""
    if path.suffix == ".onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(str(path))
        names = [one.name for one in session.get_inputs()]
        return torch.from_numpy(session.run(None, {names[0]: x.numpy()})[-1])
    if path.suffix == ".pt2":
        return torch.export.load(path).module()(x)["out"]
    from safetensors.torch import load_file

    plain = Net().eval()
    plain.load_state_dict(load_file(path), strict=True)
    return plain(x)["out"]


@pytest.mark.parametrize(
    ("recipe", "ending"), [("keep+wa", one) for one in ENDINGS] + [("keep+equinorm", "pt2")]
)
def test_a_file_computes_what_the_model_computes(tmp_path, ending, recipe):
    options = {"exclude": "up"} if "equinorm" in recipe else {}
    net = network(recipe, **options)
    path = tmp_path / f"net.{ending}"
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    report = fw.export(net, path, X)
    assert net.training
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    net.eval()
    with torch.no_grad():
        out = net(X)["out"]
        torch.testing.assert_close(run(path, X), out, rtol=0, atol=1e-5 * float(out.abs().max()))
    assert (report.path, report.kind, report.size) == (path, ending, path.stat().st_size)
    assert report.folded == len(fw.describe(net))
    assert report.merged == (0 if ending == "safetensors" else 1)
    assert report.norms == (2 if ending == "safetensors" else 1)
    assert [one.shapes for one in report.comparisons] == [((1, 3, 9, 9),)] * 2
    assert all(one.passed and one.difference <= 1e-5 for one in report.comparisons)
    assert os.listdir(tmp_path) == [path.name]
    assert oct(path.stat().st_mode) == oct(touched(tmp_path).stat().st_mode)


def touched(folder):
    path = folder / "touched"
    path.touch()
    return path


def test_onnx_holds_constant_weights_and_says_what_was_folded(tmp_path):
    import onnx

    net = network()
    report = fw.export(net, tmp_path / "net.onnx", X, opset=21)
    assert "the weights of all 4 convolutions and linear layers are constants" in report.facts
    model = onnx.load(tmp_path / "net.onnx")
    onnx.checker.check_model(model, full_check=True)
    assert [one.version for one in model.opset_import if not one.domain] == [21] == [report.opset]
    properties = {one.key: one.value for one in model.metadata_props}
    assert json.loads(properties["filterwise_folded"]) == fw.describe(net)
    assert {node.op_type for node in model.graph.node} >= {"Conv", "ConvTranspose", "Gemm"}
    assert "ReduceMean" in {node.op_type for node in model.graph.node}
    computing = {"Sqrt", "ReduceSumSquare", "ReduceL2"}
    assert not computing & {node.op_type for node in model.graph.node}


def test_weights_computed_at_run_time_are_noted(tmp_path):
    import onnx
    from onnx import helper

    weight = helper.make_tensor("raw", 1, [8, 3, 3, 3], [1.0] * 216)
    nodes = [
        helper.make_node("Sqrt", ["raw"], ["computed"]),
        helper.make_node("Conv", ["x", "computed"], ["y"], name="standardizing"),
        helper.make_node("Conv", ["x", "raw"], ["z"], name="plain"),
    ]
    shapes = [helper.make_tensor_value_info(name, 1, None) for name in "xyz"]
    graph = helper.make_graph(nodes, "g", shapes[:1], shapes[1:], [weight])
    onnx.save(helper.make_model(graph), tmp_path / "net.onnx")
    _, facts, (note,) = formats._read_graph(tmp_path / "net.onnx")
    assert facts == []
    assert note.startswith("1 of 2 convolutions and linear layers compute their weight at run time")
    assert "(first: standardizing)" in note


def test_metadata_of_the_other_formats(tmp_path):
    from safetensors import safe_open

    net = network()
    fw.export(net, tmp_path / "net.safetensors", X)
    with safe_open(str(tmp_path / "net.safetensors"), framework="pt") as opened:
        header = opened.metadata()
    assert json.loads(header["filterwise"]) == {}
    assert json.loads(header["filterwise_folded"]) == fw.describe(net)
    fw.export(net, tmp_path / "net.pt2", X)
    extra = {"filterwise_folded": ""}
    torch.export.load(tmp_path / "net.pt2", extra_files=extra)
    assert json.loads(extra["filterwise_folded"]) == fw.describe(net)


@pytest.mark.parametrize("ending", ["onnx", "pt2"])
def test_any_batch(tmp_path, ending):
    net = network().eval()
    report = fw.export(net, tmp_path / f"net.{ending}", X, dynamic_batch=True)
    assert [one.shapes[0][0] for one in report.comparisons] == [2, 3, 1]
    x = torch.randn(5, 3, 9, 9)
    with torch.no_grad():
        torch.testing.assert_close(run(report.path, x), net(x)["out"], rtol=1e-4, atol=1e-5)


def test_half_precision_is_compared_with_the_model_as_it_was(tmp_path):
    net = network()
    for ending, dtype in (("onnx", torch.float16), ("pt2", torch.bfloat16)):
        report = fw.export(net, tmp_path / f"net.{ending}", X, dtype=dtype)
        assert report.dtype == str(dtype)[6:]
        assert 1e-5 < report.comparisons[0].difference < 2e-2
    assert net.first.weight.dtype == torch.float32


def test_overflow_in_half_precision_is_told_and_leaves_no_file(tmp_path):
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.GroupNorm(2, 16), nn.ReLU(), nn.Conv2d(16, 4, 1))
    fw.convert_(net, "keep+ws")
    with pytest.raises(fw.ExportError, match=r"overflows in float16, first at 0.*bfloat16"):
        fw.export(net, tmp_path / "net.pt2", 1e4 * X, dtype=torch.float16)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_file_of_another_function_is_not_kept(tmp_path, monkeypatch, ending):
    right = formats.Shipment.write

    def write(shipment, path):
        """Write a network that is slightly another one."""
        bias = shipment.model.head.bias
        with torch.no_grad():
            bias.add_(0.01)
            written = right(shipment, path)
            bias.sub_(0.01)
        return written

    monkeypatch.setattr(formats.Shipment, "write", write)
    path = tmp_path / f"net.{ending}"
    path.write_text("what was there")
    with pytest.raises(
        fw.ExportError, match=r"was not kept.*largest relative difference .*float64"
    ):
        fw.export(network(), path, X)
    assert path.read_text() == "what was there"
    assert os.listdir(tmp_path) == [path.name]


def test_a_tensor_that_the_file_lacks_is_seen(tmp_path, monkeypatch):
    import safetensors.torch

    right = safetensors.torch.save_file

    def save(tensors, path, metadata):
        tensors.pop("up.bias")
        right(tensors, path, metadata)

    monkeypatch.setattr(safetensors.torch, "save_file", save)
    with pytest.raises(fw.ExportError, match=r"cannot be loaded again: .*up.bias"):
        fw.export(network(), tmp_path / "net.safetensors", X)
    assert os.listdir(tmp_path) == []


def test_tied_and_strided_weights_are_whole_in_safetensors(tmp_path):
    net = nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
    net[2].weight = net[0].weight
    fw.convert_(net, "ws", select="*")
    net.to(memory_format=torch.channels_last)
    report = fw.export(net, tmp_path / "net.safetensors", torch.randn(1, 8, 7, 7))
    assert "all 4 tensors of the folded model's state are in it" in report.facts


class Cancelling(nn.Module):
    """Loses four digits: what float32 gives of it is mostly rounding."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(3, 16, 3)
        self.bn = nn.BatchNorm2d(16)

    def forward(self, x):
        return self.bn(self.layer(x)) + 1e4 - 1e4


def test_rounding_of_an_ill_conditioned_model_is_told_from_error(tmp_path):
    net = Cancelling()
    fw.convert_(net, "keep+wa", select="layer")
    nn.init.normal_(net.bn.weight)
    report = fw.export(net, tmp_path / "net.pt2", X)
    worst = max(report.comparisons, key=lambda one: one.difference)
    assert worst.difference > 1e-5
    assert worst.passed
    assert "in torch has" in str(report)
    assert str(worst).endswith(": rounding")


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("net.pth", {}, "does not end in one of .onnx, .pt2, .safetensors"),
        ("no/net.pt2", {}, "there is no folder"),
        ("net.pt2", {"opset": 18}, "opset is for .onnx only"),
    ],
)
def test_wrong_use_is_refused_before_anything_is_done(tmp_path, name, options, words):
    with pytest.raises(fw.ExportError, match=words):
        fw.export(network(), tmp_path / name, X, **options)
    with pytest.raises(fw.ExportError, match="a tensor or a tuple of tensors, got list"):
        fw.export(network(), tmp_path / "net.pt2", [X])


def test_a_model_that_does_not_export_says_why(tmp_path):
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Conv2d(3, 16, 3)

        def forward(self, x):
            x = self.layer(x)
            return x if x.sum() > 0 else -x

    net = Branching()
    fw.convert_(net, "wa", select="*")
    for ending in ("pt2", "onnx"):
        with pytest.raises(fw.ExportError, match="cannot export the folded model") as found:
            fw.export(net, tmp_path / f"net.{ending}", X)
        assert len(str(found.value)) < 600
    assert os.listdir(tmp_path) == []


def test_without_the_extra_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(fw.ExportError, match=r"needs onnxruntime.*filterwise\[export\]"):
        fw.export(network(), tmp_path / "net.onnx", X)
    fw.export(network(), tmp_path / "net.pt2", X)


def test_a_full_disk_is_told(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(fw.ExportError, match=r"net.pt2 cannot be written: No space left on device"):
        fw.export(network(), tmp_path / "net.pt2", X)
    assert os.listdir(tmp_path) == []


def test_the_report_reads_as_text_and_as_data(tmp_path):
    report = fw.export(network(), tmp_path / "net.pt2", X)
    text = str(report)
    assert "pt2, float32" in text
    assert "folded: 3 layers; BatchNorms merged: 1; norms that stay: 1" in text
    assert "2 x input 1x3x9x9: largest relative difference" in text
    data = json.loads(json.dumps(report.to_dict()))
    assert data["comparisons"][0]["limit"] == 1e-5
    assert data["path"] == str(report.path)
