"""A folded model is pruned and quantized like any plain one."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import filterwise as fw
from support.compare import assert_same, relative_error
from support.shipped import batch, network, train

# Of the output's norm: eight bits a weight and an activation, over three layers.
EIGHT_BITS = 0.1


@pytest.fixture
def folded():
    model = train(network("bn+ws")).eval()
    x = batch(9)[0]
    return fw.fold(model, bn=True), x, model(x).detach()


def test_a_folded_model_is_pruned(folded):
    """What is pruned stays pruned: nothing computes the weight from it again."""
    plain, x, _ = folded
    for layer in (plain[0], plain[3], plain[-1]):
        prune.l1_unstructured(layer, "weight", amount=0.5)
        prune.remove(layer, "weight")
        assert float(layer.weight.eq(0).float().mean()) == pytest.approx(0.5, abs=0.01)
    again = copy.deepcopy(plain)
    assert_same(again(x), plain(x))
    filters = plain[3].weight.flatten(1)
    prune.ln_structured(plain[3], "weight", amount=0.25, n=2, dim=0)
    assert int(plain[3].weight.flatten(1).abs().sum(1).eq(0).sum()) == len(filters) // 4


def test_a_converted_model_that_is_pruned_is_standardized_again_and_says_so():
    """The control: why to fold first."""
    model = train(network("bn+ws")).eval()
    prune.l1_unstructured(model[3], "weight", amount=0.5)
    zeros = model[3].weight.eq(0)
    effective = fw.functional.weight_standardization(model[3].weight)
    assert not effective[zeros].eq(0).any()


@pytest.mark.filterwarnings("ignore")  # torch says that this way will be removed
def test_a_folded_model_is_quantized_by_torch(folded):
    from torch.ao import quantization
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    plain, x, expected = folded
    mapping = quantization.get_default_qconfig_mapping("x86")
    prepared = prepare_fx(copy.deepcopy(plain), mapping, (x,))
    for step in range(3):
        prepared(batch(step)[0])
    quantized = convert_fx(prepared)
    kinds = {type(module).__name__ for module in quantized.modules()}
    assert quantized.get_submodule("3").weight().dtype == torch.qint8
    assert not any("Filterwise" in kind for kind in kinds)
    assert relative_error(quantized(x), expected) < EIGHT_BITS
    dynamic = quantization.quantize_dynamic(plain, {nn.Linear}, dtype=torch.qint8)
    assert relative_error(dynamic(x), expected) < EIGHT_BITS


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"])
def test_a_folded_model_is_quantized_by_torchao(folded, kind):
    torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    plain, x, expected = folded
    plain[-1] = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 5))
    expected = plain(x).detach()
    torchao.quantize_(plain, getattr(torchao, kind)())
    assert type(plain[-1][0].weight).__module__.startswith("torchao")
    assert relative_error(plain(x), expected) < EIGHT_BITS


@pytest.mark.filterwarnings("ignore")
def test_convolutions_of_a_folded_model_are_quantized_by_torchao(folded):
    """The way that takes an exported program: int8 convolutions."""
    pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    plain, x, expected = folded
    quantizer = x86.X86InductorQuantizer().set_global(
        x86.get_default_x86_inductor_quantization_config()
    )
    prepared = prepare_pt2e(torch.export.export(plain, (x,)).module(), quantizer)
    prepared(x)
    quantized = convert_pt2e(prepared)
    targets = [str(node.target) for node in quantized.graph.nodes]
    assert sum("dequantize_per_channel" in target for target in targets) == 3
    assert relative_error(quantized(x), expected) < EIGHT_BITS
