"""Parameter groups: every parameter once, gains without decay by role."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn
from torch.nn.utils import parametrizations

import filterwise as fw

pytestmark = pytest.mark.filterwarnings("ignore::filterwise.NormalizationWarning")


def names_of(net, group):
    by_id = {id(value): name for name, value in net.named_parameters()}
    return {by_id[id(value)] for value in group["params"]}


@pytest.mark.parametrize("recipe", ["gn+ws(affine=true)", "wa", "pws", "equinorm", "wn", "sws"])
def test_every_parameter_once_and_only_weights_decay(recipe):
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), nn.Linear(8, 2))
    fw.convert_(net, recipe, select=["0", "2"])
    net[0].weight.requires_grad_(False)
    decayed, free = fw.param_groups(net, 0.01)
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.01, 0.0)
    assert names_of(net, decayed) == {"0.weight", "2.weight", "3.weight"}
    assert len(decayed["params"]) + len(free["params"]) == len(list(net.parameters()))
    torch.optim.SGD(fw.param_groups(net, 0.01), lr=0.1)


def test_gains_of_other_libraries_are_not_decayed():
    net = timm.create_model("nf_resnet50")
    decayed, free = fw.param_groups(net, 1.0)
    gains = {name for name, _ in net.named_parameters() if name.endswith("gain")}
    assert gains <= names_of(net, free)
    assert sum(name.endswith("weight") for name in names_of(net, decayed)) > 50
    weight_norm = parametrizations.weight_norm(nn.Conv2d(8, 8, 3))
    decayed, free = fw.param_groups(weight_norm, 1.0)
    assert names_of(weight_norm, decayed) == {"parametrizations.weight.original1"}


def test_tied_parameter_is_in_one_group_and_layer_norm_in_none_that_decays():
    net = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3), nn.LayerNorm([8, 4, 4]))
    net[1].weight = net[0].weight
    decayed, free = fw.param_groups(net, 1.0)
    assert names_of(net, decayed) == {"0.weight"}
    assert {"2.weight", "2.bias"} <= names_of(net, free)


def test_negative_decay_is_refused():
    with pytest.raises(ValueError, match="weight_decay"):
        fw.param_groups(nn.Linear(2, 2), -1)


# Adaptive gradient clipping


def published(weight, gradient, clipping=0.01, eps=1e-3):
    """Clip a filter matrix as Brock et al. 2021 write it (Eq. 3), one filter after the other."""
    out = gradient.double().clone()
    for w, g in zip(weight.detach().double(), out, strict=True):
        size = max(float((w * w).sum()) ** 0.5, eps)
        ratio = float((g * g).sum()) ** 0.5 / size
        if ratio > clipping:
            g.mul_(clipping / ratio)
    return out


def vector(weight, gradient):
    return published(weight.reshape(1, -1), gradient.reshape(1, -1)).reshape(weight.shape)


def per_output(weight, gradient, groups=1):
    """The same for a transposed weight (C, O/g, k, k), whose filters lie along axis 1."""
    parts = []
    for w, g in zip(weight.chunk(groups), gradient.chunk(groups), strict=True):
        rows = [t.transpose(0, 1).flatten(1) for t in (w, g)]
        parts.append(published(*rows).reshape(w.transpose(0, 1).shape).transpose(0, 1))
    return torch.cat(parts)


class Hosts(nn.Module):
    """Every place that filters lie in, and a gain as timm shapes it."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.grouped = nn.Conv2d(16, 8, 3, groups=2)
        self.up = nn.ConvTranspose2d(8, 6, 3, groups=2)
        self.norm = nn.GroupNorm(2, 6)
        self.scale = nn.Parameter(torch.ones(6, 1, 1, 1))
        self.unused = nn.Linear(6, 4)
        self.head = nn.Linear(6, 5)

    def forward(self, x):
        x = self.norm(self.up(torch.relu(self.grouped(torch.relu(self.first(x))))))
        return self.head((x * self.scale.view(1, 6, 1, 1)).mean((2, 3)))


def with_gradients(recipe=None, dtype=torch.float64):
    torch.manual_seed(3)
    net = Hosts()
    if recipe is not None:
        fw.convert_(net, f"keep+{recipe}", select=["first", "grouped", "up"])
    net = net.to(dtype)
    with torch.no_grad():
        for parameter in net.parameters():
            # From far below the bound to far above it, and some units at zero.
            parameter.mul_(torch.rand(parameter.shape) + 0.5)
            parameter.grad = torch.randn_like(parameter)
            sizes = torch.logspace(-5, 1, len(parameter), dtype=dtype)
            parameter.grad.mul_(sizes.view(-1, *[1] * (parameter.dim() - 1)))
            parameter[:1] = 0
    net.unused.weight.grad = net.unused.bias.grad = None
    return net


@pytest.mark.parametrize("recipe", [None, "wa", "ws(affine=true)"])
def test_gradients_are_clipped_as_published(recipe):
    net = with_gradients(recipe)
    expected = {}
    for name, parameter in net.named_parameters():
        w, g = parameter.detach(), parameter.grad
        if g is None:
            continue
        if name.startswith("head"):
            expected[name] = g.clone()
        elif name == "up.weight":
            expected[name] = per_output(w, g, groups=2)
        elif name in ("first.weight", "grouped.weight"):
            expected[name] = published(w.flatten(1), g.flatten(1)).view(w.shape)
        else:
            expected[name] = vector(w, g)
    changed = {name for name, want in expected.items() if not torch.equal(want, grad(net, name))}
    before = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
    fw.clip_grad_adaptive_(net)
    for name, want in expected.items():
        torch.testing.assert_close(grad(net, name), want, rtol=1e-13, atol=0, msg=name)
        torch.testing.assert_close(net.get_parameter(name), before[name], rtol=0, atol=0)
    assert {"first.weight", "grouped.weight", "up.weight", "scale"} <= changed
    assert net.unused.weight.grad is None


def grad(net, name):
    return net.get_parameter(name).grad


def test_clipping_is_timms_but_for_gains_of_several_dimensions():
    from timm.utils.agc import adaptive_clip_grad

    ours = with_gradients(dtype=torch.float32)
    theirs = with_gradients(dtype=torch.float32)
    fw.clip_grad_adaptive_(ours)
    left_out = ("head", "up")  # timm: by the input channel in a transposed weight
    adaptive_clip_grad([p for n, p in theirs.named_parameters() if not n.startswith(left_out)])
    for name, parameter in theirs.named_parameters():
        if parameter.grad is not None and not name.startswith(left_out) and name != "scale":
            torch.testing.assert_close(grad(ours, name), parameter.grad, rtol=1e-5, atol=0)
    assert not torch.allclose(grad(ours, "scale"), theirs.scale.grad)


def test_clipping_takes_options_half_precision_and_wrappers():
    net = with_gradients()
    expected = published(net.first.weight.flatten(1), grad(net, "first.weight").flatten(1), 0.1, 1)
    fw.clip_grad_adaptive_(nn.DataParallel(net), clipping=0.1, eps=1)
    torch.testing.assert_close(grad(net, "first.weight").flatten(1), expected)
    half = with_gradients(dtype=torch.float16)
    weight, gradient = half.first.weight.double(), grad(half, "first.weight").double()
    fw.clip_grad_adaptive_(half)
    expected = published(weight.flatten(1), gradient.flatten(1))
    torch.testing.assert_close(
        grad(half, "first.weight").double().flatten(1), expected, rtol=1e-3, atol=1e-7
    )
    compiled = torch.compile(with_gradients(), backend="eager")
    fw.clip_grad_adaptive_(compiled)
    torch.testing.assert_close(compiled.head.weight.grad, with_gradients().head.weight.grad)


def test_clipping_in_an_open_window_is_refused():
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 4, 3), nn.Flatten())
    fw.convert_(net, "wa", select="*")
    with fw.defer(net):
        net(torch.randn(1, 3, 5, 5)).square().sum().backward()
    with pytest.raises(fw.DeferralError, match="adaptive gradient clipping while 0 holds"):
        fw.clip_grad_adaptive_(net)
    with fw.defer(net, enabled=False):
        net(torch.randn(1, 3, 5, 5)).square().sum().backward()
    fw.clip_grad_adaptive_(net)
    bound = 0.01 * net[0].weight.flatten(1).norm(dim=1)
    assert bool((net[0].weight.grad.flatten(1).norm(dim=1) <= 1.0001 * bound).all())


def test_the_classifier_is_found_anew_when_the_head_changes():
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4))
    fw.clip_grad_adaptive_(net)
    net.append(nn.Linear(4, 2))
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    fw.clip_grad_adaptive_(net)
    assert [bool((net[i].weight.grad == 1).all()) for i in (0, 2, 3)] == [False, False, True]


@pytest.mark.parametrize("options", [{"clipping": 0}, {"eps": -1.0}, {"clipping": float("nan")}])
def test_clipping_by_nothing_is_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        fw.clip_grad_adaptive_(nn.Linear(2, 2), **options)


def test_a_sparse_gradient_is_refused_by_name():
    net = nn.Sequential(nn.Embedding(4, 3, sparse=True), nn.Linear(3, 2))
    net(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match=r"gradient of 0.weight is torch.sparse"):
        fw.clip_grad_adaptive_(net)
