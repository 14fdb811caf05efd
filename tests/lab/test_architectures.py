"""The lab's architectures: parameter counts, conversions, starts, forwards written out again."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional
from torchvision import models

import filterwise as fw
from filterwise import host
from filterwise.lab.architectures import ARCHITECTURES, NARROWED
from filterwise.lab.errors import UsageError
from filterwise.lab.models import find_model
from filterwise.lab.nets import build, make

# The two of `filterwise compare` are tested with it, and deeper ones are made of the same blocks.
DEEP = [name for name in ARCHITECTURES if any(depth in name for depth in ("34", "101", "152"))]
SHALLOW = [name for name in ARCHITECTURES if name not in ("plain", "residual", *DEEP)]
WITH_GAIN = ("wa", "pws", "wn", "cwn", "sws", "equinorm")
METHODS = [info.name for info in fw.methods() if info.name != "ews"]
BLOCKS = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}


def count(make_net, *args, **options):
    with torch.device("meta"):
        return sum(p.numel() for p in make_net(*args, **options).parameters())


def perturbed(model, dtype=torch.float64):
    """Move every parameter from its start, so that no zero hides a term."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.to(dtype)


@pytest.mark.parametrize("depth", BLOCKS)
def test_residual_nets_are_torchvisions_but_for_the_stem(depth):
    theirs = count(models.get_model_builder(f"resnet{depth}"), num_classes=100)
    assert count(ARCHITECTURES[f"resnet{depth}_cifar"], 3, 100) == theirs - 3 * 64 * (49 - 9)


def test_resnext_nets():
    small = count(models.resnext50_32x4d, num_classes=10) - 3 * 64 * (49 - 9)
    assert count(ARCHITECTURES["resnext50_32x4d_cifar"], 3, 10) == small
    # Xie et al., arXiv 1611.05431: 44.2 million for a thousand classes.
    assert count(ARCHITECTURES["resnext101_32x4d"], 3, 1000) == 44_177_704


@pytest.mark.parametrize("name", NARROWED)
def test_nets_with_fewer_planes_are_torchvisions_when_they_have_all(name):
    with torch.device("meta"):
        ours = NARROWED[name](3, 7, 1.0).state_dict()
        theirs = models.get_model(name, num_classes=7).state_dict()
    assert {key: value.shape for key, value in ours.items()} == {
        key: value.shape for key, value in theirs.items()
    }


def test_vgg_has_thirteen_convolutions_and_one_linear_layer():
    plan = [64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]
    planes = zip([3, *plan[:-1]], plan, strict=True)
    wanted = sum(9 * before * now + 2 * now for before, now in planes) + 512 * 100 + 100
    assert count(ARCHITECTURES["vgg16_cifar"], 3, 100) == wanted


@pytest.mark.parametrize("depth", BLOCKS)
def test_fixup_nets_have_scalars_where_resnets_have_norms(depth):
    with torch.device("meta"):
        theirs = models.get_model(f"resnet{depth}", num_classes=10)
    norms = sum(
        p.numel() for m in theirs.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()
    )
    whole = sum(p.numel() for p in theirs.parameters())
    layers = 3 if depth >= 50 else 2
    scalars = sum(BLOCKS[depth]) * (2 * layers + 1) + 2
    wanted = whole - norms - 3 * 64 * (49 - 9) + scalars
    assert count(ARCHITECTURES[f"fixup_resnet{depth}_cifar"], 3, 10) == wanted


def test_fixup_for_imagenet_has_the_large_stem():
    model = ARCHITECTURES["fixup_resnet50"](3, 10, 0.25)
    small = ARCHITECTURES["fixup_resnet50_cifar"](3, 10, 0.25)
    assert model.conv1.weight.shape[2:] == (7, 7)
    more = 3 * 16 * (7 * 7 - 3 * 3)
    counts = [sum(each.numel() for each in net.parameters()) for net in (model, small)]
    assert counts[0] == counts[1] + more
    shapes = []
    model.layer1.register_forward_hook(lambda _net, given, _out: shapes.append(given[0].shape))
    model(torch.randn(1, 3, 64, 64))
    assert shapes == [(1, 16, 16, 16)]


@pytest.mark.parametrize(
    ("name", "parameters", "published"),
    [
        ("wide_residual_20", 9_728_362, 9.7e6),
        ("preactivation_resnet152", 58_144_842, 58.1e6),
        ("pws_resnet_cifar", 594_762, 0.6e6),
        ("convpool_cnn_c", 1_370_986, 1.4e6),  # Springenberg et al.: about 1.4 million
        ("pws_plain_cifar", 1_408_234, None),
        ("wa_signal_8", 224_448, None),
        ("plain", 101_306, None),
        ("residual", 190_130, None),
    ],
)
def test_parameter_counts(name, parameters, published):
    found = count(ARCHITECTURES[name], 3, 10)
    assert found == parameters
    if published is not None:
        assert found == pytest.approx(published, rel=0.03)


def test_the_resnet_of_pws_has_biases_for_norms():
    theirs = count(models.resnet50, num_classes=1000)
    biases = 64 + sum(
        blocks * 6 * planes + 4 * planes
        for blocks, planes in zip(BLOCKS[50], (64, 128, 256, 512), strict=True)
    )
    norms = 2 * (64 + 2048)
    assert count(ARCHITECTURES["pws_resnet50"], 3, 1000) == theirs - 2 * biases + biases + norms


@pytest.mark.parametrize("name", [*SHALLOW, "plain", "residual"])
def test_a_share_of_the_planes(name):
    whole, part = count(ARCHITECTURES[name], 3, 10), count(ARCHITECTURES[name], 3, 10, 0.5)
    assert 0.2 < part / whole < 0.35
    with torch.device("meta"):
        for module in ARCHITECTURES[name](3, 10, 0.25).modules():
            if isinstance(module, nn.Conv2d) and module.out_channels != 10:
                assert module.out_channels % 8 == 0


def test_a_net_that_has_all_its_planes_only():
    with pytest.raises(UsageError, match="densenet121 is there with all its planes only"):
        make("densenet121", 3, 10, 0.5)
    with pytest.raises(UsageError, match="Nearest: resnet50"):
        make("resnet_50_cifar", 3, 10, 0.5)


def test_models_are_found_by_the_command_line():
    model, origin = find_model("pws_resnet_cifar")
    assert origin == "filterwise's lab"
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def check_conversion(name, method):
    side = 32 if name in ("pws_resnet50", "resnext101_32x4d", "vgg16_cifar") else 16
    torch.manual_seed(0)
    norm_free = name.startswith("fixup") or name == "pws_resnet50"
    model, report = build(name, method if norm_free else f"bn+{method}", 3, 10, 0.25)
    assert len(report.converted) > 6
    model(torch.rand(2, 3, side, side)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    if not norm_free or method in WITH_GAIN:
        assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", SHALLOW)
def test_every_method_converts_every_net(name, method):
    if name.startswith("fixup") and method not in WITH_GAIN:
        with pytest.raises(UsageError, match="has no gain to put Fixup's factors on"):
            build(name, method, 3, 10, 0.25)
        return
    check_conversion(name, method)


@pytest.mark.parametrize("name", DEEP)
def test_deeper_nets_convert(name):
    check_conversion(name, "wa")


@pytest.mark.parametrize(("depth", "layers"), [(18, 2), (50, 3)])
@pytest.mark.parametrize("recipe", ["none", "wa", "wn", "pws"])
def test_fixup_starts_on_gains_or_on_weights(depth, layers, recipe):
    name = f"fixup_resnet{depth}_cifar"
    torch.manual_seed(0)
    model, _ = build(name, recipe, 3, 10, 0.25)
    torch.manual_seed(0)
    plain = make(name, 3, 10, 0.25)
    factor = sum(BLOCKS[depth]) ** (-1 / (2 * layers - 2))
    weights = dict(plain.named_parameters())
    for key, module in model.named_modules():
        if not isinstance(module, nn.Conv2d):
            continue
        raw = weights[f"{key}.weight"]
        place = key.rpartition(".convs.")[2] if ".convs." in key else None
        wanted = 1.0 if place is None else 0.0 if place == str(layers - 1) else factor
        if recipe == "none":
            torch.testing.assert_close(module.weight, raw * wanted)
            continue
        torch.testing.assert_close(module.weight, raw)
        first = raw.flatten(1).norm(dim=1) if recipe == "wn" else torch.ones(len(raw))
        torch.testing.assert_close(host.gain_of(module), first * wanted)
    assert model(torch.rand(2, 3, 32, 32)).abs().max() == 0


def fixup_forward(state, blocks, layers, x):
    """The forward of the Fixup paper's figure 1 and its authors' code, from parameters by name."""
    x = functional.conv2d(x, state["conv1.weight"], padding=1) + state["bias1"]
    x = x.relu()
    for stage, number in enumerate(blocks, start=1):
        for block in range(number):
            at = f"layer{stage}.{block}."
            stride = 2 if stage > 1 and block == 0 else 1
            strided = 1 if layers == 3 else 0
            out = x
            for place in range(layers):
                weight = state[f"{at}convs.{place}.weight"]
                out = out + state[f"{at}before.{place}"]
                step = stride if place == strided else 1
                out = functional.conv2d(out, weight, stride=step, padding=weight.shape[-1] // 2)
                if place < layers - 1:
                    out = (out + state[f"{at}behind.{place}"]).relu()
            out = out * state[f"{at}scale"] + state[f"{at}behind.{layers - 1}"]
            if f"{at}downsample.weight" in state:
                shifted = x + state[f"{at}before.0"]
                x = functional.conv2d(shifted, state[f"{at}downsample.weight"], stride=stride)
            x = (out + x).relu()
    return functional.linear(x.mean((2, 3)) + state["bias2"], state["fc.weight"], state["fc.bias"])


@pytest.mark.parametrize(("depth", "layers"), [(18, 2), (50, 3)])
def test_fixup_forward(depth, layers):
    model = perturbed(make(f"fixup_resnet{depth}_cifar", 3, 10, 0.25))
    x = torch.rand(2, 3, 16, 16, dtype=torch.float64)
    wanted = fixup_forward(model.state_dict(), BLOCKS[depth], layers, x)
    torch.testing.assert_close(model(x), wanted, rtol=1e-9, atol=1e-9)


def pws_forward(state, normed, x):
    """The authors' residual net: a normed trunk, or one divided by sqrt(2), before each ReLU."""

    def norm(x, at):
        if not normed:
            return x
        return functional.batch_norm(
            x, state[f"{at}.running_mean"], state[f"{at}.running_var"],
            state[f"{at}.weight"], state[f"{at}.bias"],
        )  # fmt: skip

    def convolution(x, at, stride=1):
        weight = state[f"{at}.weight"]
        padding = weight.shape[-1] // 2
        return functional.conv2d(x, weight, state.get(f"{at}.bias"), stride, padding)

    def preactivation(x, at):
        return (norm(x, f"{at}.norm") if normed else x / math.sqrt(2)).relu()

    x = norm(convolution(x, "stem.0"), "stem.1").relu()
    for stage, last in ((1, 2), (2, 2), (3, 1)):
        for unit in range(6):
            at, stride = f"stage{stage}.{unit}", last if unit == 5 else 1
            before = preactivation(x, f"{at}.first")
            if f"{at}.shortcut.weight" in state:
                x = convolution(before, f"{at}.shortcut")
            elif stride > 1:
                x = functional.max_pool2d(x, stride, stride)
            out = norm(convolution(before, f"{at}.branch.0"), f"{at}.branch.1").relu()
            out = norm(convolution(out, f"{at}.branch.3", stride), f"{at}.branch.4").relu()
            x = x + convolution(out, f"{at}.branch.6")
    x = preactivation(x, "last").mean((2, 3), keepdim=True)
    return convolution(x, "classifier").flatten(1)


@pytest.mark.parametrize("recipe", ["none", "bn"])
def test_the_trunk_of_pws_is_divided_where_norms_are_gone(recipe):
    model, _ = build("pws_resnet_cifar", recipe, 3, 10, 0.25)
    perturbed(model.eval())
    x = torch.rand(2, 3, 16, 16, dtype=torch.float64)
    wanted = pws_forward(model.state_dict(), recipe == "bn", x)
    torch.testing.assert_close(model(x), wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("recipe", ["none", "pws", "wn", "keep"])
def test_the_two_layer_norms_of_pws_stay(recipe):
    model, _ = build("pws_resnet50", recipe, 3, 10, 0.25)
    norms = [name for name, m in model.named_modules() if isinstance(m, nn.GroupNorm)]
    assert norms == ["norm1", "norm2"]
