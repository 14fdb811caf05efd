"""Weight Normalization and its centred forms: the papers, and torch's own, run side by side."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from filterwise.functional import (
    centered_weight_normalization,
    weight_centering,
    weight_normalization,
)
from support.compare import assert_close, relative_error
from support.torch_formulas import centre, directions, dot, filters, gradient

W = filters()
G = filters(mean=0.05, seed=1) * 17.0
GAIN = torch.linspace(-0.5, 2.0, 6).double()
EXACT = 1e-12


def norm(weight):
    return weight.norm(dim=1, keepdim=True)


def test_weight_normalization_and_its_gradients():
    """W_hat = g v/|v|; dL/dv = (g/|v|)(G - <G, v> v/|v|^2), dL/dg = <G, v>/|v| (section 5.1)."""
    gain = GAIN[:, None]
    assert relative_error(weight_normalization(W, GAIN), gain * W / norm(W)) < EXACT
    to_weight, to_gain = gradient(weight_normalization, G, W, GAIN)
    expected = gain / norm(W) * (G - dot(G, W) * W / norm(W).square())
    assert relative_error(to_weight, expected) < EXACT
    assert relative_error(to_gain, (dot(G, W) / norm(W))[:, 0]) < EXACT


def test_the_start_keeps_the_function():
    assert relative_error(weight_normalization(W), W) < EXACT


def test_the_eps_is_a_floor_of_the_norm():
    tiny = W * (1e-13 / norm(W))
    assert relative_error(weight_normalization(tiny, GAIN), GAIN[:, None] * tiny / 1e-12) < EXACT
    wide = weight_normalization(W, GAIN, eps=10.0)
    assert relative_error(wide, GAIN[:, None] * W / 10.0) < EXACT


LAYERS = {
    "Linear": lambda: nn.Linear(12, 6),
    "Conv1d": lambda: nn.Conv1d(4, 6, 3),
    "Conv2d": lambda: nn.Conv2d(4, 6, 3, padding=1),
    "Conv2d[g=2]": lambda: nn.Conv2d(4, 6, 3, groups=2),
    "Conv3d[g=4]": lambda: nn.Conv3d(4, 8, 2, groups=4),
}


@pytest.mark.parametrize("layer", LAYERS)
def test_torch_weight_norm_side_by_side(layer):
    """Effective weight, and what a step sees of it, equal torch's parametrization."""
    theirs = weight_norm(LAYERS[layer]().double())
    stored = theirs.parametrizations.weight
    with torch.no_grad():
        stored.original0.mul_(1.0 + 0.3 * torch.randn_like(stored.original0))
    raw, gain = stored.original1.detach().clone(), stored.original0.detach().flatten().clone()
    upstream = torch.randn_like(raw)
    (theirs.weight * upstream).sum().backward()
    assert relative_error(weight_normalization(raw, gain), theirs.weight) < EXACT
    to_weight, to_gain = gradient(weight_normalization, upstream, raw, gain)
    assert relative_error(to_weight, stored.original1.grad) < EXACT
    assert relative_error(to_gain, stored.original0.grad.flatten()) < EXACT


def test_torch_reads_transposed_weights_along_the_wrong_axis():
    """The control: torch's dim 0 of a transposed convolution is the input, no filter."""
    theirs = weight_norm(nn.ConvTranspose2d(4, 6, 3).double())
    with torch.no_grad():
        theirs.parametrizations.weight.original0.fill_(1.0)
    rows = theirs.weight.transpose(0, 1)
    ours = weight_normalization(
        theirs.parametrizations.weight.original1.transpose(0, 1), torch.ones(6)
    )
    assert relative_error(rows, ours) > 0.1


def test_data_dependent_start():
    """T = v.x/|v|, g = 1/std[t], b = -mean[t]/std[t] make the outputs standard (section 5.1)."""
    inputs = torch.randn(200, 576, dtype=torch.float64) + 0.4
    responses = inputs @ weight_normalization(W, torch.ones(6).double()).T
    gain, bias = 1 / responses.std(0), -responses.mean(0) / responses.std(0)
    out = inputs @ weight_normalization(W, gain).T + bias
    assert_close(out.mean(0), torch.zeros(6), absolute=1e-12)
    assert_close(out.std(0), torch.ones(6), relative=1e-12)


def test_centered_weight_normalization_and_its_gradients():
    """W_hat = g W_dot/|W_dot|; dL/dW = (g/|W_dot|) G_perp, dL/dg = <G, u> (section 5.2)."""
    gain, dotted = GAIN[:, None], centre(W)
    found = centered_weight_normalization(W, GAIN)
    assert relative_error(found, gain * dotted / norm(dotted)) < EXACT
    _, along, kept = directions(W, G)
    to_weight, to_gain = gradient(centered_weight_normalization, G, W, GAIN)
    assert relative_error(to_weight, gain / norm(dotted) * kept) < EXACT
    assert relative_error(to_gain, along[:, 0]) < EXACT


def test_centered_weight_normalization_starts_at_sqrt_2():
    assert_close(
        norm(centered_weight_normalization(W)), torch.tensor(2.0).double().sqrt(), relative=EXACT
    )


def test_centring_alone():
    """What an encyclopedia calls CWN: centred, not rescaled."""
    assert relative_error(weight_centering(W), centre(W)) < EXACT
    (found,) = gradient(weight_centering, G, W)
    assert relative_error(found, G - G.mean(1, keepdim=True)) < EXACT
