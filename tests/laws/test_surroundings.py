"""Laws 31 and 32: compiling and exporting; what the library says of itself."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import filterwise as fw
from filterwise import host
from filterwise.methods.registry import METHODS
from support.cases import CASES
from support.compare import assert_close
from support.laws import case_law
from support.nets import NET_CASES, NetCase, batch, quiet, train

KEEP = [case for case in NET_CASES if case.norm == "keep"]


class Small(nn.Module):
    """Two layers and a reused one, so that compiling stays quick."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3)
        self.second = nn.Conv2d(8, 8, 3, groups=2)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.second(torch.relu(self.first(x)))))


def small(case: NetCase) -> nn.Module:
    torch.manual_seed(5)
    net = Small().double()
    case.convert(net, exclude=None)
    return net


class Counter:
    """A backend that runs the graph as it is, and counts how often it was asked."""

    def __init__(self) -> None:
        self.compiled = 0

    def __call__(self, graph, _):
        self.compiled += 1
        return graph.forward


@case_law(31, KEEP, rejects={"breaks_the_graph": "keep+ws", "recompiles": "keep+wa"})
def test_law31_compiles_once_for_two_steps(case: NetCase):
    """One graph without a break, and none new at the second step; gradients as without."""
    net = small(case)
    plain = copy.deepcopy(net)
    torch.compiler.reset()
    counter = Counter()
    compiled = torch.compile(net, fullgraph=True, backend=counter)
    for model in (compiled, plain):
        optimizer = torch.optim.SGD(
            net.parameters() if model is compiled else plain.parameters(), 0.1
        )
        with quiet():
            for step in range(2):
                optimizer.zero_grad()
                model(batch(torch.float64, seed=step, size=7)).square().mean().backward()
                optimizer.step()
    assert counter.compiled == 1
    for (name, found), expected in zip(net.named_parameters(), plain.parameters(), strict=True):
        allowed = 1e-12 * expected.detach().abs().max()
        assert_close(found, expected, absolute=allowed, what=name)


@pytest.mark.parametrize("case", KEEP, ids=lambda case: case.id)
def test_law31_a_folded_model_exports(case: NetCase):
    """`torch.export` of what `fold` gives answers as the model, and computes no weight."""
    net = small(case)
    train(net, 1)
    net.eval()
    x = batch(torch.float64, size=7)
    program = torch.export.export(fw.fold(net), (x,))
    out = net(x)
    assert_close(program.module()(x), out, absolute=1e-12 * out.detach().abs().max())
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert called == {"aten.conv2d.default", "aten.relu.default"}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_law32_the_text_rebuilds_equal_options(case):
    """A recipe's text names every non-default option and parses back to itself."""
    method = case.method()
    recipe = fw.Recipe("gn", method)
    if case.cells:
        assert "labels" in str(method)
        return
    assert fw.Recipe.parse(str(recipe)) == recipe
    assert str(fw.Recipe.parse(str(recipe))) == str(recipe)
    for option in method.options():
        assert f"{option}=" in str(method)
    assert method == type(method)(**method.all_options())


@case_law(32, NET_CASES, rejects={"says_nothing": "keep+ws", "decays_gains": "keep+wa"})
def test_law32_it_says_what_it_is(case: NetCase):
    """The repr and `describe` name the method; `param_groups` holds every parameter once."""
    net = case.converted()
    for name, layer in host.converted(net):
        assert str(case.method) in repr(layer)
        assert fw.describe(net)[name] == str(case.method)
    decayed, free = fw.param_groups(net, 0.1)
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.1, 0.0)
    every = [id(p) for group in (decayed, free) for p in group["params"]]
    assert sorted(every) == sorted({id(p) for p in net.parameters()})
    names = {id(p): name.rpartition(".")[2] for name, p in net.named_parameters()}
    assert {names[id(p)] for p in decayed["params"]} == {"weight"}
    assert not [p for p in free["params"] if names[id(p)] == "weight" and p.dim() > 1]


@pytest.mark.parametrize("shape", [(-1,), (-1, 1, 1, 1)], ids=["(O,)", "(O,1,1,1)"])
def test_law32_gains_of_any_dimensions_are_not_decayed(shape):
    from timm.layers import ScaledStdConv2d

    layer = ScaledStdConv2d(3, 8, 3)
    layer.gain = nn.Parameter(layer.gain.detach().view(shape))
    decayed, free = fw.param_groups(layer, 0.1)
    assert [p is layer.weight for p in decayed["params"]] == [True]
    assert any(p is layer.gain for p in free["params"])


def test_law32_the_table_of_methods_agrees_with_the_registry():
    for info, (name, cls) in zip(fw.methods(), METHODS.items(), strict=True):
        assert (info.name, info.title, info.source) == (name, cls.title, cls.source)
        assert (info.formula, info.needs_norm) == (cls.formula, cls.needs_norm)
        if not cls.cells:
            assert info.options == cls().all_options()
