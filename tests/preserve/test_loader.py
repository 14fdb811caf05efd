"""The pass over a loader, norms that are replaced, and what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import filterwise as fw
from preserve.nets import answer, gap, perturbed, pictures, settled, small
from support.fingerprint import fingerprint
from support.nets import quiet


def output(net, module, x):
    """Return a module's output in evaluation mode."""
    seen = []
    handle = net.get_submodule(module).register_forward_hook(lambda _m, _i, out: seen.append(out))
    answer(net, x)
    handle.remove()
    return seen[0].detach()


def moments(net, module, x):
    """Return mean and deviation of each channel of a module's output in evaluation mode."""
    values = output(net, module, x).movedim(1, 0).flatten(1)
    return values.mean(1), values.std(1, unbiased=False)


def test_groups_come_nearer_with_a_loader_and_each_row_has_a_figure():
    x, fresh = pictures(count=64), pictures(count=32, seed=9)
    net = settled(small(), x)
    expected = output(net, "norm", fresh)
    gaps = {}
    for name, options in {
        "as ever": {},
        "preserved": {"preserve": True},
        "with data": {"preserve": True, "loader": [(x[:32], None), [x[32:]]]},
    }.items():
        other = copy.deepcopy(net)
        with quiet():
            report = fw.convert_(other, "gn+ws", **options)
        gaps[name] = float((output(other, "norm", fresh) - expected).square().mean().sqrt())
        rows = [row for row in report if row.action in ("convert", "replace")]
        assert all((row.difference is not None) == ("preserve" in options) for row in rows)
    assert max(gaps["with data"], gaps["preserved"]) < gaps["as ever"] / 3, gaps
    assert "difference" in str(report)
    row = next(row for row in report if row.name == "norm")
    assert "running statistics went into stem; recalibrated" in row.reason
    assert 0.001 < row.difference < 1
    assert "Recalibrated on 2 batches: 4 of 4 layers and norms" in report.notes[-1]


@pytest.mark.parametrize("recipe", ["gn+ws", "gn", "in+wa", "ln+pws"])
def test_every_new_norm_has_the_originals_moments_on_one_batch(recipe):
    x = pictures(count=32)
    net = settled(small(), x)
    expected = {name: moments(net, name, x) for name in ("norm", "up_norm", "last_norm")}
    fw.convert_(net, recipe, preserve=True, loader=[x])
    for name, wanted in expected.items():
        for found, one in zip(moments(net, name, x), wanted, strict=True):
            torch.testing.assert_close(found, one, rtol=1e-6, atol=1e-6)


def test_layers_without_a_norm_have_the_originals_moments_on_one_batch():
    """GroupNorm is removed: no weight can stand for it, but its channels' moments can be met."""
    x = pictures(count=32)
    net = small()
    net.norm, net.up_norm = nn.GroupNorm(4, 16).double(), nn.GroupNorm(4, 16).double()
    expected = {"stem": moments(net, "norm", x), "up": moments(net, "up_norm", x)}
    expected["plain"] = moments(net, "plain", x)
    report = fw.convert_(net, "wa", preserve=True, loader=[x])
    for name, wanted in expected.items():
        for found, one in zip(moments(net, name, x), wanted, strict=True):
            torch.testing.assert_close(found, one, rtol=1e-6, atol=1e-6)
    assert "lost" in next(row.reason for row in report if row.name == "norm")


def test_a_new_batch_norm_gets_the_statistics_of_its_data():
    x = pictures(count=32)
    net = small()
    net.norm = perturbed(nn.GroupNorm(4, 16)).double()
    expected = moments(net, "norm", x)
    seen = []
    net.stem.register_forward_hook(lambda _m, _i, out: seen.append(out.detach()))
    fw.convert_(net, "bn+ws", preserve=True, loader=[x])
    for found, one in zip(moments(net, "norm", x), expected, strict=True):
        torch.testing.assert_close(found, one, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(net.norm.running_mean, seen[-1].mean((0, 2, 3)))
    torch.testing.assert_close(net.norm.running_var, seen[-1].var((0, 2, 3)))


def test_a_batch_norm_behind_a_changed_layer_is_moved():
    x = pictures(count=32)
    net = settled(small(), x)
    expected = moments(net, "last_norm", x)
    fw.convert_(net, "gn+ws", preserve=True, loader=[x], exclude="last*")
    assert isinstance(net.last_norm, nn.BatchNorm2d)
    for found, one in zip(moments(net, "last_norm", x), expected, strict=True):
        torch.testing.assert_close(found, one, rtol=1e-5, atol=1e-6)


def test_what_is_exact_stays_exact_with_a_loader():
    x = pictures()
    for recipe in ("keep+ws", "wa"):
        net = small()
        statistics = net.norm.running_mean.clone()
        expected = answer(net, x)
        report = fw.convert_(net, recipe, preserve=True, loader=iter([x, x]))
        assert gap(answer(net, x), expected) <= 1e-12
        assert "Recalibrated on 2 batches: 0 of" in report.notes[-1]
        if recipe == "keep+ws":
            assert torch.equal(net.norm.running_mean, statistics)


class Depthwise(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3)
        self.depthwise = nn.Conv2d(16, 16, 3, groups=16, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.last = nn.Conv2d(16, 16, 1)
        self.before = nn.BatchNorm2d(16)
        self.head = nn.Conv2d(16, 4, 1)

    def forward(self, x):
        x = self.last(torch.relu(self.norm(self.depthwise(torch.relu(self.first(x))))))
        return self.head(torch.relu(self.before(torch.relu(x)))).mean((2, 3))


def test_norms_whose_scale_nothing_takes_over_are_said():
    x = pictures(count=32)
    net = settled(perturbed(Depthwise()).double(), x)
    other = copy.deepcopy(net)
    expected = answer(net, x)
    depthwise = net.depthwise.weight.detach().clone()
    mean = moments(net, "norm", x)[0]
    with pytest.warns(fw.FilterwiseWarning, match=r"2 norms are removed whose scale.*loader="):
        report = fw.convert_(net, "wa", preserve=True)
    reasons = {row.name: row.reason for row in report}
    assert "which gets no gain to take the scale" in reasons["norm"]
    assert "no single convolution or linear layer" in reasons["before"]
    assert torch.equal(net.depthwise.weight, depthwise)
    torch.testing.assert_close(moments(net, "depthwise", x)[0], mean, rtol=1e-4, atol=1e-4)
    fw.convert_(other, "wa", preserve=True, loader=[x])
    near, far = (gap(answer(one, x), expected) for one in (other, net))
    assert near < far
    kept = settled(perturbed(Depthwise()).double(), x)
    expected = answer(kept, x)
    fw.convert_(kept, "wa", preserve=True, exclude=["norm", "before"])
    assert gap(answer(kept, x), expected) <= 1e-12


def test_a_shared_bias_a_hook_and_a_second_user_keep_a_norm_from_going_into_a_layer():
    net = small()
    net.norm.register_forward_hook(lambda *_: None)
    net.last.bias = nn.Parameter(torch.zeros(8).double())
    net.other = nn.Conv2d(8, 8, 1)
    net.other.bias = net.last.bias
    with pytest.warns(fw.FilterwiseWarning):
        report = fw.convert_(net, "wa", preserve=True)
    reasons = {row.name: row.reason for row in report}
    assert "a hook sees what passes" in reasons["norm"]
    assert "shares its bias" in reasons["last_norm"]
    assert reasons["up_norm"] == "scale and shift went into up"


def test_linear_layers_with_a_loader():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)
    ).double()
    perturbed(net)
    x = torch.rand(16, 6).double()
    expected = answer(net, x)
    other = copy.deepcopy(net)
    fw.convert_(net, "wa", select=["0", "3"], preserve=True, loader=[x])
    assert gap(answer(net, x), expected) <= 1e-12
    with pytest.warns(fw.FilterwiseWarning):
        report = fw.convert_(other, "wa", select=["0", "3"], preserve=True)
    assert "give loader" in next(row.reason for row in report if row.name == "1")


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = small()

    def forward(self, *, pictures, scale=1.0):
        if isinstance(pictures, list):
            pictures = torch.stack(pictures)
        return {"logits": self.body(pictures) * scale}


def test_batches_by_name():
    net = Named()
    x = pictures()
    expected = net.eval()(pictures=x)["logits"].detach()
    fw.convert_(net, "none+wa", preserve=True, loader=[{"pictures": x, "scale": 2.0}])
    assert gap(net(pictures=x)["logits"].detach(), expected) <= 1e-12


REFUSED = [
    ({"loader": [pictures()]}, "loader serves preserve=True alone"),
    ({"preserve": True, "loader": []}, "loader is empty"),
    ({"preserve": True, "loader": iter(())}, "may be used up"),
    ({"preserve": True, "loader": pictures()}, r"got a Tensor; for one batch give \[batch\]"),
    ({"preserve": True, "loader": "digits"}, "got a str"),
    ({"preserve": True, "loader": 7}, "got int"),
    ({"preserve": True, "loader": [("a", 1)]}, "batch 1 of loader is a tuple that starts with a"),
    ({"preserve": True, "loader": [pictures(), 3]}, "batch 2 of loader is a int"),
    ({"preserve": True, "loader": [torch.rand(2, 4, 8, 8)]}, r"does not run.*\(2, 4, 8, 8\)"),
    ({"preserve": True, "loader": [pictures() * float("nan")]}, "not finite on loader"),
]


@pytest.mark.parametrize(("options", "words"), REFUSED, ids=lambda one: str(one)[:30])
def test_refusals_leave_the_model_and_say_what_to_give(options, words):
    net = small()
    before = fingerprint(net)
    with pytest.raises(fw.ConversionError, match=words) as refused:
        fw.convert_(net, "gn+ws", **options)
    assert "The model is unchanged." in str(refused.value)
    assert fingerprint(net) == before


def test_other_refusals():
    with pytest.raises(TypeError, match="preserve must be True or False"):
        fw.convert_(small(), "gn+ws", preserve="yes")
    with torch.device("meta"):
        net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
    with pytest.raises(fw.ConversionError, match="on the meta device and has no values"):
        fw.convert_(net, "wa", preserve=True)
    net = small()
    net.offset = net.stem.offset = 3
    with pytest.raises(fw.ConversionError, match="already has an attribute offset"):
        fw.convert_(net, "keep+wa", preserve=True)


def test_fault_in_the_last_batch_undoes_everything():
    net = settled(small(), pictures(count=16))
    before = fingerprint(net)

    def batches():
        yield pictures()
        raise KeyboardInterrupt

    for recipe in ("gn+ws", "wa", "gn"):
        with pytest.raises(KeyboardInterrupt):
            fw.convert_(net, recipe, preserve=True, loader=batches())
        assert fingerprint(net) == before
