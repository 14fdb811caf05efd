"""Equilibrium Normalization: balance, geometry, single pass and gradients (section 4)."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn import functional as F

from filterwise import functional
from filterwise.methods.equinorm import EquilibriumNormalization
from support import equilibrium
from support.compare import assert_close, relative_error
from support.torch_formulas import centre

EXACT = 1e-12
CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def uniform(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def equinorm(weight, v, gain=None, **options):
    return functional.equilibrium_normalization(weight, v, gain, **options)


def channel_mean(x):
    return x.movedim(1, 0).flatten(1).mean(1)


def cyclic(x, weight, *, dilation=1, groups=1):
    dims = weight.dim() - 2
    padded = F.pad(x, (dilation,) * (2 * dims), mode="circular") if dilation else x
    return CONVOLVE[dims](padded, weight, dilation=max(dilation, 1), groups=groups)


@pytest.mark.parametrize(
    ("dims", "groups", "dilation"), list(itertools.product((1, 2, 3), (1, 2), (1, 2)))
)
def test_balance_in_the_exact_geometry(dims, groups, dilation):
    """Cyclic, stride 1: the mean is 0; positive and negative weights contribute +1 and -1."""
    x = uniform(3, 4, *(6,) * dims, seed=dims) * (1 + uniform(1, 4, *(1,) * dims, seed=9))
    weight = normal(6, 4 // groups, *(3,) * dims, seed=7 * dims + dilation)
    hat = equinorm(weight, channel_mean(x))

    def mean(part):
        return channel_mean(cyclic(x, part, dilation=dilation, groups=groups))

    assert_close(mean(hat), torch.zeros(6), absolute=1e-13)
    assert_close(mean(hat.clamp(min=0)), torch.ones(6).double(), absolute=1e-13)
    assert_close(mean(hat.clamp(max=0)), -torch.ones(6).double(), absolute=1e-13)


@pytest.mark.parametrize(
    ("size", "stride", "padding"),
    list(itertools.product((7, 8, 11), (1, 2, 3), ("circular", "valid"))),
)
def test_a_constant_image_of_any_size_and_stride(size, stride, padding):
    v = uniform(4, seed=3) + 0.2
    x = v.view(1, 4, 1, 1).expand(2, 4, size, size)
    x = F.pad(x, (1, 1, 1, 1), mode="circular") if padding == "circular" else x
    hat = equinorm(normal(5, 4, 3, 3, seed=size + stride), v)
    assert_close(F.conv2d(x, hat, stride=stride), torch.zeros(()), absolute=1e-13)
    positive = F.conv2d(x, hat.clamp(min=0), stride=stride)
    assert_close(positive, torch.ones(()).double(), absolute=1e-13)


@pytest.mark.parametrize(("size", "stride", "padding"), [(7, 2, 1), (8, 1, 0), (9, 3, 1)])
def test_the_paper_s_geometry_is_a_factor(size, stride, padding):
    """Sums for v and r = N Hout Wout stride^2 amount to phi = prod(S_out stride/S_in)."""
    batch, out = 2, (size + 2 * padding - 3) // stride + 1
    v, weight = uniform(4, seed=3) + 0.2, normal(5, 4, 3, 3, seed=size)
    sums = v * batch * size**2
    r = batch * out**2 * stride**2
    rows = weight.flatten(1)
    spread = equilibrium.spread(sums, weight)
    shifted = rows - (spread * rows).sum(1, keepdim=True) / spread.sum(1, keepdim=True)
    printed = r * shifted / (spread * shifted.clamp(min=0)).sum(1, keepdim=True)
    phi = (out * stride / size) ** 2
    found = functional.equilibrium_normalization(weight, v, geometry_factor=phi)
    assert relative_error(found.flatten(1), printed) < EXACT
    assert (phi == 1.0) == (size == 9)


def test_zero_padding_covers_less():
    """The positive part is sum_c v_c sum_k f_k (w''_ck)^+ with f_k the covered share of tap k."""
    v, weight = uniform(4, seed=3) + 0.2, normal(5, 4, 3, 3, seed=5)
    x = v.view(1, 4, 1, 1).expand(1, 4, 7, 5)
    hat = equinorm(weight, v)
    rows, columns = (
        torch.tensor([6 / 7, 1, 6 / 7]).double(),
        torch.tensor([4 / 5, 1, 4 / 5]).double(),
    )
    share = rows[:, None] * columns
    expected = (v.view(1, 4, 1, 1) * share * hat.clamp(min=0)).sum((1, 2, 3))
    found = F.conv2d(x, hat.clamp(min=0), padding=1).mean((0, 2, 3))
    assert relative_error(found, expected) < 1e-6


def test_equal_means_give_the_centred_l1_normalization():
    """B = -mean(w) and w'' = 2 w_dot/(v |w_dot|_1)."""
    weight = normal(5, 4, 3, 3, seed=5)
    dotted = centre(weight.flatten(1))
    expected = 2 * dotted / (0.37 * dotted.abs().sum(1, keepdim=True))
    found = equinorm(weight, torch.full((4,), 0.37, dtype=torch.float64))
    assert relative_error(found.flatten(1), expected) < EXACT


def test_single_pass_equals_two_passes_where_no_sign_flips():
    weight = torch.cat([uniform(6, 18, seed=1) + 1, -uniform(6, 18, seed=2) - 1], 1)
    weight, ones = weight.view(6, 4, 3, 3), torch.ones(4).double()
    one, two = equinorm(weight, ones, single_pass=True), equinorm(weight, ones)
    assert relative_error(one, two) < EXACT


@pytest.mark.parametrize(
    ("shape", "median", "largest"), [((400, 4, 3, 3), 1.0004, 1.0083), ((400, 1, 3, 3), 1.010, 3.2)]
)
def test_single_pass_is_a_little_larger(shape, median, largest):
    """The positive part is P2/P1 >= 1: 1.0004 in the median at n = 36, up to threefold at n = 9."""
    weight, v = normal(*shape, seed=18), uniform(shape[1], seed=3) + 0.2
    one, two = equinorm(weight, v, single_pass=True), equinorm(weight, v)
    ratio = one.flatten(1).norm(dim=1) / two.flatten(1).norm(dim=1)
    assert float(ratio.min()) >= 1 - 1e-12
    assert float(ratio.median()) == pytest.approx(median, rel=0.01)
    assert largest / 3 < float(ratio.max()) < largest * 3


def test_a_one_signed_filter_takes_two_passes():
    """In a single pass P1 = 0 there; the rule of section 4.4 takes P2."""
    weight, v = uniform(3, 4, 3, 3, seed=21) + 0.1, uniform(4, seed=3) + 0.2
    for sign in (1.0, -1.0):
        one, two = equinorm(sign * weight, v, single_pass=True), equinorm(sign * weight, v)
        assert relative_error(one, two) < EXACT
        assert float(two.abs().max()) < 100.0


def test_degenerate_filters_and_inputs_give_zero():
    weight = normal(3, 4, 3, 3, seed=1)
    weight[1] = 0.3
    v = uniform(4, seed=3) + 0.2
    assert not equinorm(weight, v)[1].any()
    leaf = weight.clone().requires_grad_()
    equinorm(leaf, v).square().sum().backward()
    assert not leaf.grad[1].any()
    assert leaf.grad.isfinite().all()
    dead = equinorm(weight, torch.zeros(4).double())
    assert not dead.any()


@pytest.mark.parametrize(("groups", "single_pass"), list(itertools.product((1, 2), (False, True))))
def test_gradients_in_closed_form(groups, single_pass):
    """dL/dw, dL/dv, sum v dL/dv = -<G, w''>, and no push along ones or the filter (section 4.4)."""
    weight = normal(6, 4 // groups, 3, 3, seed=23 + groups).requires_grad_()
    v = (uniform(4, seed=24) + 0.1).requires_grad_()
    upstream = normal(*weight.shape, seed=25)
    hat = functional.equilibrium_normalization(
        weight, v, single_pass=single_pass, geometry_factor=1.3
    )
    to_weight, to_mean = torch.autograd.grad(hat, (weight, v), upstream)
    expected = equilibrium.gradient(weight, v, upstream, single_pass=single_pass, phi=1.3)
    assert relative_error(to_weight, expected[0]) < EXACT
    assert relative_error(to_mean, expected[1]) < EXACT
    hat, v, weight = hat.detach(), v.detach(), weight.detach()
    assert float((v * to_mean).sum()) == pytest.approx(-float((upstream * hat).sum()), rel=1e-11)
    scale = float(to_weight.norm() * weight.norm())
    assert_close((to_weight * weight).sum((1, 2, 3)), torch.zeros(6), absolute=1e-13 * scale)
    assert_close(to_weight.sum((1, 2, 3)), torch.zeros(6), absolute=1e-13 * scale)


def test_gradcheck_of_a_layer_through_its_statistics():
    method = EquilibriumNormalization()

    def layer(x, weight):
        return cyclic(x, method.effective(weight, method.input_mean(x, 1)))

    x, weight = uniform(2, 2, 5, 5, seed=27), normal(3, 2, 3, 3, seed=26)
    assert torch.autograd.gradcheck(layer, (x.requires_grad_(), weight.requires_grad_()))


def test_a_factor_on_the_whole_input_changes_nothing():
    x, weight = uniform(3, 4, 9, 8, seed=17), normal(5, 4, 3, 3, seed=5)
    one, three = (F.conv2d(a * x, equinorm(weight, channel_mean(a * x))) for a in (1.0, 3.0))
    assert relative_error(three, one) < EXACT


@pytest.mark.parametrize("fraction", [0.25, 0.5, 1.0])
def test_statistics_of_the_first_fraction(fraction):
    """V from the first ceil(f N) samples, per element."""
    x = uniform(7, 4, 5, 3, seed=2)
    first = {0.25: 2, 0.5: 4, 1.0: 7}[fraction]
    found = EquilibriumNormalization(fraction=fraction).input_mean(x, 1)
    assert relative_error(found, channel_mean(x[:first])) < EXACT


def test_a_linear_layer_is_balanced_exactly():
    """K = 1, v over all leading axes: mean 0 and +1 hold exactly."""
    x, weight = uniform(7, 5, 6, seed=30), normal(4, 6, seed=31)
    method = EquilibriumNormalization()
    hat = method.effective(weight, method.input_mean(x, -1))
    assert_close((x @ hat.T).mean((0, 1)), torch.zeros(4), absolute=1e-14)
    assert_close((x @ hat.clamp(min=0).T).mean((0, 1)), torch.ones(4).double(), absolute=1e-14)


def test_a_zero_mean_input_moves_filters_without_bound():
    """The control of section 4.4: |b|/std(w) reaches hundreds where T is near 0."""
    shifts = []
    for seed in range(100):
        x, weight = normal(32, 3, 8, 8, seed=seed), normal(1, 3, 3, 3, seed=seed + 500)
        v = equilibrium.spread(channel_mean(x), weight)
        shifts.append(float((v * weight.flatten(1)).sum().abs() / v.sum().abs()))
    assert max(shifts) > 5.0
