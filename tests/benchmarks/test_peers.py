"""Other people's forms against their published formulas, written out in float64 with numpy."""

from __future__ import annotations

import numpy
import pytest
import torch
from timm.layers import StdConv2d
from torch import nn

WEIGHT = torch.randn(6, 5, 3, 3, dtype=torch.float64) * 0.03 + 0.01
FORMULAS = {
    "official": lambda c, n: c / (((c**2).sum(1, keepdims=True) / (n - 1)) ** 0.5 + 1e-5),
    "timm": lambda c, n: c / ((c**2).sum(1, keepdims=True) / n + 1e-6) ** 0.5,
    "composer": lambda c, n: c / ((c**2).sum(1, keepdims=True) / n + 1e-10) ** 0.5,
    "layer-norm": lambda c, n: c / ((c**2).sum(1, keepdims=True) / n + 1e-5) ** 0.5,
}


def published(name, weight):
    rows = weight.numpy().reshape(len(weight), -1)
    centred = rows - rows.sum(1, keepdims=True) / rows.shape[1]
    return FORMULAS[name](centred, rows.shape[1]).reshape(weight.shape)


@pytest.mark.parametrize("name", FORMULAS)
def test_a_form_is_its_published_formula(name):
    from harness.peers import FORMS

    found = FORMS[name](WEIGHT).numpy()
    expected = published(name, WEIGHT)
    assert abs(found - expected).max() < 1e-12 * abs(expected).max()
    others = [published(other, WEIGHT) for other in FORMULAS if other != name]
    # The control: the test can tell the forms apart.
    assert all(abs(found - other).max() > 1e-6 * abs(expected).max() for other in others)


@pytest.mark.parametrize("name", FORMULAS)
def test_an_installed_layer_convolves_with_it(name):
    from harness.peers import install

    model = nn.Sequential(nn.Conv2d(5, 6, 3, stride=2, padding=1, bias=True)).double()
    with torch.no_grad():
        model[0].weight.copy_(WEIGHT)
    bias = model[0].bias
    x = torch.randn(2, 5, 7, 7, dtype=torch.float64)
    expected = nn.functional.conv2d(
        x, torch.from_numpy(published(name, WEIGHT)), bias, stride=2, padding=1
    )
    assert install(model, name, ["0"]) is model
    found = model(x)
    assert numpy.allclose(found.detach(), expected.detach(), rtol=1e-12, atol=1e-12)
    (gradient,) = torch.autograd.grad(found.sum(), [next(model.parameters())])
    assert gradient.isfinite().all()


def test_timm_is_timms_own_layer():
    from harness.peers import install

    model = install(nn.Sequential(nn.Conv2d(5, 6, 3)), "timm", ["0"])
    assert type(model[0]) is StdConv2d


def test_only_plain_convolutions_take_a_peers_weight():
    from harness.peers import install

    with pytest.raises(TypeError, match="0 is a Linear, not a Conv2d"):
        install(nn.Sequential(nn.Linear(4, 4)), "official", ["0"])
