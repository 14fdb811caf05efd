"""OpenMMLab: a config that converts and defers, and mmcv's own layers adopted."""

from __future__ import annotations

import copy
import importlib.util
import sys

import pytest
import torch
from torch import nn

import filterwise as fw
from support.compare import assert_close, relative_error
from support.documents import ROOT

mmengine = pytest.importorskip("mmengine", reason="mmengine is not installed (extra openmmlab)")
mmcv = pytest.importorskip("mmcv", reason="mmcv-lite is not installed (extra openmmlab)")
pytestmark = pytest.mark.filterwarnings("default")  # mmengine's own


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("config", ROOT / "examples/mmengine_config.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def trained(example, folder, **changes):
    torch.manual_seed(0)
    wrapper = {**example.optim_wrapper, **changes}
    model = example.train(str(folder), optim_wrapper=wrapper, randomness={"seed": 3}).model
    return model, {name: p.detach().clone() for name, p in model.named_parameters()}


def test_the_config_converts_and_defers_with_the_same_parameters(example, tmp_path, monkeypatch):
    windows = []
    import filterwise.integrations.mmengine as ours

    real = ours.defer
    monkeypatch.setattr(
        ours, "defer", lambda m, enabled: windows.append(enabled) or real(m, enabled)
    )
    model, deferred = trained(example, tmp_path / "a")
    assert set(fw.describe(model).values()) == {"ws(ddof=1)"}
    assert windows == [True, True, True, False] * 2
    _, ordinary = trained(example, tmp_path / "b", type="OptimWrapper")
    assert len(windows) == 8
    for name, values in ordinary.items():
        assert_close(deferred[name], values, absolute=1e-5, what=name)


def test_groups_are_by_role(example, tmp_path):
    example.register()
    runner = example.train(str(tmp_path))
    decayed, free = runner.optim_wrapper.optimizer.param_groups
    assert (decayed["weight_decay"], free["weight_decay"]) == (1e-4, 0.0)
    assert len(decayed["params"]) == 3


@pytest.mark.parametrize("kind", ["ConvWS", "ConvAWS"])
def test_mmcvs_own_layers_are_adopted(kind):
    from mmcv.cnn import build_conv_layer

    layer = build_conv_layer({"type": kind}, 6, 8, 3, padding=1)
    with torch.no_grad():
        for tensor in (*layer.parameters(), *layer.buffers()):
            tensor.add_(0.3 * torch.randn_like(tensor))
    model = nn.Sequential(copy.deepcopy(layer))
    keys = list(model.state_dict())
    x = torch.randn(2, 6, 7, 7)
    expected = model(x)
    assert fw.identify(layer) is not None
    fw.adopt_(model)
    assert list(model.state_dict()) == keys
    assert relative_error(model(x), expected) < 1e-6
    assert relative_error(fw.fold(model)(x), expected) < 1e-6


def test_mmcvs_fusion_is_refused_before_folding_and_right_after():
    from mmcv.cnn import fuse_conv_bn

    model = nn.Sequential()
    model.conv, model.bn = nn.Conv2d(6, 8, 3, bias=False), nn.BatchNorm2d(8)
    fw.convert_(model, "keep+ws", select="conv")
    model(torch.randn(4, 6, 7, 7))
    model.eval()
    x = torch.randn(2, 6, 7, 7)
    expected = model(x)
    with pytest.raises(fw.ConversionError, match="would be normalized again"):
        fuse_conv_bn(copy.deepcopy(model))
    assert relative_error(fuse_conv_bn(fw.fold(model))(x), expected) < 1e-6
    assert "filterwise" in sys.modules
