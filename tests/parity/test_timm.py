"""timm's standardized convolutions, run side by side: outputs and gradients, plain and grouped."""

from __future__ import annotations

import pytest
import torch
from timm.layers import ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame
from torch import nn
from torch.nn import functional as F

from filterwise import functional as fw
from filterwise.methods.scaled_weight_standardization import ScaledWeightStandardization
from filterwise.methods.weight_standardization import WeightStandardization
from support.compare import relative_error

LAYOUTS = {"plain": (12, 8, 1), "g=2": (12, 8, 2), "g=4": (12, 16, 4)}


def run(layer, x, weight, gain=None):
    """Return output and gradients of a layer and of the plain convolution with our weight."""
    out = layer(x)
    upstream = torch.randn_like(out)
    wanted = [layer.weight] if gain is None else [layer.weight, layer.gain]
    theirs = torch.autograd.grad(out, wanted, upstream)
    ours = F.conv2d(
        x, weight, layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups
    )
    leaves = [layer.weight] if gain is None else [layer.weight, gain]
    return out, theirs, ours, torch.autograd.grad(ours, leaves, upstream)


@pytest.mark.parametrize("eps", [1e-6, 1e-8])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_std_conv2d(layout, eps):
    channels, filters, groups = LAYOUTS[layout]
    layer = StdConv2d(channels, filters, 3, stride=2, groups=groups, eps=eps).double()
    x = torch.randn(2, channels, 7, 7, dtype=torch.float64)
    name = {1e-6: "timm", 1e-8: "timm_bit"}[eps]
    options = WeightStandardization.presets[name]
    hat = fw.weight_standardization(layer.weight, **options)
    out, theirs, ours, found = run(layer, x, hat)
    assert relative_error(ours, out) < 1e-12
    assert relative_error(found[0], theirs[0]) < 1e-11


@pytest.mark.parametrize("layout", LAYOUTS)
def test_scaled_std_conv2d(layout):
    """Timm's gain is (O, 1, 1, 1) and its gamma the public constant."""
    channels, filters, groups = LAYOUTS[layout]
    options = dict(ScaledWeightStandardization.presets["timm"])
    gamma = 1.7139588594436646
    layer = ScaledStdConv2d(channels, filters, 3, groups=groups, gamma=gamma, eps=1e-5).double()
    with torch.no_grad():
        layer.gain.mul_(1 + 0.3 * torch.randn_like(layer.gain))
        layer.bias.normal_()
    gain = layer.gain.detach().flatten().clone().requires_grad_()
    x = torch.randn(2, channels, 7, 7, dtype=torch.float64)
    hat = fw.scaled_weight_standardization(layer.weight, gain, **options)
    out, theirs, ours, found = run(layer, x, hat, gain)
    assert relative_error(ours, out) < 1e-12
    assert relative_error(found[0], theirs[0]) < 1e-11
    assert relative_error(found[1], theirs[1].flatten()) < 1e-11


@pytest.mark.parametrize("layer", [StdConv2dSame, ScaledStdConv2dSame])
def test_same_padding_has_the_same_weight(layer):
    layer = layer(12, 8, 3, stride=2).double()
    scaled = isinstance(layer, ScaledStdConv2dSame)
    hat = (
        fw.scaled_weight_standardization(
            layer.weight, layer.gain.flatten(), activation="identity", eps=1e-6, floor=False
        )
        if scaled
        else fw.weight_standardization(layer.weight, eps=1e-6, eps_inside=True)
    )
    x = torch.randn(2, 12, 7, 7, dtype=torch.float64)
    padded = F.pad(x, (1, 1, 1, 1))
    assert relative_error(F.conv2d(padded, hat, layer.bias, 2), layer(x)) < 1e-12


def test_a_converted_convolution_equals_theirs():
    """`convert_(model, "ws(like=timm)")` on a plain convolution computes StdConv2d."""
    from filterwise import convert_

    theirs = StdConv2d(12, 8, 3, padding=1, bias=True).double()
    ours = nn.Conv2d(12, 8, 3, padding=1).double()
    ours.load_state_dict(theirs.state_dict())
    model = nn.Sequential(ours, nn.GroupNorm(2, 8), nn.Flatten(), nn.Linear(72, 2)).double()
    convert_(model, "keep+ws(like=timm)")
    x = torch.randn(2, 12, 3, 3, dtype=torch.float64)
    assert relative_error(model[0](x), theirs(x)) < 1e-12
