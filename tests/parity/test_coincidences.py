"""The table of coincidences: what must be equal, and what must differ by how much (section 6)."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from filterwise import functional as fw
from support.compare import relative_error
from support.torch_formulas import centre, filters, he_filters, std

W = filters()
ROWS, N = W.shape
V = torch.rand(N, dtype=torch.float64, generator=torch.Generator().manual_seed(5)) + 0.2


def ws(weight, **options):
    return fw.weight_standardization(weight, **{"eps": 0.0, **options})


def wa(weight, **options):
    return fw.weight_align(weight, torch.ones(len(weight)).double(), **{"eps": 0.0, **options})


def pws(weight, gamma=0.0):
    return fw.parametric_weight_standardization(weight, gamma=gamma)


def sws(weight, activation="identity"):
    return fw.scaled_weight_standardization(weight, activation=activation, eps=0.0)


def wn(weight, gain):
    return fw.weight_normalization(weight, torch.full((len(weight),), gain, dtype=torch.float64))


def cwn(weight, gain):
    return fw.centered_weight_normalization(
        weight, torch.full((len(weight),), gain, dtype=torch.float64)
    )


def en(weight, v=V, **options):
    return fw.equilibrium_normalization(weight, v, **options)


def mean_only(weight):
    return ws(weight, divide=False)


def divide_only(weight, **options):
    return ws(weight, centre=False, **options)


HE = math.sqrt(2 / N)
EQUAL = {
    "1 WA(1), sqrt(2/n) WS": lambda: (wa(W), HE * ws(W)),
    "2 PWS(1), WA(1)": lambda: (pws(W), wa(W)),
    "3 PWS(gamma), sqrt(2/n) WS inside": lambda: (
        pws(W, 1e-3),
        HE * ws(W, eps=1e-3, eps_inside=True),
    ),
    "4 SWS times sqrt 2, WA(1)": lambda: (math.sqrt(2) * sws(W), wa(W)),
    "5 SWS(relu), WA(1.7129)": lambda: (sws(W, "relu"), wa(W, constant="preserving")),
    "6 CWN(sqrt n), WS": lambda: (cwn(W, math.sqrt(N)), ws(W)),
    "6 CWN(sqrt 2), WA(1)": lambda: (cwn(W, math.sqrt(2)), wa(W)),
    "7 WN of a centred filter, CWN": lambda: (wn(centre(W), 1.7), cwn(W, 1.7)),
    "8 WS twice": lambda: (ws(ws(W)), ws(W)),
    "8 WA twice": lambda: (wa(wa(W)), wa(W)),
    "8 WN twice": lambda: (wn(wn(W, 1.0), 1.0), wn(W, 1.0)),
    "8 CWN twice": lambda: (cwn(cwn(W, 1.0), 1.0), cwn(W, 1.0)),
    "8 SWS twice": lambda: (sws(sws(W, "relu"), "relu"), sws(W, "relu")),
    "8 PWS twice": lambda: (pws(pws(W)), pws(W)),
    "8 MO twice": lambda: (mean_only(mean_only(W)), mean_only(W)),
    "9 DO of MO, WS": lambda: (divide_only(mean_only(W)), ws(W)),
    "9 WS of DO, WS": lambda: (ws(divide_only(W)), ws(W)),
    "9 WS of MO, WS": lambda: (ws(mean_only(W)), ws(W)),
    "10 layer_norm, WS inside": lambda: (
        F.layer_norm(W, (N,), eps=1e-3),
        ws(W, eps=1e-3, eps_inside=True),
    ),
    "10 batch_norm, WS inside": lambda: (
        F.batch_norm(W.view(1, ROWS, N), None, None, training=True, eps=1e-3)[0],
        ws(W, eps=1e-3, eps_inside=True),
    ),
    "11 EN twice": lambda: (en(en(W)), en(W)),
    "11 EN(aw + b)": lambda: (en(2.5 * W + 0.7), en(W)),
    "12 EN with equal v, WS": lambda: (
        en(W, torch.ones(N).double()) / en(W, torch.ones(N).double()).norm(dim=1, keepdim=True),
        ws(W) / ws(W).norm(dim=1, keepdim=True),
    ),
    "13 EN single pass, two passes": lambda: (
        en(torch.sign(centre(W)) + 0.3 * centre(W), torch.ones(N).double(), single_pass=True),
        en(torch.sign(centre(W)) + 0.3 * centre(W), torch.ones(N).double()),
    ),
    "14 WS unbiased": lambda: (ws(W, ddof=1), math.sqrt((N - 1) / N) * ws(W)),
    "15 1x1 convolution, linear": lambda: (wa(W.view(ROWS, N, 1, 1)).flatten(1), wa(W)),
    "16 EWS with one label, WS": lambda: (
        fw.equivariant_weight_standardization(W, label=torch.zeros(1, dtype=torch.long), eps=0.0),
        ws(W),
    ),
    "17 BN after WS, BN after MO": lambda: (
        batch_norm_after(ws(W)),
        batch_norm_after(mean_only(W)),
    ),
}


def responses(weight):
    inputs = torch.randn(64, N, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return inputs.relu() @ weight.T


def batch_norm_after(weight):
    out = responses(weight)
    return (out - out.mean(0)) / out.std(0, unbiased=False)


@pytest.mark.parametrize("pair", EQUAL)
def test_equal(pair):
    left, right = EQUAL[pair]()
    # The quadrature of the gain is good to 1e-11; everything else to rounding.
    assert relative_error(left, right) < (1e-10 if "relu" in pair else 1e-12)


HES = he_filters()
LABELS = (torch.arange(N) >= N // 2).long()
DIFFERENT = {
    "N1 WN(sqrt n), WS": (lambda: (wn(HES, math.sqrt(N)), ws(HES)), 0.042, 0.1),
    "N2 centred, CWN(1)": (lambda: (fw.weight_centering(HES), cwn(HES, 1.0)), 0.4142, 1e-3),
    "N3 unbiased, biased": (lambda: (ws(HES, ddof=1), ws(HES)), 8.68e-4, 1e-2),
    "N4 eps outside, none": (lambda: (ws(HES, eps=1e-5), ws(HES)), 1.70e-4, 1e-2),
    "N5 eps inside, none": (lambda: (ws(HES, eps=1e-5, eps_inside=True), ws(HES)), 1.44e-3, 1e-2),
    "N6 eps outside, inside": (
        lambda: (ws(HES, eps=1e-5), ws(HES, eps=1e-5, eps_inside=True)),
        1.27e-3,
        1e-2,
    ),
    "N7 WA(1), WS": (lambda: (wa(HES), ws(HES)), 0.9411, 1e-3),
    "N8 WA with 1.7129, WA": (lambda: (wa(HES, constant="preserving"), wa(HES)), 0.2112, 1e-3),
    "N9 PWS(1e-3), WA at 576": (lambda: (pws(HES, 1e-3), wa(HES)), 0.1189, 1e-3),
    "N10 DO raw, central": (
        lambda: (divide_only(HES), divide_only(HES, moment="central")),
        1.6e-3,
        0.3,
    ),
    "N11 scale-only WA, WA": (lambda: (wa(HES, centre=False), wa(HES)), 0.042, 0.1),
    "N12 PWS(1e-3), WA at 27": (
        lambda: (pws(he_filters(256, 27), 1e-3), wa(he_filters(256, 27))),
        0.00668,
        1e-2,
    ),
    "N12 PWS(1e-3), WA at 4608": (
        lambda: (pws(he_filters(16, 4608), 1e-3), wa(he_filters(16, 4608))),
        0.4499,
        1e-3,
    ),
    "N15 EWS of two halves, WS": (
        lambda: (fw.equivariant_weight_standardization(HES, label=LABELS, eps=0.0), ws(HES)),
        0.052,
        0.15,
    ),
}


@pytest.mark.parametrize("pair", DIFFERENT)
def test_different(pair):
    """The negative controls, with the difference that the specification prints."""
    make, expected, within = DIFFERENT[pair]
    assert relative_error(*make()) == pytest.approx(expected, rel=within)


def test_group_norm_does_not_cancel_the_division():
    """N16: GN(16 of 64) after WS is not GN after MO, unless a group's filters share sigma."""
    weight = filters(64, 36, seed=8) * torch.linspace(0.7, 1.4, 64).double()[:, None]
    inputs = torch.randn(8, 36, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    def normalized(hat):
        return F.group_norm(torch.einsum("oi,bip->bop", hat, inputs), 16, eps=0.0)

    assert relative_error(normalized(ws(weight)), normalized(mean_only(weight))) > 1e-2
    same = weight * 0.1 / std(weight)
    assert relative_error(normalized(ws(same)), normalized(mean_only(same))) < 1e-12
