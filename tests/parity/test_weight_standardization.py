"""Weight Standardization against the paper's equations, as corrected (sections 1.1 to 1.5)."""

from __future__ import annotations

import pytest
import torch

from filterwise.functional import weight_standardization
from support.compare import assert_close, relative_error
from support.torch_formulas import centre, directions, dot, filters, gradient, he_filters, std

W = filters()
G = filters(mean=0.05, seed=1) * 17.0
N = W.shape[1]
EXACT = 1e-12


def test_eq_2_outside_and_inside():
    for eps in (1e-5, 1e-2, 0.0):
        outside = centre(W) / (std(W) + eps)
        inside = centre(W) / (std(W).square() + eps).sqrt()
        assert relative_error(weight_standardization(W, eps=eps), outside) < EXACT
        assert relative_error(weight_standardization(W, eps=eps, eps_inside=True), inside) < EXACT


def test_eqs_5_and_6_the_ablations():
    mean_square = W.square().mean(1, keepdim=True)
    cases = {
        "mean only": ({"divide": False}, centre(W)),
        "divide only": ({"centre": False}, W / (mean_square.sqrt() + 1e-5)),
        "central": ({"centre": False, "moment": "central"}, W / (std(W) + 1e-5)),
        "unbiased": ({"ddof": 1}, centre(W) / (W.std(1, keepdim=True) + 1e-5)),
        "fan_in": ({"scale": "fan_in"}, centre(W) / (std(W) + 1e-5) / N**0.5),
    }
    for name, (options, expected) in cases.items():
        assert relative_error(weight_standardization(W, **options), expected) < EXACT, name


def test_affine_has_a_gain_and_an_offset_per_filter():
    a, b = torch.linspace(0.5, 2.0, 6).double(), torch.linspace(-1.0, 1.0, 6).double()
    plain = centre(W) / (std(W) + 1e-5)
    found = weight_standardization(W, a, offset=b, affine=True)
    assert relative_error(found, a[:, None] * plain + b[:, None]) < EXACT


def closed_form(weight, upstream, eps, *, inside):
    """Return corrected Eqs. 8 and 9 with eps (section 1.2)."""
    sigma = std(weight)
    below = (sigma.square() + eps).sqrt() if inside else sigma + eps
    hat = centre(weight) / below
    radial = dot(upstream, hat) / weight.shape[1] * hat
    stretch = 1.0 if inside else below / sigma
    return (upstream - upstream.mean(1, keepdim=True) - stretch * radial) / below


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("eps", [0.0, 1e-5, 1e-2])
def test_eqs_8_and_9_as_corrected(eps, inside):
    (found,) = gradient(lambda w: weight_standardization(w, eps=eps, eps_inside=inside), G, W)
    assert relative_error(found, closed_form(W, G, eps, inside=inside)) < EXACT


def test_eq_8_as_printed_is_another_gradient():
    """The control: with dots on the right side (gradient and weight at W_dot) it is wrong."""
    sigma, dotted = std(W), centre(W)
    printed = (G - dot(G, dotted) / N * dotted) / sigma
    printed = printed - printed.mean(1, keepdim=True)
    (found,) = gradient(lambda w: weight_standardization(w, eps=0.0), G, W)
    assert relative_error(printed, found) > 1e-2


def test_gradients_of_the_ablations():
    sigma, q = std(W), W.square().mean(1, keepdim=True)
    cases = {
        "mean only": ({"divide": False}, G - G.mean(1, keepdim=True)),
        "divide only": (
            {"centre": False, "eps": 0.0},
            (G - dot(G, W) / (N * q) * W) / q.sqrt(),
        ),
        "central": (
            {"centre": False, "moment": "central", "eps": 0.0},
            (G - dot(G, W) / (N * sigma.square()) * centre(W)) / sigma,
        ),
    }
    for name, (options, expected) in cases.items():
        (found,) = gradient(lambda w, o=options: weight_standardization(w, **o), G, W)
        assert relative_error(found, expected) < EXACT, name


def test_gradients_of_the_affine_part():
    a, b = torch.linspace(0.5, 2.0, 6).double(), torch.linspace(-1.0, 1.0, 6).double()
    _, to_a, to_b = gradient(
        lambda w, a, b: weight_standardization(w, a, offset=b, affine=True), G, W, a, b
    )
    plain = centre(W) / (std(W) + 1e-5)
    assert relative_error(to_a, dot(G, plain)[:, 0]) < EXACT
    assert relative_error(to_b, G.sum(1)) < EXACT


def test_the_limit_at_a_constant_filter():
    flat = torch.full((1, 9), 0.3, dtype=torch.float64)
    (found,) = gradient(lambda w: weight_standardization(w, eps=1e-5), G[:1, :9], flat)
    assert relative_error(found, centre(G[:1, :9]) / 1e-5) < EXACT


def test_lipschitz_identity_three_shares():
    """Corrected Eqs. 10 to 15: what of the gradient is kept, is radial, is mean (section 1.3)."""
    u, along, kept = directions(W, G)
    shares = [kept.square().sum(1), along[:, 0].square(), G.sum(1).square() / N]
    whole = G.square().sum(1)
    assert_close(sum(shares) / whole, torch.ones(6).double(), absolute=1e-13)
    sigma = std(W)[:, 0]
    (to_raw,) = gradient(lambda w: weight_standardization(w, eps=0.0), G, W)
    assert_close(sigma.square() * to_raw.square().sum(1), shares[0], relative=EXACT)
    hat = weight_standardization(W, eps=0.0)
    assert_close(dot(hat, G)[:, 0].square() / N, shares[1], relative=EXACT)
    # Eqs. 10 to 12: the gradient in the centred filter, before the mean is taken off.
    (to_centred,) = gradient(
        lambda d: weight_standardization(d, eps=0.0, centre=False), G, centre(W)
    )
    reduced = (whole - dot(hat, G)[:, 0].square() / N) / sigma.square()
    assert_close(to_centred.square().sum(1), reduced, relative=EXACT)
    less = G.sum(1).square() / (N * sigma.square())
    assert_close(to_raw.square().sum(1), reduced - less, relative=EXACT)
    # The control, Eq. 15 as printed: 1/sigma^2 twice.
    assert relative_error(reduced - less / sigma.square(), to_raw.square().sum(1)) > 1e-2
    del u


@pytest.mark.parametrize("inside", [False, True])
def test_lipschitz_identity_with_eps(inside):
    eps = 1e-2
    _, along, kept = directions(W, G)
    sigma = std(W)
    below = (sigma.square() + eps).sqrt() if inside else sigma + eps
    rho = eps / below.square() if inside else eps / below
    expected = (kept.square().sum(1, keepdim=True) + rho.square() * along.square()) / below.square()
    (found,) = gradient(lambda w: weight_standardization(w, eps=eps, eps_inside=inside), G, W)
    assert_close(found.square().sum(1, keepdim=True), expected, relative=EXACT)


def test_hessian_identity_of_the_centring():
    """Corrected Eqs. 17 to 19, on a random quadratic (section 1.4)."""
    n = 7
    root = filters(n, n, mean=0.3, seed=3) * 4.0
    inner = root @ root.T
    row = filters(1, n, seed=4)

    def loss(w):
        d = weight_standardization(w.view(1, n), divide=False).view(n)
        return 0.5 * d @ inner @ d

    found = torch.autograd.functional.hessian(loss, row.view(n))
    sums, total = inner.sum(1), inner.sum()
    expected = inner - (sums[:, None] + sums[None]) / n + total / n**2
    assert relative_error(found, expected) < EXACT
    assert_close(found.sum(0), torch.zeros(n).double(), absolute=1e-12 * float(inner.norm()))
    assert_close(found.sum(1), torch.zeros(n).double(), absolute=1e-12 * float(inner.norm()))
    squared = inner.square().sum() + total**2 / n**2 - 2 / n * sums.square().sum()
    assert_close(found.square().sum(), squared, relative=EXACT)
    assert found.square().sum() <= inner.square().sum() - total**2 / n**2


def test_invariances_at_eps_0():
    """E(aW + b) = sign(a) E(W), gradients scale by 1/a, and push along no dead direction."""
    exact = {"eps": 0.0}
    hat = weight_standardization(W, **exact)
    for a, b in ((3.0, 0.7), (-0.2, -5.0)):
        sign = 1.0 if a > 0 else -1.0
        assert relative_error(weight_standardization(a * W + b, **exact), sign * hat) < 1e-11
    (plain,) = gradient(lambda w: weight_standardization(w, **exact), G, W)
    (scaled,) = gradient(lambda w: weight_standardization(w, **exact), G, 3.0 * W + 0.7)
    assert relative_error(scaled, plain / 3.0) < 1e-11
    scale = plain.norm(dim=1, keepdim=True) * W.norm(dim=1, keepdim=True)
    assert_close(dot(plain, W) / scale, torch.zeros(6, 1), absolute=1e-12)


def test_loss_of_scale_on_a_he_filter():
    """The same eps inside and outside makes two networks: 1.70e-4 and 1.44e-3 at n = 576."""
    weight = he_filters(4)
    exact = weight_standardization(weight, eps=0.0)
    outside = relative_error(weight_standardization(weight), exact)
    inside = relative_error(weight_standardization(weight, eps_inside=True), exact)
    assert outside == pytest.approx(1.697e-4, rel=1e-3)
    assert inside == pytest.approx(1.437e-3, rel=1e-3)
