"""What ``preserve=True`` keeps to rounding."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torchvision
from timm.layers.norm_act import BatchNormAct2d, FrozenBatchNormAct2d
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

import filterwise as fw
from filterwise import host
from filterwise.methods.registry import METHODS
from preserve.nets import answer, gap, perturbed, pictures, settled, small
from support.fingerprint import fingerprint

TEXTS = [name for name in METHODS if name not in ("ews", "equinorm")]
TEXTS += [
    "ws(affine=true)",
    "wa(learn_gain=false)",
    "wa(divide=false)",
    "cwn(eps=0)",
    "wn(start=1)",
]
TEXTS += ["ws(centre=false)", "ws(like=mmcv_aws)", "pws(gamma=none)", "sws(like=timm)"]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("norm", ["keep", "none"])
def test_the_network_computes_what_it_did(norm, text):
    """A BatchNorm that stays, and one that goes: 1e-12 in float64 end to end."""
    net, x = small(), pictures()
    expected = answer(net, x)
    raw = {name: value.detach().clone() for name, value in net.named_parameters()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = fw.convert_(net, f"{norm}+{text}", preserve=True)
    assert gap(answer(net, x), expected) <= 1e-12
    figures = {row.name: row.difference for row in report if row.action == "convert"}
    assert list(figures) == ["stem", "plain", "up", "last"]
    assert all(figure is not None and figure <= 1e-12 for figure in figures.values())
    for name, value in net.named_parameters():
        if name in raw and name.endswith("weight") and name in dict(net.named_parameters()):
            assert torch.equal(value, raw[name]), name
    if norm == "none":
        assert not [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    assert net.training
    folded = fw.fold(net, example_input=x)
    assert gap(answer(folded, x), expected) <= 1e-12
    assert "gain" not in "".join(folded.state_dict())


@pytest.mark.parametrize("text", ["ws", "wa", "pws", "wn", "centered", "ws(affine=true)"])
def test_what_the_method_does_not_learn_is_a_buffer(text):
    net = small()
    fw.convert_(net, f"keep+{text}", preserve=True)
    method = fw.Recipe.parse(f"keep+{text}").method
    parameters, buffers = dict(net.stem.named_parameters()), dict(net.stem.named_buffers())
    assert ("gain" in parameters) == method.learns_gain
    assert ("gain" in buffers) == (not method.learns_gain)
    assert ("offset" in parameters) == method.has_offset
    assert ("offset" in buffers) == (method.shifts and not method.has_offset)
    assert fw.describe(net)["stem"] == str(method)
    assert "preserve=True" in repr(net.stem)


def test_equinorm_is_exact_in_evaluation_and_near_in_training():
    net = small()
    net.up = nn.Conv2d(16, 16, 3, padding=1).double()
    x = pictures(count=32)
    settled(perturbed(net), x)
    expected = answer(net, x)
    training = copy.deepcopy(net)(x).detach()
    fw.convert_(net, "keep+equinorm", preserve=True, loader=[(x[:16], 0), (x[16:], 1)])
    assert gap(answer(net, x), expected) <= 1e-12
    assert int(net.stem.num_batches_tracked) == 2
    torch.testing.assert_close(net.stem.input_mean, x.mean((0, 2, 3)))
    assert gap(net(x).detach(), training) < 0.1
    single = small()
    single.up = nn.Identity()
    with pytest.raises(fw.ConversionError, match=r"without data.*give loader=.*is unchanged"):
        fw.convert_(single, "keep+equinorm", preserve=True)


def test_equinorm_without_affine_and_with_the_papers_geometry():
    for method in (
        fw.EquilibriumNormalization(affine=False),
        fw.EquilibriumNormalization(geometry="paper", single_pass=True),
    ):
        net = small()
        net.up = nn.Conv2d(16, 16, 3, padding=1).double()
        x = pictures()
        expected = answer(net, x)
        fw.convert_(net, fw.Recipe("none", method), preserve=True, loader=[x])
        assert gap(answer(net, x), expected) <= 1e-12
        assert gap(answer(fw.fold(net), x), expected) <= 1e-12


def test_equivariant_ws_is_exact_for_one_cell_and_the_nearest_for_several():
    net = small()
    x, raw = pictures(), small().stem.weight.detach()
    expected = answer(net, x)
    fw.convert_(
        net, fw.Recipe("keep", fw.EquivariantWeightStandardization(label=[0])), preserve=True
    )
    assert gap(answer(net, x), expected) <= 1e-12
    label = torch.tensor([0, 1, 1]).view(3, 1, 1)
    method = fw.EquivariantWeightStandardization(label=label)
    net = small()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fw.FilterwiseWarning)
        report = fw.convert_(net, fw.Recipe("keep", method), select="stem", preserve=True)
    figure = next(row.difference for row in report if row.name == "stem")
    found = host.effective_weight(net.stem).detach()
    assert 1e-3 < figure < 1
    error = (found - raw).square().sum()
    with torch.no_grad():
        for name, step in (("gain", 1.01), ("gain", 0.99), ("offset", 1.01), ("offset", 0.99)):
            other = copy.deepcopy(net.stem)
            getattr(other, name).mul_(step)
            assert (host.effective_weight(other) - raw).square().sum() >= error


NORMS = {
    "frozen": lambda: FrozenBatchNorm2d(16),
    "without affine": lambda: nn.BatchNorm2d(16, affine=False),
    "synchronized": lambda: nn.SyncBatchNorm(16),
    "fused": lambda: BatchNormAct2d(16),
    "fused and frozen": lambda: FrozenBatchNormAct2d(16),
}


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("recipe", ["keep+ws", "wa"])
def test_every_batch_norm_behind_a_layer(kind, recipe):
    net = small()
    norm = NORMS[kind]().double()
    for name, value in net.norm.state_dict().items():
        if hasattr(norm, name) and getattr(norm, name) is not None:
            getattr(norm, name).data.copy_(value)
    net.norm = norm
    x = pictures()
    expected = answer(net, x)
    fw.convert_(net, recipe, preserve=True)
    assert gap(answer(net, x), expected) <= 1e-12
    if recipe == "wa":
        assert not [m for m in net.norm.modules() if hasattr(m, "running_mean")]


def test_a_frozen_norm_that_becomes_batch_norm_keeps_its_statistics():
    net = small()
    frozen = FrozenBatchNorm2d(16).double()
    frozen.load_state_dict(
        {k: v for k, v in net.norm.state_dict().items() if k != "num_batches_tracked"}
    )
    net.norm = frozen
    x = pictures()
    expected = answer(net, x)
    fw.convert_(net, "bn+ws", preserve=True, loader=[x])
    assert isinstance(net.norm, nn.BatchNorm2d)
    assert gap(answer(net, x), expected) <= 1e-12


def test_float32_half_and_a_resnet():
    torch.manual_seed(0)
    net = perturbed(torchvision.models.resnet18(num_classes=4)).eval()
    x = torch.rand(2, 3, 32, 32)
    expected = answer(net, x)
    other = copy.deepcopy(net)
    report = fw.convert_(net, "wa", preserve=True)
    assert gap(answer(net, x), expected) < 1e-4
    assert max(row.difference for row in report if row.difference is not None) < 1e-5
    assert {row.action for row in report if row.name.endswith("bn1")} == {"remove"}
    report = fw.convert_(other.bfloat16(), "bn+ws", preserve=True)
    assert max(row.difference for row in report if row.difference is not None) < 0.03


def test_extreme_filters():
    """Constant, zero and tiny filters keep their function, and have finite gradients."""
    net = nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Conv2d(6, 2, 3)).double()
    with torch.no_grad():
        net[0].weight[0] = 0.0
        net[0].weight[1] = 0.3
        net[0].weight[2] *= 1e-12
        net[0].weight[3] += 1e6
    raw = net[0].weight.detach().clone()
    for recipe in ("keep+ws", "keep+wa(eps=0)", "keep+pws(gamma=none)", "keep+sws", "keep+cwn"):
        other = copy.deepcopy(net)
        fw.convert_(other, recipe, preserve=True)
        found = host.effective_weight(other[0]).detach()
        torch.testing.assert_close(found, raw, rtol=1e-12, atol=1e-14)
        other(torch.rand(1, 4, 6, 6).double()).sum().backward()
        assert torch.isfinite(other[0].weight.grad).all()


def test_nothing_but_the_added_changes_and_an_error_undoes_all():
    net = small()
    before = fingerprint(net)
    state = torch.get_rng_state()
    loader = [pictures(), torch.ones(2, 5).double()]
    with pytest.raises(fw.ConversionError, match="does not run on a batch of loader"):
        fw.convert_(net, "wa", preserve=True, loader=loader)
    assert fingerprint(net) == before
    assert torch.equal(torch.get_rng_state(), state)
    fw.convert_(net, "keep+ws", preserve=True)
    assert torch.equal(torch.get_rng_state(), state)
    fw.unconvert_(net)
    assert fingerprint(net) == before


def test_training_from_the_preserved_start_lowers_the_loss():
    for recipe in ("keep+ws", "gn+ws", "wa", "pws"):
        net, x = small(torch.float32), pictures(torch.float32, 8)
        target = torch.arange(8) % 5
        fw.convert_(net, recipe, preserve=True)
        net.train()
        optimizer = torch.optim.SGD(fw.param_groups(net, 0.0), lr=0.01)
        fixed = {n: b.clone() for n, b in net.named_buffers() if n.endswith(("gain", "offset"))}
        losses = []
        for _ in range(4):
            optimizer.zero_grad()
            with fw.defer(net, enabled=True):
                half = nn.functional.cross_entropy(net(x[:4]), target[:4]) / 2
                half.backward()
            with fw.defer(net, enabled=False):
                other = nn.functional.cross_entropy(net(x[4:]), target[4:]) / 2
                other.backward()
            losses.append(float(half.detach() + other.detach()))
            optimizer.step()
        assert losses[-1] < losses[0], recipe
        for name, value in fixed.items():
            assert torch.equal(net.get_buffer(name), value)


def test_deferral_and_every_kernel_with_fixed_gains_and_offsets():
    x = pictures(torch.float32)
    found = []
    for kernel in ("eager", "auto"):
        net = small(torch.float32)
        fw.convert_(net, "keep+ws", preserve=True, kernel=kernel)
        net.eval()
        net(x).square().mean().backward()
        found.append([net(x).detach(), net.stem.weight.grad, net.up.weight.grad])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_check_and_initialize_know_the_fixed_gain():
    net = nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)).double()
    net[0].weight.data.mul_(3)
    fw.convert_(net, "ws", preserve=True)
    assert not [one for one in fw.check(net) if "normalizes" in one.what]
    fw.initialize_(net, "kaiming")
    assert torch.equal(net[0].gain, torch.ones(8).double())
    assert torch.equal(net[0].offset, torch.zeros(8).double())
