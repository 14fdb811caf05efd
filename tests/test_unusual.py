"""Models of unusual build: own layer classes, containers of every kind, weights that are shared.

What is expected is computed with the published formula, written out in float64.
"""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import filterwise as fw


def align(layer):
    """Return WeightAlign's effective weight, its gain times a filter of variance 2/n."""
    rows = layer.weight.detach().double().flatten(1)
    rows = rows - rows.mean(1, keepdim=True)
    rows = rows / (rows.square().mean(1, keepdim=True) + 1e-10).sqrt()
    rows = rows * math.sqrt(2 / rows.shape[1]) * layer.gain.detach().double()[:, None]
    return rows.view_as(layer.weight)


class Masked(nn.Conv2d):
    """PixelCNN's: writes zeros into its weight before each use."""

    def __init__(self):
        super().__init__(8, 8, 3, padding=1)
        mask = torch.ones(8, 8, 3, 3)
        mask[:, :, 1, 1:] = mask[:, :, 2:] = 0
        self.register_buffer("mask", mask)

    def forward(self, x):
        self.weight.data *= self.mask
        return super().forward(x)

    def expected(self, x, w):
        return F.conv2d(x, w * self.mask, self.bias.double(), padding=1)


class Slimmable(nn.Conv2d):
    """Takes as many of its filters and channels as the width asks for."""

    def __init__(self):
        super().__init__(8, 8, 3, padding=1)
        self.width = 6

    def forward(self, x):
        weight = self.weight[: self.width, : x.shape[1]]
        y = F.conv2d(x, weight, self.bias[: self.width], padding=1)
        return F.pad(y, (0, 0, 0, 0, 0, 8 - self.width))

    def expected(self, x, w):
        y = F.conv2d(x, w[:6], self.bias[:6].double(), padding=1)
        return F.pad(y, (0, 0, 0, 0, 0, 2))


class Equalized(nn.Conv2d):
    """StyleGAN's: scales its weight by a number of its own."""

    def __init__(self):
        super().__init__(8, 8, 3, padding=1)

    def forward(self, x):
        return self._conv_forward(x, self.weight * 0.5, self.bias)

    def expected(self, x, w):
        return F.conv2d(x, w * 0.5, self.bias.double(), padding=1)


class ByMethod(nn.Conv2d):
    """Reads its weight through a method, from the dictionary of parameters, flipped."""

    def __init__(self):
        super().__init__(8, 8, 3, padding=1)

    def turned(self):
        return self._parameters["weight"].flip(-1)

    def forward(self, x):
        return F.conv2d(
            x, self.turned(), next(b for n, b in self.named_parameters() if n == "bias"), padding=1
        )

    def expected(self, x, w):
        return F.conv2d(x, w.flip(-1), self.bias.double(), padding=1)


class Twice(nn.Conv2d):
    """Calls its own class's forward twice, the second time on what came out."""

    def __init__(self):
        super().__init__(8, 8, 3, padding=1)

    def forward(self, x):
        return super().forward(F.relu(super().forward(x)))

    def expected(self, x, w):
        x = F.relu(F.conv2d(x, w, self.bias.double(), padding=1))
        return F.conv2d(x, w, self.bias.double(), padding=1)


class Overridden(nn.Conv2d):
    """Puts its work into torch's inner method, as partial convolutions do."""

    def __init__(self):
        super().__init__(8, 8, 3, padding=1)

    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(input, weight, None) * 2 + bias.view(-1, 1, 1)

    def expected(self, x, w):
        return F.conv2d(x, w, padding=1) * 2 + self.bias.double().view(-1, 1, 1)


class AsMatrix(nn.Conv2d):
    """Unfolds its input and multiplies with its weight as a matrix."""

    def __init__(self):
        super().__init__(8, 8, 3, padding=1)

    def forward(self, x):
        columns = F.unfold(x, 3, padding=1)
        return (self.weight.flatten(1) @ columns).view_as(x) + self.bias.view(-1, 1, 1)

    def expected(self, x, w):
        return F.conv2d(x, w, self.bias.double(), padding=1)


@pytest.mark.parametrize(
    "make", [Masked, Slimmable, Equalized, ByMethod, Twice, Overridden, AsMatrix]
)
def test_layers_that_read_their_weight_in_their_own_way(make):
    torch.manual_seed(0)
    layer = make()
    net = nn.Sequential(layer, nn.ReLU(), nn.Conv2d(8, 2, 1))
    fw.convert_(net, "wa", select="0")
    with torch.no_grad():
        layer.gain.uniform_(0.5, 2.0)
    raw = layer.weight.detach().clone()
    x = torch.randn(2, 8, 6, 6)
    expected = layer.expected(x.double(), align(layer))
    for module in (layer, fw.fold(net, example_input=x)[0], copy.deepcopy(layer)):
        torch.testing.assert_close(module(x).double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(layer.weight, raw)
    net(x).square().sum().backward()
    assert layer.weight.grad.abs().sum() > 0
    assert layer.gain.grad.abs().sum() > 0


# Containers.


def block(inputs=8, outputs=8):
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


class MadeWhileRunning(nn.Module):
    """Puts the layers that it runs into a container that lives for one forward."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(block() for _ in range(3))
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x):
        return self.head(nn.Sequential(*self.blocks)(x))


class ByName(nn.Module):
    """Registers its layers under made-up names and finds them by these."""

    def __init__(self):
        super().__init__()
        for number in range(3):
            self.add_module(f"block_{number}", block())
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x):
        for number in range(3):
            x = getattr(self, f"block_{number}")(x)
        return self.head(x)


class ByKey(nn.Module):
    """Chooses among its layers by a key, in another order than they were registered in."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleDict({key: block() for key in "cab"})
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x):
        for key in sorted(self.blocks):
            x = self.blocks[key](x)
        return self.head(x)


class ByValues(nn.Module):
    """Decides by the numbers that pass, so that it cannot be traced."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(block() for _ in range(3))
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x):
        for one in self.blocks:
            if x.abs().max() < 1e9:
                x = one(x)
        return self.head(x)


def ran(blocks, head, x):
    """Compute the network of three blocks without norms by torch's functions, in float64."""
    for one in blocks:
        x = F.relu(F.conv2d(x, align(one[0]), one[0].bias.detach().double(), padding=1))
    return F.conv2d(x, head.weight.double(), head.bias.double())


@pytest.mark.parametrize("make", [MadeWhileRunning, ByName, ByKey, ByValues])
def test_containers_of_every_kind(make):
    torch.manual_seed(0)
    net = make()
    report = fw.convert_(net, "wa")
    assert len(report.converted) == 3
    assert not any(isinstance(module, nn.BatchNorm2d) for module in net.modules())
    assert "head" not in report.converted
    for name in report.converted:
        with torch.no_grad():
            net.get_submodule(name).gain.uniform_(0.5, 2.0)
    blocks = [module for module in net.modules() if type(module) is nn.Sequential]
    if make is ByKey:
        blocks = [net.blocks[key] for key in "abc"]
    x = torch.randn(2, 8, 6, 6)
    expected = ran(blocks, net.head, x.double())
    for model in (net, fw.fold(net, example_input=x), copy.deepcopy(net)):
        torch.testing.assert_close(model(x).double(), expected, rtol=1e-5, atol=1e-5)


# Shared weights.


class Tied(nn.Module):
    """An autoencoder whose decoder is a module of its own, on the encoder's weight."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.decoder.weight = self.encoder.weight
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x):
        return self.head(self.decoder(F.relu(self.encoder(x))))


class Behind(nn.Module):
    """The same, decoded by a function that reads the encoder's raw weight."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x):
        x = F.relu(self.encoder(x))
        return self.head(F.conv_transpose2d(x, self.encoder.weight, padding=1))


def test_a_tied_weight_is_one_parameter_with_two_gains():
    torch.manual_seed(0)
    net = Tied()
    fw.convert_(net, "wa")
    assert net.encoder.weight is net.decoder.weight
    with torch.no_grad():
        net.decoder.gain.mul_(2)
    x = torch.randn(2, 8, 6, 6)
    y = x.double()
    for layer in (net.encoder, net.decoder):
        y = F.conv2d(y, align(layer), layer.bias.detach().double(), padding=1)
        y = F.relu(y) if layer is net.encoder else y
    y = F.conv2d(y, net.head.weight.double(), net.head.bias.double())
    for model in (net, fw.fold(net), copy.deepcopy(net)):
        torch.testing.assert_close(model(x).double(), y, rtol=1e-5, atol=1e-5)
    net(x).sum().backward()
    assert [name for name, _ in net.named_parameters() if "weight" in name] == [
        "encoder.weight",
        "head.weight",
    ]


def test_a_weight_that_a_parents_code_reads_is_told():
    torch.manual_seed(0)
    net = Behind()
    fw.convert_(net, "wa", select="encoder")
    x = torch.randn(2, 8, 6, 6)
    found = [one for one in fw.check(net, input=x) if one.level == "error"]
    assert ["computes something else when folded" in one.what for one in found] == [True]
    with pytest.raises(fw.FoldError, match="reads a layer's raw"):
        fw.fold(net, example_input=x)
