"""Gains and biases from the outputs on a batch."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from filterwise import ConversionError, convert_
from filterwise.initialize import initialize_
from support.fingerprint import fingerprint


class Chain(nn.Sequential):
    """Convolutions, a transposed one and a linear layer, a batch norm and a dropout between."""

    def __init__(self):
        super().__init__(
            nn.Conv2d(3, 8, 3, bias=True),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 6, 3, groups=2),
            nn.Dropout(0.5),
            nn.ReLU(),
            nn.ConvTranspose2d(6, 4, 3, groups=2),
            nn.Flatten(),
            nn.Linear(4 * 36, 5),
        )


def chain(recipe):
    model = Chain().double().eval()
    with torch.no_grad():
        model[3].bias.fill_(7.0)
    convert_(model, recipe, select="*")
    return model


def outputs(model, x):
    """Return what each converted layer puts out, by its place."""
    found = {}
    for name, module in model.named_children():
        x = module(x)
        found[int(name)] = x.detach()
    return found


def test_pws_from_data_gives_every_output_variance_two():
    model, x = chain("keep+pws"), torch.randn(7, 3, 8, 8, dtype=torch.float64) * 3 + 1
    report = initialize_(model, "data", input=x)
    found = outputs(model, x)
    for place in (0, 3, 6, 8):
        assert float(found[place].var(correction=0)) == pytest.approx(2.0, rel=1e-9)
        assert model[place].gain.unique().numel() == 1
        assert torch.equal(model[place].bias, torch.zeros_like(model[place].bias))
    assert report.converted == ["0", "3", "6", "8"]
    alpha = model[3].gain[0].item()
    assert report[1].reason == f"gain {alpha:.4g}, with which the output's variance is 2"


@pytest.mark.parametrize("recipe", ["keep+wn", "keep+cwn"])
def test_wn_from_data_gives_every_channel_mean_zero_and_deviation_one(recipe):
    model, x = chain(recipe), torch.randn(7, 3, 8, 8, dtype=torch.float64) * 3 + 1
    initialize_(model, "data", input=x)
    found = outputs(model, x)
    for place in (0, 3, 6, 8):
        channels = found[place].transpose(0, 1).flatten(1)
        mean, deviation = channels.mean(1), channels.std(1, correction=0)
        torch.testing.assert_close(mean, torch.zeros_like(mean), rtol=0, atol=1e-9)
        torch.testing.assert_close(deviation, torch.ones_like(deviation), rtol=1e-9, atol=0)


def test_the_formula_of_the_first_layer():
    model, x = chain("keep+wn"), torch.randn(7, 3, 8, 8, dtype=torch.float64)
    initialize_(model, "data", input=x)
    unit = model[0].weight / model[0].weight.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1)
    t = nn.functional.conv2d(x, unit).transpose(0, 1).flatten(1).detach()
    gain = 1 / t.std(1, correction=0)
    torch.testing.assert_close(model[0].gain.detach(), gain, rtol=1e-10, atol=0)
    torch.testing.assert_close(model[0].bias.detach(), -t.mean(1) * gain, rtol=1e-9, atol=1e-10)


def test_the_pass_moves_nothing_but_gains_and_biases():
    model = chain("keep+pws").train()
    x = torch.randn(7, 3, 8, 8, dtype=torch.float64)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random = torch.get_rng_state()
    initialize_(model, "data", input=x)
    assert torch.equal(torch.get_rng_state(), random)  # the dropout's are given back
    for name, tensor in model.state_dict().items():
        changes = name.endswith(("gain", "bias")) and not name.startswith("1.")
        assert changes or torch.equal(tensor, before[name]), name


def test_a_gain_without_a_bias_and_a_layer_that_is_not_used():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.ReLU())
    model.add_module("spare", nn.Conv2d(3, 4, 3))
    model.forward = lambda x: model[1](model[0](x))
    convert_(model, "wn", select="*")
    report = initialize_(model, "data", input=torch.randn(3, 3, 6, 6))
    assert report[0].reason == (
        "gain, with which each channel has standard deviation 1; no bias for its mean"
    )
    assert (report[1].action, report[1].reason) == ("keep", "not used with this input")


def test_a_sample_without_a_batch_axis():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3)).double()
    convert_(model, "wn", select="*")
    x = torch.randn(3, 9, 9, dtype=torch.float64)
    initialize_(model, "data", input=x)
    found = outputs(model, x)[0].flatten(1)
    torch.testing.assert_close(found.std(1, correction=0), torch.ones(4, dtype=torch.float64))


def test_a_reused_layer_is_set_at_its_first_use():
    layer = nn.Linear(6, 6).double()
    model = nn.Sequential(layer, nn.ReLU(), layer)
    convert_(model, "pws", select="*")
    x = torch.randn(50, 6, dtype=torch.float64)
    initialize_(model, "data", input=x)
    assert model[0](x).var(correction=0).item() == pytest.approx(2.0, rel=1e-9)


def test_a_constant_channel_keeps_its_start():
    model = nn.Sequential(nn.Linear(6, 3, bias=False))
    with torch.no_grad():
        model[0].weight[1] = 0
    convert_(model, "wn(start=5)", select="*")
    report = initialize_(model, "data", input=torch.randn(50, 6))
    assert model[0].gain[1].item() == 5.0
    assert report[0].reason.endswith("; 1 constant channels stay")


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        (torch.ones(7, 3, 8, 8), r"the output of 0 \(Conv2d, pws\) is constant"),
        (
            torch.full((7, 3, 8, 8), math.nan),
            r"the output of 0 \(Conv2d, pws\) is constant, or not",
        ),
    ],
    ids=["constant", "nan"],
)
def test_a_batch_that_tells_nothing_is_refused_whole(batch, words):
    model = chain("keep+pws")
    before = fingerprint(model)
    with pytest.raises(ConversionError, match=words):
        initialize_(model, "data", input=batch.double())
    assert fingerprint(model) == before


def test_a_model_that_fails_half_way_is_as_it_was():
    model = chain("keep+wn")
    model[5].forward = lambda x: x.no_such_method()
    before = fingerprint(model)
    with pytest.raises(AttributeError):
        initialize_(model, "data", input=torch.randn(7, 3, 8, 8, dtype=torch.float64))
    assert fingerprint(model) == before


def test_methods_without_a_start_from_data_are_refused():
    model = nn.Sequential(nn.Linear(16, 16))
    convert_(model, "wa", select="*")
    with pytest.raises(ConversionError, match=r"0 \(Linear, wa\) has no start from data"):
        initialize_(model, "data", input=torch.randn(2, 16))
