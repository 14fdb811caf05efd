"""Each preset against its formula as published, written out in float64 (W: filters by weights)."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from filterwise import functional as fw
from filterwise.methods.registry import METHODS
from filterwise.recipe import Recipe
from support.compare import relative_error
from support.torch_formulas import filters

N = 36
UNIT = filters(5, N, mean=0.1) / (2.0 / N) ** 0.5
SIZES = (1e-9, 1e-6, 1e-4, 3e-3, 1e-2, 1.0, 1e3)
GAIN = torch.linspace(-0.5, 2.0, 5, dtype=torch.float64)
OFFSET = torch.linspace(0.3, -0.1, 5, dtype=torch.float64)
RELU = 1.7139588594436646


def c(w):
    return w - w.mean(1, keepdim=True)


def b(w):
    return w.var(1, correction=0, keepdim=True)


def u(w):
    return w.var(1, correction=1, keepdim=True)


PUBLISHED = {
    "ws": {
        "official": lambda w, g, _o: g * c(w) / (u(w).sqrt() + 1e-5),
        "mmcv": lambda w, g, _o: g * c(w) / (u(w).sqrt() + 1e-5),
        "bcn": lambda w, g, _o: g * c(w) / (u(w) + 1e-5).sqrt(),
        "mmcv_aws": lambda w, g, o: g * c(w) / (u(w) + 1e-5).sqrt() + o,
        "vit_hybrid": lambda w, g, _o: g * c(w) / (b(w).sqrt() + 1e-5),
        "bit": lambda w, g, _o: g * c(w) / (b(w) + 1e-10).sqrt(),
        "timm": lambda w, g, _o: g * c(w) / (b(w) + 1e-6).sqrt(),
        "timm_bit": lambda w, g, _o: g * c(w) / (b(w) + 1e-8).sqrt(),
    },
    "sws": {
        "deepmind": lambda w, g, _o: g * c(w) / (N * b(w)).clamp_min(1e-4).sqrt(),
        "timm": lambda w, g, _o: g * RELU * N**-0.5 * c(w) / (b(w) + 1e-5).sqrt(),
        "nfnets_pytorch": lambda w, g, _o: g * c(w) / (N * u(w)).clamp_min(1e-4).sqrt(),
    },
    "pws": {
        "public": lambda w, g, _o: math.sqrt(2 / N) * g * c(w) / (b(w) + 1e-5).sqrt(),
        "public_tf": lambda w, g, _o: math.sqrt(2 / N) * g * c(w) / (b(w) + 1e-3).sqrt(),
    },
}
"""Layers without a gain take 1, without an offset 0."""

FUNCTIONS = {
    "ws": fw.weight_standardization,
    "sws": fw.scaled_weight_standardization,
    "pws": fw.parametric_weight_standardization,
}
PRESETS = [(method, preset) for method, table in PUBLISHED.items() for preset in table]


def ours(method, preset, weight):
    options = METHODS[method].presets[preset]
    more = {"offset": OFFSET} if preset == "mmcv_aws" else {}
    gain = GAIN if method != "ws" or preset == "mmcv_aws" else None
    return FUNCTIONS[method](weight, gain, **more, **options)


def published(method, preset, weight):
    has_gain = method != "ws" or preset == "mmcv_aws"
    one = torch.ones(5, 1, dtype=torch.float64)
    return PUBLISHED[method][preset](weight, GAIN[:, None] if has_gain else one, OFFSET[:, None])


def test_every_preset_has_its_formula_here():
    have = {name: set(method.presets) for name, method in METHODS.items() if method.presets}
    assert have == {name: set(table) for name, table in PUBLISHED.items()}


@pytest.mark.parametrize(("method", "preset"), PRESETS)
def test_formula_at_every_size(method, preset):
    for size in SIZES:
        found, expected = ours(method, preset, UNIT * size), published(method, preset, UNIT * size)
        assert relative_error(found, expected) < 1e-12, size


@pytest.mark.parametrize(("method", "preset"), PRESETS)
def test_text_resolves_and_options_beside_it_win(method, preset):
    named = Recipe.parse(f"{method}(like={preset})")
    assert "like" not in str(named)
    assert Recipe.parse(str(named)) == named
    option = "gamma" if method == "pws" else "eps"
    changed = Recipe.parse(f"{method}({option}=0.25, like={preset})").method
    assert changed.all_options() == {**named.method.all_options(), option: 0.25}


def test_the_presets_are_different_networks():
    """The control: at some size any two differ by 1e-9 or more, but for the two that are one."""
    for method, table in PUBLISHED.items():
        for one, other in itertools.combinations(table, 2):
            far = max(
                relative_error(published(method, one, UNIT * s), published(method, other, UNIT * s))
                for s in SIZES
            )
            assert (far > 1e-9) == ({one, other} != {"official", "mmcv"}), (one, other)
