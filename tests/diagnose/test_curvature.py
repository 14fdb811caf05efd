"""Curvature against whole Hessians, written out entry by entry."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional

import filterwise as fw

pytestmark = pytest.mark.filterwarnings("ignore::filterwise.FilterwiseWarning")

FILTERS, INPUTS = 3, 6


def net(recipe=None):
    torch.manual_seed(11)
    model = nn.Sequential(
        nn.Linear(INPUTS, FILTERS), nn.Tanh(), nn.Dropout(0.0), nn.Linear(FILTERS, 4)
    )
    if recipe:
        fw.convert_(model, recipe, select=["0", "3"])
        with torch.no_grad():
            for place in (0, 3):
                if hasattr(model[place], "gain"):
                    model[place].gain.mul_(torch.linspace(0.7, 1.3, len(model[place].gain)))
    return model.double()


X = torch.randn(8, INPUTS, generator=torch.Generator().manual_seed(12), dtype=torch.float64)
Y = torch.arange(8) % 4


def loss(model):
    return functional.cross_entropy(model(X), Y)


def whole_hessian(function, at):
    """Second differences of nothing: autograd's own, entry by entry."""
    found = torch.autograd.functional.hessian(function, at.detach())
    return found.reshape(at.numel(), at.numel())


def by_hand(model, effective):
    """Return the loss as a function of the first layer's weight, written out for this net."""
    second = model[3].weight.detach()
    if hasattr(model[3], "gain"):
        second = effective(second, model[3].gain.detach())

    def function(hat):
        hidden = functional.linear(X, hat, model[0].bias.detach()).tanh()
        return functional.cross_entropy(
            functional.linear(hidden, second, model[3].bias.detach()), Y
        )

    return function


def aligned(weight, gain, *, centre=True):
    """WeightAlign; without centring the divisor is the mean square of what enters."""
    n = weight.shape[1]
    if centre:
        weight = weight - weight.mean(1, keepdim=True)
    scale = (weight.square().mean(1, keepdim=True) + 1e-10).rsqrt()
    return gain[:, None] * math.sqrt(2 / n) * weight * scale


def centring():
    block = torch.eye(INPUTS, dtype=torch.float64) - 1 / INPUTS
    return torch.block_diag(*[block] * FILTERS)


def of(records, layer="0"):
    return {record["signal"]: record["value"] for record in records if record["layer"] == layer}


@pytest.mark.parametrize("recipe", [None, "wa"])
def test_norms_equal_those_of_the_whole_hessian(recipe):
    model = net(recipe)
    function = by_hand(model, aligned)
    weight = model[0].weight.detach()
    if recipe is None:
        free = whole_hessian(function, weight)
        raw = centring() @ free @ centring()
    else:
        gain = model[0].gain.detach()
        centred = weight - weight.mean(1, keepdim=True)
        free = whole_hessian(lambda w: function(aligned(w, gain, centre=False)), centred)
        raw = whole_hessian(lambda w: function(aligned(w, gain)), weight)
        torch.testing.assert_close(raw, centring() @ free @ centring(), rtol=1e-6, atol=1e-12)
    got = of(fw.diagnose.hessian(model, loss, probes=100))
    assert got["hessian_norm_centred"] == pytest.approx(float(free.norm()), rel=1e-9)
    assert got["hessian_norm"] == pytest.approx(float(raw.norm()), rel=1e-9)
    expected = 1 - float(raw.norm() / free.norm()) ** 2
    assert got["hessian_reduction"] == pytest.approx(expected, rel=1e-9)
    assert got["hessian_norm_error"] == 0
    # Eq. 19 with squares: at least S^2/n^2 is taken away, block by block.
    blocks = free.view(FILTERS, INPUTS, FILTERS, INPUTS)
    assert (
        free.norm() ** 2 - raw.norm() ** 2 >= (blocks.sum((1, 3)) / INPUTS).square().sum() - 1e-12
    )


def test_random_probes_come_close_and_say_how_close():
    model = net("wa")
    exact = of(fw.diagnose.hessian(model, loss, probes=100, layers="0"))
    got = of(fw.diagnose.hessian(model, loss, probes=17, layers="0"))
    assert got["hessian_norm_error"] > 0
    off = abs(got["hessian_norm"] - exact["hessian_norm"])
    assert off < 4 * got["hessian_norm_error"]
    assert got == of(fw.diagnose.hessian(model, loss, probes=17, layers="0"))


@pytest.mark.parametrize("recipe", [None, "wa", "gn+ws", "equinorm", "wn"])
def test_the_largest_eigenvalue_is_that_of_the_whole_hessian(recipe):
    model = net(recipe)
    records = fw.diagnose.largest_eigenvalue(model, loss, layers="0", steps=30)
    effective = fw.diagnose.curvature._effective  # the layer's map, held to its formula elsewhere
    layer = next(iter(fw.diagnose.layers.chosen_layers(model, "0")))
    plain = fw.fold(model) if recipe else model

    def function(weight):
        hidden = functional.linear(X, effective(layer, weight), plain[0].bias.detach()).tanh()
        out = functional.linear(hidden, plain[3].weight.detach(), plain[3].bias.detach())
        return functional.cross_entropy(out, Y)

    values = torch.linalg.eigvalsh(whole_hessian(function, model[0].weight))
    got = of(records, "")
    assert got["hessian_largest_eigenvalue"] == pytest.approx(float(values[-1]), rel=1e-6)
    assert got["hessian_eigenvalue_residual"] < 1e-5


def test_few_steps_say_how_far_off_they_are():
    got = of(fw.diagnose.largest_eigenvalue(net(), loss, steps=3), "")
    exact = of(fw.diagnose.largest_eigenvalue(net(), loss, steps=40), "")
    off = abs(got["hessian_largest_eigenvalue"] - exact["hessian_largest_eigenvalue"])
    assert 0 < off <= got["hessian_eigenvalue_residual"]


def test_the_landscape_is_the_loss_along_filter_normalized_directions():
    model = net("wa")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = fw.diagnose.landscape(model, loss, span=0.5, points=3, seed=1)
    assert len(found) == 9
    middle = next(one for one in found if one["first"] == one["second"] == 0)
    assert middle["loss"] == pytest.approx(float(loss(model).detach()), rel=1e-12)
    generator = torch.Generator().manual_seed(1)
    planes = [
        [torch.randn(model[place].weight.shape, generator=generator).double() for place in (0, 3)]
        for _ in range(2)
    ]
    moved = net("wa")
    with torch.no_grad():
        for at, place in enumerate((0, 3)):
            weight = moved[place].weight
            step = torch.zeros_like(weight)
            for amount, plane in zip((0.5, -0.5), planes, strict=True):
                for row in range(len(weight)):
                    unit = plane[at][row] / plane[at][row].norm()
                    step[row] += amount * unit * before[f"{place}.weight"][row].norm()
            weight.add_(step)
    corner = next(one for one in found if (one["first"], one["second"]) == (0.5, -0.5))
    assert corner["loss"] == pytest.approx(float(loss(moved).detach()), rel=1e-9)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_the_model_and_the_random_numbers_stay_as_they_are():
    model = net("wa")
    model[2].p = 0.5
    state = torch.get_rng_state()
    first = fw.diagnose.hessian(model, loss, probes=4)
    fw.diagnose.largest_eigenvalue(model, loss, steps=2)
    fw.diagnose.landscape(model, loss, points=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert first == fw.diagnose.hessian(model, loss, probes=4)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("call", "complaint"),
    [
        (lambda m: fw.diagnose.hessian(m, lambda model: model(X)), "must return one number"),
        (lambda m: fw.diagnose.hessian(m, loss, probes=1), "probes"),
        (lambda m: fw.diagnose.largest_eigenvalue(m, loss, steps=0), "steps"),
        (lambda m: fw.diagnose.landscape(m, loss, points=0), "points"),
    ],
)
def test_what_makes_no_sense_is_refused(call, complaint):
    with pytest.raises(ValueError, match=complaint):
        call(net())


def test_a_linear_loss_has_no_curvature():
    model = nn.Sequential(nn.Linear(4, 2)).double()
    got = of(fw.diagnose.hessian(model, lambda m: m(X[:, :4]).sum()))
    assert got["hessian_norm_centred"] == 0
