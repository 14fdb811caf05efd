"""Raw weights by the true fan-in, filters of both signs, and words that are not known."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from filterwise import ConversionError, convert_
from filterwise.host import effective_weight
from filterwise.initialize import initialize_
from support.fingerprint import fingerprint


@pytest.mark.parametrize(
    ("layer", "fan_in"),
    [
        (nn.Conv2d(16, 64, 3, groups=4), 4 * 9),
        (nn.Conv1d(8, 64, 5), 8 * 5),
        (nn.Linear(50, 100), 50),
        # What feeds one output channel: input channels of a group times taps.
        (nn.ConvTranspose2d(16, 64, 3), 16 * 9),
        (nn.ConvTranspose2d(16, 64, 3, groups=4), 4 * 9),
    ],
    ids=str,
)
@pytest.mark.parametrize("converted", [False, True])
def test_kaiming_takes_the_fan_in_of_a_filter(layer, fan_in, converted):
    model = nn.Sequential(copy.deepcopy(layer))
    if converted:
        convert_(model, "wa", select="*")
        with torch.no_grad():
            model[0].gain.fill_(3.0)
    report = initialize_(model, "kaiming")
    weight = model[0].weight.detach()
    # The standard error of a standard deviation from N normal draws is std / sqrt(2 N).
    limit = 5 / math.sqrt(2 * weight.numel())
    assert abs(float(weight.std()) / math.sqrt(2 / fan_in) - 1) < limit
    assert abs(float(weight.mean())) < 5 * math.sqrt(2 / fan_in / weight.numel())
    assert torch.equal(model[0].bias, torch.zeros_like(model[0].bias))
    if converted:
        assert torch.equal(model[0].gain, torch.ones(64 if fan_in != 50 else 100))
    assert report.converted == ["0"]
    assert report[0].reason.startswith(
        f"raw weight normal with standard deviation sqrt(2/{fan_in})"
    )


def test_kaiming_is_repeatable_and_uses_torchs_random_numbers():
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    torch.manual_seed(5)
    initialize_(model, "kaiming")
    first = model[0].weight.detach().clone()
    initialize_(model, "kaiming")
    assert not torch.equal(model[0].weight, first)
    torch.manual_seed(5)
    initialize_(model, "kaiming")
    assert torch.equal(model[0].weight, first)


def test_kaiming_starts_gains_again_that_depend_on_the_raw_weight():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.ReLU(), nn.Conv2d(4, 2, 3))
    convert_(model, "wn")
    initialize_(model, "kaiming")
    norms = model[0].weight.detach().double().flatten(1).norm(dim=1)
    torch.testing.assert_close(model[0].gain.detach().double(), norms, rtol=1e-6, atol=0)
    torch.testing.assert_close(effective_weight(model[0]), model[0].weight, rtol=1e-5, atol=1e-7)


def test_kaiming_leaves_what_is_frozen_and_draws_a_shared_weight_once():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    model[2].weight.requires_grad_(False)
    frozen = model[2].weight.clone()
    report = initialize_(model, "kaiming")
    assert [row.action for row in report] == ["convert", "keep", "keep"]
    assert [row.reason for row in report][1:] == ["shares its raw weight with 0", "frozen"]
    assert torch.equal(model[2].weight, frozen)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_kaiming_keeps_dtype_and_memory_format(dtype):
    layer = nn.Conv2d(8, 16, 3).to(dtype).to(memory_format=torch.channels_last)
    strides = layer.weight.stride()
    initialize_(layer, "kaiming")
    assert (layer.weight.dtype, layer.weight.stride()) == (dtype, strides)


# Sign-balanced filters.


@pytest.mark.parametrize(
    "layer", [nn.Conv2d(1, 200, 2), nn.ConvTranspose2d(2, 200, 2, groups=2)], ids=str
)
def test_balanced_filters_have_both_signs_and_their_magnitudes(layer):
    model = nn.Sequential(layer)
    rows = (
        (lambda w: w.flatten(1))
        if isinstance(layer, nn.Conv2d)
        # output channel q*(O/g)+j reads weight[q, j] here: one input channel a group
        else (lambda w: w.reshape(2 * 100, 4))
    )
    before = rows(layer.weight.detach().clone())
    one_sign = (before > 0).all(1) | (before < 0).all(1)
    assert 5 < int(one_sign.sum()) < 60  # 2^(1-4) of 200 is 25
    report = initialize_(model, "balanced")
    after = rows(model[0].weight.detach())
    assert torch.equal(after.abs(), before.abs())
    assert ((after > 0).any(1) & (after < 0).any(1)).all()
    assert torch.equal(after[~one_sign], before[~one_sign])
    assert report[0].reason == f"{int(one_sign.sum())} filters of one sign have new signs"


def test_balanced_leaves_filters_that_cannot_have_two_signs():
    layer = nn.Linear(3, 3, bias=False)
    weight = torch.tensor([[0.0, 0.0, 0.0], [0.0, -2.0, 0.0], [1.0, -1.0, 0.0]])
    with torch.no_grad():
        layer.weight.copy_(weight)
    report = initialize_(nn.Sequential(layer), "balanced")
    assert torch.equal(layer.weight, weight)
    assert (report[0].action, report[0].reason) == ("keep", "every filter has both signs")


def test_an_unknown_scheme_is_named_with_the_nearest():
    with pytest.raises(ValueError, match=r"unknown scheme 'skipint'; there are .* 'skipinit'\."):
        initialize_(nn.Sequential(), "skipint")


def test_lazy_layers_are_refused():
    with pytest.raises(ConversionError, match=r"0 \(LazyLinear, not converted\) is lazy"):
        initialize_(nn.Sequential(nn.LazyLinear(3)), "kaiming")


def test_values_are_written_all_or_not_at_all():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    # Eight filters in one row of memory: reading works, writing in place is refused by torch.
    model[1].weight = nn.Parameter(torch.randn(1, 8).expand(8, 8))
    before = fingerprint(model)
    with pytest.raises(RuntimeError):
        initialize_(model, "kaiming")
    assert fingerprint(model) == before
