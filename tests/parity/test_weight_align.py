"""WeightAlign against the paper's Eq. 10 and its ablations (section 2)."""

from __future__ import annotations

import math

import pytest
import torch

from filterwise.functional import weight_align
from support.compare import assert_close, relative_error
from support.torch_formulas import centre, directions, dot, filters, gradient, std

W = filters()
G = filters(mean=0.05, seed=1) * 17.0
N = W.shape[1]
GAIN = torch.linspace(-0.5, 2.0, 6).double()
EXACT = 1e-12


def test_eq_10():
    expected = GAIN[:, None] * centre(W) / (N / 2 * (std(W).square() + 1e-10)).sqrt()
    assert relative_error(weight_align(W, GAIN), expected) < EXACT


def test_mean_0_and_variance_2_over_n():
    hat = weight_align(W, GAIN, eps=0.0)
    assert_close(hat.mean(1), torch.zeros(6), absolute=1e-15)
    assert_close(std(hat)[:, 0].square(), 2 * GAIN.square() / N, relative=EXACT)


def test_gain_starts_at_1():
    assert relative_error(weight_align(W), weight_align(W, torch.ones(6).double())) == 0.0


def test_table_iv_centre_only_and_scale_only():
    gain = GAIN[:, None]
    centred = weight_align(W, GAIN, divide=False)
    assert relative_error(centred, gain * centre(W)) < EXACT
    scaled = weight_align(W, GAIN, centre=False, eps=0.0)
    assert relative_error(scaled, gain * W * (2 / N) ** 0.5 / std(W)) < EXACT
    kept = gain * W.mean(1, keepdim=True) * (2 / N) ** 0.5 / std(W)
    assert_close(scaled.mean(1, keepdim=True), kept, relative=EXACT)


@pytest.mark.parametrize("factor", [0.2, 0.5, 2.0, 4.0])
def test_scale_factor_ablation_divides_the_weight(factor):
    hat = weight_align(W, factor=factor, eps=0.0)
    assert_close(
        std(hat)[:, 0].square() * N * factor**2 / 2, torch.ones(6).double(), relative=EXACT
    )


def test_the_preserving_constant():
    """1.7128585504 = sqrt(2/(1 - 1/pi)) in place of sqrt 2: 21.12 % more."""
    ratio = weight_align(W, constant="preserving") / weight_align(W)
    assert math.sqrt(2) * float(ratio.mean()) == pytest.approx(1.7128585504, abs=1e-10)


@pytest.mark.parametrize("eps", [0.0, 1e-10, 1e-3])
def test_gradients(eps):
    """dL/dw = g sqrt(2/n)/sqrt(V + eps) (G_perp + rho <G,u> u), dL/dg = <G, w_hat>/g."""
    u, along, kept = directions(W, G)
    variance = std(W).square()
    rho = eps / (variance + eps)
    factor = GAIN[:, None] * (2 / N) ** 0.5 / (variance + eps).sqrt()
    to_weight, to_gain = gradient(lambda w, g: weight_align(w, g, eps=eps), G, W, GAIN)
    assert relative_error(to_weight, factor * (kept + rho * along * u)) < EXACT
    assert relative_error(to_gain, dot(G, weight_align(W, eps=eps))[:, 0]) < EXACT
    if eps == 0.0:
        assert relative_error(to_gain, math.sqrt(2) * along[:, 0]) < EXACT


def test_at_a_gain_of_0_the_gain_moves_first():
    zero = torch.zeros(6).double()
    to_weight, to_gain = gradient(lambda w, g: weight_align(w, g, eps=0.0), G, W, zero)
    assert not to_weight.any()
    assert relative_error(to_gain, math.sqrt(2) * directions(W, G)[1][:, 0]) < EXACT


def test_second_moment_of_a_patch_over_orders_of_the_filter():
    """E[x^2] = n V s_y^2 exactly, over all 720 orders of six weights (section 2.3)."""
    from itertools import permutations

    hat = weight_align(filters(1, 6, mean=1.0, seed=5), eps=0.0)[0]
    patch = filters(1, 6, mean=2.0, seed=6)[0]
    squares = [float((hat[list(order)] @ patch) ** 2) for order in permutations(range(6))]
    expected = 2.0 * float(patch.var())
    assert math.fsum(squares) / len(squares) == pytest.approx(expected, rel=1e-12)
