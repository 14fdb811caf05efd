"""Norms that no recipe names: values, gradients and running statistics against formulas."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from filterwise.lab.errors import UsageError
from filterwise.lab.nets import build
from filterwise.lab.training.norms import (
    InterleavedGroupNorm,
    PartialBatchNorm2d,
    SwitchableNorm2d,
    change_norms,
)
from filterwise.lab.training.settings import NormSettings
from filterwise.lab.training.train import train
from support.trainings import settings


@pytest.fixture
def x():
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(7, 6, 3, 5, generator=generator, dtype=torch.float64)
    return (2 * wide + torch.arange(6.0).view(1, 6, 1, 1)).requires_grad_()


def perturbed(norm):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator))
    return norm.double()


def same_gradients(one, other, x, *parameters):
    weights = torch.randn(one.shape, generator=torch.Generator().manual_seed(2), dtype=one.dtype)
    ours = torch.autograd.grad((one * weights).sum(), [x, *parameters])
    theirs = torch.autograd.grad((other * weights).sum(), [x, *parameters])
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("fraction", "samples"), [(0.25, 2), (0.5, 4), (1.0, 7)])
def test_statistics_of_the_first_part(x, fraction, samples):
    norm = perturbed(PartialBatchNorm2d(6))
    norm.fraction = fraction
    found = norm(x)
    part = x[:samples].transpose(0, 1).reshape(6, -1)
    mean = part.sum(1) / part.shape[1]
    variance = ((part - mean[:, None]) ** 2).sum(1) / part.shape[1]
    deviation = torch.sqrt(variance + norm.eps)
    wanted = torch.stack(
        [(x[:, c] - mean[c]) / deviation[c] * norm.weight[c] + norm.bias[c] for c in range(6)], 1
    )
    torch.testing.assert_close(found, wanted)
    same_gradients(found, wanted, x, norm.weight, norm.bias)


def test_running_statistics_are_torchs_on_the_part(x):
    ours, theirs = PartialBatchNorm2d(6, momentum=0.3).double(), nn.BatchNorm2d(6, momentum=0.3)
    ours.fraction = 0.5
    theirs.double()
    for batch in (x, x * 2, x - 1):
        ours(batch)
        theirs(batch[:4])
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


def test_one_value_a_channel_is_refused_as_by_torch():
    norm = PartialBatchNorm2d(4)
    norm.fraction = 0.25
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        norm(torch.rand(4, 4, 1, 1))


def test_every_second_channel_is_a_group(x):
    norm = perturbed(InterleavedGroupNorm(2, 6))
    found = norm(x)
    wanted = torch.empty_like(x)
    for first in range(2):
        members = [first, first + 2, first + 4]
        group = x[:, members].flatten(1)
        mean, variance = group.mean(1), group.var(1, correction=0)
        for c in members:
            scaled = (x[:, c] - mean[:, None, None]) / (variance + norm.eps).sqrt()[:, None, None]
            wanted[:, c] = scaled * norm.weight[c] + norm.bias[c]
    torch.testing.assert_close(found, wanted)
    same_gradients(found, wanted, x, norm.weight, norm.bias)


@pytest.mark.parametrize(
    ("kind", "formula"),
    [
        (0, lambda x: functional.instance_norm(x)),
        (1, lambda x: functional.layer_norm(x, x.shape[1:])),
        (2, lambda x: functional.batch_norm(x, None, None, training=True)),
    ],
)
def test_switchable_norms_corners_are_torchs(x, kind, formula):
    norm = SwitchableNorm2d(6).double()
    with torch.no_grad():
        norm.mean_shares[kind] = norm.variance_shares[kind] = 100.0
    torch.testing.assert_close(norm(x), formula(x))


def test_switchable_norm(x):
    norm = perturbed(SwitchableNorm2d(6))
    found = norm(x)
    shares = norm.mean_shares, norm.variance_shares
    p, q = (values.exp() / values.exp().sum() for values in shares)
    rows = []
    for n in range(len(x)):
        channels = []
        for c in range(6):
            sets = x[n, c], x[n], x[:, c]
            mean = sum(p[k] * values.mean() for k, values in enumerate(sets))
            variance = sum(q[k] * values.var(correction=0) for k, values in enumerate(sets))
            scaled = (x[n, c] - mean) / (variance + norm.eps).sqrt()
            channels.append(scaled * norm.weight[c] + norm.bias[c])
        rows.append(torch.stack(channels))
    wanted = torch.stack(rows)
    torch.testing.assert_close(found, wanted)
    same_gradients(found, wanted, x, *norm.parameters())
    torch.testing.assert_close(norm.running_mean, 0.1 * x.mean((0, 2, 3)))
    running = 0.9 + 0.1 * x.var((0, 2, 3), correction=0)
    torch.testing.assert_close(norm.running_var, running)


def test_a_sample_alone_is_judged_by_running_statistics(x):
    norm = perturbed(SwitchableNorm2d(6)).eval()
    torch.testing.assert_close(norm(x[:1]), norm(x)[:1])


def changed(recipe, net="plain", **values):
    model, _ = build(net, recipe, 3, 10, 0.5)
    model = change_norms(model, NormSettings(**values))
    return [m for m in model.modules() if "Norm" in type(m).__name__]


def test_what_settings_make_of_a_network():
    assert {type(m) for m in changed("bn", fraction=0.25)} == {PartialBatchNorm2d}
    assert {type(m) for m in changed("gn+ws", interleaved=True)} == {InterleavedGroupNorm}
    assert {type(m) for m in changed("bn+ws", kind="switchable")} == {SwitchableNorm2d}
    assert {type(m) for m in changed("bn", kind="synchronized")} == {nn.SyncBatchNorm}
    for recipe, kind in (("bn", "recipe"), ("gn", "recipe"), ("bn", "switchable")):
        for norm in changed(recipe, kind=kind, momentum=0.003, eps=1e-3, scale=False):
            assert norm.eps == 1e-3
            assert getattr(norm, "momentum", 0.003) == 0.003
            assert norm.weight is None
            assert norm.bias is not None
            norm(torch.rand(3, norm.bias.numel(), 4, 4)).sum().backward()


def test_a_networks_own_norms_are_not_touched():
    with pytest.raises(UsageError, match="no activation norm"):
        changed("pws", net="pws_resnet50", scale=False)


@pytest.mark.parametrize(
    ("recipe", "values", "words"),
    [
        ("wa", {"kind": "switchable"}, "no activation norm"),
        ("gn", {"fraction": 0.25}, "no batch norm"),
        ("gn", {"kind": "synchronized"}, "no batch norm"),
        ("bn", {"interleaved": True}, "no group norm"),
    ],
)
def test_norms_that_are_not_there(recipe, values, words):
    with pytest.raises(UsageError, match=words):
        changed(recipe, **values)


@pytest.mark.parametrize(
    "norms", [{"kind": "switchable"}, {"fraction": 0.25}, {"momentum": 0.003, "scale": False}]
)
def test_runs_with_changed_norms(tmp_path, norms):
    wanted = settings(model={"recipe": "bn", "norms": norms}, optimization={"epochs": 1})
    record = train(wanted, tmp_path)
    assert record.status == "finished"
    assert record.curve[-1]["train_loss"] < 2.5
