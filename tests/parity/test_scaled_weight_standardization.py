"""Scaled Weight Standardization: NFNet's form, and the gains by quadrature (section 5.3)."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import integrate, stats

from filterwise.functional import scaled_weight_standardization as sws
from filterwise.methods.activation_gain import ACTIVATIONS, activation_gain
from support.activations import activation_moments
from support.compare import relative_error
from support.torch_formulas import centre, filters, gradient, std

W = filters()
G = filters(mean=0.05, seed=1) * 17.0
N = W.shape[1]
GAIN = torch.linspace(-0.5, 2.0, 6).double()
RELU = 1 / math.sqrt(0.5 - 1 / (2 * math.pi))
EXACT = 1e-12

TABLE = {
    "identity": (1.00000000, 0.0, 1.0),
    "relu": (1.71285855, 0.39894228, 0.34084506),
    "leaky_relu": (1.70483163, 0.39495286, 0.34406224),
    "leaky_relu_0.2": (1.54646006, 0.31915382, 0.41814084),
    "prelu": (1.50460964, 0.29920671, 0.44172534),
    "relu6": (1.71285855, 0.39894228, 0.34084506),
    "relu_squared": (0.89442719, 0.5, 1.25),
    "elu": (1.27084342, 0.16052057, 0.61917856),
    "celu": (1.27084342, 0.16052057, 0.61917856),
    "selu": (1.00000000, 0.0, 1.0),
    "gelu": (1.70092624, 0.28209479, 0.34564401),
    "gelu_tanh": (1.70091656, 0.28203859, 0.34564795),
    "silu": (1.78718722, 0.20662096, 0.31308330),
    "mish": (1.59202538, 0.24040389, 0.39454816),
    "hardswish": (1.81387147, 0.16621670, 0.30393938),
    "softplus": (1.91912598, 0.80605918, 0.27151450),
    "logsigmoid": (1.91912598, -0.80605918, 0.27151450),
    "sigmoid": (4.80131337, 0.5, 0.04337904),
    "hardsigmoid": (6.01503449, 0.5, 0.02763909),
    "tanh": (1.59253742, 0.0, 0.39429449),
    "hardtanh": (1.39203614, 0.0, 0.51605855),
    "softsign": (2.33753336, 0.0, 0.18301402),
}
"""Section 5.3: gamma, mean, variance."""


def test_every_activation_is_in_the_table():
    assert {*ACTIVATIONS, "leaky_relu_0.2"} == set(TABLE)


@pytest.mark.parametrize("name", TABLE)
def test_gains_by_quadrature(name):
    """Against the table, and against quadrature at 25 digits of functions written here."""
    gain, mean, variance = TABLE[name]
    first, second, expected = activation_moments(name)
    assert first == pytest.approx(mean, abs=6e-9)
    assert second == pytest.approx(variance, abs=6e-9)
    assert expected == pytest.approx(gain, abs=6e-9)
    assert activation_gain(name) == pytest.approx(expected, rel=1e-10)


def test_a_gain_by_scipy_of_torchs_own_function():
    def moment(power):
        def integrand(z):
            value = torch.nn.functional.silu(torch.tensor(z, dtype=torch.float64)).item()
            return value**power * stats.norm.pdf(z)

        return integrate.quad(integrand, -12, 12, epsabs=1e-12, epsrel=1e-12)[0]

    assert activation_gain("silu") == pytest.approx((moment(2) - moment(1) ** 2) ** -0.5, rel=1e-9)


@pytest.mark.parametrize("slope", [0.01, 0.1, 0.5])
def test_leaky_gains_in_closed_form(slope):
    expected = ((1 + slope**2) / 2 - (1 - slope) ** 2 / (2 * math.pi)) ** -0.5
    assert activation_gain(f"leaky_relu_{slope}") == pytest.approx(expected, rel=1e-10)


def test_public_constants_are_estimates():
    """Up to 8.6e-4 off; they are there for published checkpoints."""
    assert activation_gain("relu", public=True) == 1.7139588594436646
    assert activation_gain("gelu", public=True) == 1.7015043497085571
    assert activation_gain("silu", public=True) == 1.7881293296813965
    for name in ("relu", "gelu", "silu", "sigmoid", "selu"):
        exact, public = activation_gain(name), activation_gain(name, public=True)
        assert 1e-5 < abs(public / exact - 1) < 8.6e-4


def test_the_floor_form():
    """Gain gamma W_dot/sqrt(max(n V, eps)), the published NFNet layer with gamma in the weight."""
    expected = GAIN[:, None] * RELU * centre(W) / (N * std(W).square()).clamp_min(1e-4).sqrt()
    assert relative_error(sws(W, GAIN), expected) < 1e-10
    bare = GAIN[:, None] * centre(W) / (N * std(W).square()).sqrt()
    assert relative_error(sws(W, GAIN, activation="identity"), bare) < EXACT


def test_below_the_floor_the_map_is_linear():
    tiny = W * 1e-4
    assert float((N * std(tiny).square()).max()) < 1e-4
    gamma = activation_gain("relu")
    expected = GAIN[:, None] * gamma * centre(tiny) / 1e-2
    assert relative_error(sws(tiny, GAIN), expected) < EXACT
    (found,) = gradient(lambda w: sws(w, GAIN), G, tiny)
    assert relative_error(found, GAIN[:, None] * gamma * centre(G) / 1e-2) < EXACT


def test_the_form_with_eps_inside_the_root():
    gamma = activation_gain("gelu")
    expected = GAIN[:, None] * gamma * N**-0.5 * centre(W) / (std(W).square() + 1e-5).sqrt()
    found = sws(W, GAIN, activation="gelu", floor=False, eps=1e-5)
    assert relative_error(found, expected) < EXACT


def test_the_unbiased_form_of_public_code():
    expected = GAIN[:, None] * centre(W) / (N * W.var(1, keepdim=True)).clamp_min(1e-4).sqrt()
    assert relative_error(sws(W, GAIN, activation="identity", ddof=1), expected) < EXACT


def test_an_activation_keeps_the_variance():
    """gamma^2 Var[act(z)] = 1, so a layer after the activation answers with variance 1."""
    z = torch.randn(400_000, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    for name, function in (("relu", torch.relu), ("silu", torch.nn.functional.silu)):
        assert float((activation_gain(name) * function(z)).var()) == pytest.approx(1.0, abs=0.01)
