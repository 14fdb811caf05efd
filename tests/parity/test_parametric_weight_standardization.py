"""Parametric Weight Standardization against the paper's Eqs. 12 and 13 (section 3)."""

from __future__ import annotations

import pytest
import torch

from filterwise.functional import parametric_weight_standardization as pws
from support.compare import assert_close, relative_error
from support.torch_formulas import centre, directions, dot, filters, gradient, he_filters, std

W = filters()
G = filters(mean=0.05, seed=1) * 17.0
N = W.shape[1]
ALPHA = torch.linspace(-0.5, 2.0, 6).double()
EXACT = 1e-12

GAMMAS = {
    "relative": 0.1 * 2 / N,
    "large": 1e-3,
    "medium": 1e-4,
    "small": 1e-5,
    "none": 0.0,
    "0.3*2/n": 0.3 * 2 / N,
    0.02: 0.02,
}


@pytest.mark.parametrize("gamma", GAMMAS)
def test_eq_12(gamma):
    expected = ALPHA[:, None] * (2 / N) ** 0.5 * centre(W)
    expected = expected / (std(W).square() + GAMMAS[gamma]).sqrt()
    assert relative_error(pws(W, ALPHA, gamma=gamma), expected) < EXACT


def test_squared_norm():
    """|K|^2 = 2 alpha^2 V/(V + gamma)."""
    variance = std(W)[:, 0].square()
    expected = 2 * ALPHA.square() * variance / (variance + 1e-3)
    assert_close(pws(W, ALPHA, gamma=1e-3).square().sum(1), expected, relative=EXACT)


@pytest.mark.parametrize("gamma", [0.0, 1e-5, 1e-3])
def test_eq_13_as_corrected(gamma):
    """dL/dW = alpha c0 (G - G_bar - (1/2) <G, W_hat> W_hat), and its form in directions."""
    hat = pws(W, gamma=gamma)
    variance = std(W).square()
    outside = ALPHA[:, None] * (2 / N) ** 0.5 / (variance + gamma).sqrt()
    corrected = outside * (G - G.mean(1, keepdim=True) - 0.5 * dot(G, hat) * hat)
    u, along, kept = directions(W, G)
    rho = gamma / (variance + gamma)
    to_weight, to_alpha = gradient(lambda w, a: pws(w, a, gamma=gamma), G, W, ALPHA)
    assert relative_error(to_weight, corrected) < EXACT
    assert relative_error(to_weight, outside * (kept + rho * along * u)) < EXACT
    assert relative_error(to_alpha, dot(G, hat)[:, 0]) < EXACT
    assert_close(to_weight.mean(1), torch.zeros(6), absolute=1e-13 * float(to_weight.norm()))


def test_eq_13_as_printed_is_another_gradient():
    """The control: the factor 1/n belongs to W_dot/sqrt(V + gamma), not to W_hat of Eq. 12."""
    hat = pws(W, gamma=0.0)
    outside = (2 / N) ** 0.5 / std(W)
    printed = outside * (G - G.mean(1, keepdim=True) - dot(G, hat) * hat / N)
    (found,) = gradient(lambda w: pws(w, gamma=0.0), G, W)
    assert relative_error(printed, found) > 1e-2


def test_the_mean_is_zero_because_of_the_centring():
    """Without it the mean of the gradient would be c0 G_bar."""
    (found,) = gradient(lambda w: pws(w, gamma=1e-3), G, W)
    c0 = (2 / N) ** 0.5 / (std(W).square() + 1e-3).sqrt()
    uncentred = found.mean(1, keepdim=True) + c0 * G.mean(1, keepdim=True)
    assert float(uncentred.abs().max()) > 1e3 * float(found.mean(1).abs().max())


def test_a_step_in_the_raw_weight_moves_the_effective_one_by_m():
    """DK = -eta alpha^2 M (G_perp + rho^2 <G, u> u) to first order, M = (2/n)/(V + gamma)."""
    gamma = 1e-3
    u, along, kept = directions(W, G)
    variance = std(W).square()
    rho, m = gamma / (variance + gamma), (2 / N) / (variance + gamma)
    (push,) = gradient(lambda w: pws(w, ALPHA, gamma=gamma), G, W)
    _, moved = torch.autograd.functional.jvp(lambda w: pws(w, ALPHA, gamma=gamma), W, push)
    expected = ALPHA.square()[:, None] * m * (kept + rho.square() * along * u)
    assert relative_error(moved, expected) < EXACT


@pytest.mark.parametrize(
    ("fan_in", "gamma", "left"),
    [
        (27, 1e-3, 0.9867),
        (64, 1e-3, 0.9690),
        (576, 1e-3, 0.7764),
        (1152, 1e-3, 0.6345),
        (4608, 1e-3, 0.3027),
        (4608, 1e-5, 0.9775),
        (576, "relative", 1 / 1.1),
        (4608, "relative", 1 / 1.1),
    ],
)
def test_fraction_of_the_nominal_variance_left(fan_in, gamma, left):
    """The table of section 3.4: an absolute gamma damps large filters, a relative one all alike."""
    weight = he_filters(2, fan_in)
    found = std(pws(weight, gamma=gamma)).square() * fan_in / 2
    assert_close(found, torch.tensor(left), absolute=6e-5)
