"""Laws 3, 13 and 16 on what nobody chose: hypothesis draws options, hosts, shapes and values."""

from __future__ import annotations

import math
import warnings

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import filterwise as fw
from filterwise.filters import layout_of
from filterwise.methods.registry import METHODS
from support import references
from support.compare import assert_close, per_row
from support.hosts import Host

EPS = st.one_of(st.just(0.0), st.floats(1e-12, 10.0))
GAIN = st.floats(-3.0, 3.0)
FLAG = st.booleans()

OPTIONS = {
    "ws": {
        "eps": EPS,
        "eps_inside": FLAG,
        "ddof": st.sampled_from([0, 1]),
        "centre": FLAG,
        "divide": FLAG,
        "moment": st.sampled_from(["raw", "central"]),
        "scale": st.sampled_from(["unit", "fan_in"]),
    },
    "wa": {
        "constant": st.sampled_from(["he", "preserving"]),
        "eps": EPS,
        "centre": FLAG,
        "divide": FLAG,
        "factor": st.floats(0.1, 8.0),
    },
    "pws": {
        "gamma": st.one_of(
            EPS,
            st.sampled_from(["relative", "large", "medium", "small", "none"]),
            st.floats(0.0, 10.0).map(lambda share: f"{share!r}*2/n"),
        )
    },
    "wn": {"eps": EPS},
    "cwn": {"eps": EPS},
    "centered": {},
    "sws": {
        "activation": st.sampled_from(["relu", "identity", "silu", "tanh", 0.7]),
        "eps": EPS,
        "floor": FLAG,
        "ddof": st.sampled_from([0, 1]),
    },
}
"""Weight-only methods without labels, with the whole range of each option."""


@st.composite
def drawn_methods(draw):
    name = draw(st.sampled_from(sorted(OPTIONS)))
    options = {key: draw(values) for key, values in OPTIONS[name].items()}
    if not options.get("centre", True) and not options.get("divide", True):
        options["centre"] = True  # neither is refused: nothing would be left to do
    return METHODS[name](**options)


@st.composite
def drawn_hosts(draw):
    """Return a host with its layer in float64: any class, groups, channels and kernel."""
    dims, transposed = draw(st.integers(1, 3)), draw(FLAG)
    groups, share, outputs = (draw(st.integers(1, 3)) for _ in range(3))
    kernel = tuple(draw(st.integers(1, 3)) for _ in range(dims))
    if share * math.prod(kernel) == 1:
        kernel = (2, *kernel[1:])  # a fan-in of 1 is refused
    name = f"Conv{'Transpose' if transposed else ''}{dims}d"
    layer = getattr(nn, name)(groups * share, groups * outputs, kernel, groups=groups, bias=False)
    return Host(name, lambda: layer, ()), layer.double()


@settings(max_examples=6 * settings.default.max_examples)
@given(
    method=drawn_methods(),
    found=drawn_hosts(),
    gain=GAIN,
    log_scale=st.floats(-3.0, 3.0),
    ratio=st.sampled_from([0.0, 0.3, 100.0]),
    seed=st.integers(0, 2**16),
)
def test_laws_03_13_16_on_drawn_options_and_hosts(method, found, gain, log_scale, ratio, seed):
    """Value and gradient of any method on any host are the published formula, in float64."""
    host, layer = found
    source = torch.Generator().manual_seed(seed)
    shape = layer.weight.shape
    raw = torch.randn(shape, generator=source, dtype=torch.float64)
    weight = ((raw + ratio) * 10.0**log_scale).requires_grad_()
    upstream = torch.randn(shape, generator=source, dtype=torch.float64)
    rows = host.rows(layer, weight.detach())
    gains = torch.full((len(rows),), gain, dtype=torch.float64) if method.has_gain else None
    out = method.effective(weight, layout_of(layer), gains)
    expected = references.effective(method, rows, gains)
    # A filter of two weights that nearly agree has lost digits before anybody computes with it.
    digits = 1e-13 * (1.0 + ratio) ** 2
    allowed = digits * per_row(expected) + 1e-300
    assert_close(host.rows(layer, out.detach()), expected, absolute=allowed, what=str(method))
    (pulled,) = torch.autograd.grad(out, weight, upstream)
    pushed = host.rows(layer, upstream)
    wanted = references.gradient(method, rows, pushed, gains)[0]
    f = references.formula(method, rows.shape[1])
    below = [f.divisor(references.moments(row, f).s, math) for row in rows.tolist()]
    steepness = [f.constant / divisor if divisor else 0.0 for divisor in below]
    scale = (abs(gain) if method.has_gain else 1.0) * torch.tensor(steepness, dtype=torch.float64)
    allowed = 100 * digits * scale[:, None] * per_row(pushed) + 1e-300
    assert_close(host.rows(layer, pulled), wanted, absolute=allowed, what=f"gradient of {method}")


@settings(max_examples=2 * settings.default.max_examples)
@given(
    method=drawn_methods(), norm=st.sampled_from(["gn", "gn(2)", "bn", "ln", "in", "keep", "none"])
)
def test_law32_any_recipe_s_text_parses_back_to_itself(method, norm):
    recipe = fw.Recipe.parse(norm + "+" + str(method))
    assert recipe.method == method
    assert fw.Recipe.parse(str(recipe)) == recipe


@given(method=drawn_methods(), seed=st.integers(0, 2**16))
def test_law25_any_method_folds(method, seed):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 2, groups=2), nn.ReLU())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fw.FilterwiseWarning)
        fw.convert_(net, method, select=["0", "2"])
    x = torch.rand(2, 3, 6, 6)
    assert_close(fw.fold(net)(x), net(x), what=str(method))
