"""Whoever fuses a norm into a raw weight is refused, or found, or leaves the layer alone."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.fx.experimental.optimization
from torch import nn
from torch.ao import quantization
from torch.nn.utils import fusion

import filterwise as fw
from filterwise.errors import ConversionError
from filterwise.guard import MERGERS
from support.compare import relative_error
from support.fingerprint import fingerprint

RECIPES = ["bn+ws", "bn+wa", "bn+pws", "keep+wn"]


def network(recipe: str = "bn+ws") -> nn.Sequential:
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 4, 1),
    )
    fw.convert_(model, recipe)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
                module.weight.uniform_(0.5, 2)
            if hasattr(module, "gain"):
                module.gain.uniform_(0.5, 2)
    return model.eval()


def fuse_conv_bn_eval(model):
    model[3] = fusion.fuse_conv_bn_eval(model[3], model[4])
    model[4] = nn.Identity()
    return model


def fuse_conv_bn_weights(model):
    layer, norm = model[3], model[4]
    layer.weight, layer.bias = fusion.fuse_conv_bn_weights(
        layer.weight,
        layer.bias,
        norm.running_mean,
        norm.running_var,
        norm.eps,
        norm.weight,
        norm.bias,
    )
    model[4] = nn.Identity()
    return model


def in_place(model):
    """What the last one does, written past the door: the write that nothing can refuse."""
    layer, norm = model[3], model[4]
    weight, bias = fusion.fuse_conv_bn_weights(
        layer.weight,
        None,
        norm.running_mean,
        norm.running_var,
        norm.eps,
        norm.weight,
        norm.bias,
    )
    with torch.no_grad():
        layer.weight.copy_(weight)
    layer.bias, model[4] = bias, nn.Identity()
    return model


def fuse_modules(model):
    return quantization.fuse_modules(model, [["3", "4"]])


def fuse_modules_with_relu(model):
    return quantization.fuse_modules(model, [["0", "1", "2"], ["3", "4", "5"]])


def fuse_by_fx(model):
    return torch.fx.experimental.optimization.fuse(model)


REFUSED = {
    fuse_conv_bn_eval: (ConversionError, "would be normalized again"),
    fuse_conv_bn_weights: (ConversionError, "would be normalized again"),
    fuse_modules: (AssertionError, "did not find fuser method"),
    fuse_modules_with_relu: (AssertionError, "did not find fuser method"),
}
EVERY = [*REFUSED, fuse_by_fx]


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("fuse", REFUSED, ids=lambda fuse: fuse.__name__)
def test_torchs_own_are_refused_and_the_model_is_as_it_was(fuse, recipe):
    model = network(recipe)
    before = fingerprint(model)
    error, words = REFUSED[fuse]
    with pytest.raises(error, match=words):
        fuse(model)
    assert fingerprint(model) == before


@pytest.mark.parametrize("recipe", RECIPES)
def test_symbolic_fusion_leaves_converted_layers_alone(recipe):
    model = network(recipe)
    x = torch.randn(2, 3, 8, 8)
    assert relative_error(fuse_by_fx(model)(x), model(x)) < 1e-6


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("fuse", EVERY, ids=lambda fuse: fuse.__name__)
def test_a_folded_model_can_be_fused_by_all_of_them(fuse, recipe):
    model = network(recipe)
    x = torch.randn(2, 3, 8, 8)
    plain = fuse(fw.fold(model))
    assert relative_error(plain(x), model(x)) < 1e-6
    assert relative_error(fw.fold(model, bn=True)(x), model(x)) < 1e-6


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_factor_written_in_place_is_found(recipe):
    model = network(recipe)
    x = torch.randn(2, 3, 8, 8)
    assert not [one for one in fw.check(model) if "Identity" in one.fix + one.what]
    fused = in_place(copy.deepcopy(model))
    assert relative_error(fused(x), model(x)) > 0.1
    (finding,) = (one for one in fw.check(fused) if one.layer == "3")
    assert finding.level == "warning"
    assert "fold(model, bn=True)" in finding.fix


class Merging(nn.Module):
    """A block as LeViT and RepVGG have them, and a method of the same name that fuses features."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, bias=False)
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x):
        return self.norm(self.conv(x))

    @torch.no_grad()
    def fuse(self):
        return fusion.fuse_conv_bn_eval(nn.Conv2d(4, 8, 3).eval(), self.norm)

    def reparameterize(self, *, deep=False):
        raise AssertionError(f"the module's own method ran, {deep=}")

    def switch_to_deploy(self, features):
        return features


def test_methods_that_merge_are_refused_until_folded_or_unconverted():
    model = nn.Sequential(Merging(), nn.Sequential(nn.Conv2d(8, 4, 1)))
    before = fingerprint(model)
    fw.convert_(model, "keep+ws")
    for again in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with pytest.raises(ConversionError, match=r"0 \(Merging\)\.fuse\(\) would merge norms"):
            again[0].fuse()
        with pytest.raises(ConversionError, match=r"reparameterize\(\)"):
            again[0].reparameterize(deep=True)
        assert again[0].switch_to_deploy(3) == 3
    assert fw.check(model) == []
    folded = fw.fold(model.eval())
    assert isinstance(folded[0].fuse(), nn.Conv2d)
    assert not set(MERGERS) & set(folded[0].__dict__)
    fw.unconvert_(model.train())
    assert fingerprint(model) == before


def test_a_fault_after_the_guard_takes_it_off_again(monkeypatch):
    from filterwise import convert

    model = nn.Sequential(Merging(), nn.Conv2d(8, 4, 1))
    before = fingerprint(model)
    monkeypatch.setattr(convert, "_warn", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fw.convert_(model, "keep+ws")
    assert fingerprint(model) == before


def test_what_convert_did_not_see_is_found():
    model = Merging()
    fw.convert_(model.conv, "keep+wa", select="*")
    (finding, _) = fw.check(model)
    assert (finding.level, finding.layer) == ("warning", "")
    assert "Merging.fuse() may merge norms" in finding.what


@pytest.mark.parametrize(
    ("name", "recipe"),
    [("mobileone_s0", "bn+ws"), ("repvit_m0_9", "keep+wa")],
)
def test_timms_helper_is_refused_before_folding_and_right_after(name, recipe):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    model = timm.create_model(name, num_classes=7).eval()
    fw.convert_(model, recipe)
    x = torch.randn(1, 3, 64, 64)
    with pytest.raises(ConversionError, match=r"Call fold\(model\) first"):
        timm.utils.reparameterize_model(model)
    with torch.no_grad():
        merged = timm.utils.reparameterize_model(fw.fold(model))
        assert relative_error(merged(x), model(x)) < 1e-4


def test_torchvisions_quantizable_models_are_refused_before_folding():
    models = pytest.importorskip("torchvision.models.quantization", reason="no torchvision")
    model = models.resnet18(weights=None, quantize=False).eval()
    fw.convert_(model, "bn+ws")
    with pytest.raises(ConversionError, match="fuse_model"):
        model.fuse_model()
    x = torch.randn(1, 3, 64, 64)
    plain = fw.fold(model)
    plain.fuse_model()
    assert relative_error(plain(x), model(x)) < 1e-5
