"""Laws 22 to 25: conversion, its inverse, its refusals, and folding."""

from __future__ import annotations

import copy
from unittest.mock import patch

import pytest
import torch
from torch import nn

import filterwise as fw
from filterwise import host
from support.compare import assert_close, assert_same
from support.fingerprint import fingerprint
from support.laws import case_law
from support.nets import NET_CASES, NetCase, batch, quiet, train
from support.tolerances import OUTPUT

KEEP = [case for case in NET_CASES if case.norm == "keep"]
ADDED = ("gain", "offset", "input_mean", "num_batches_tracked")


def added(name: str) -> bool:
    return name.rpartition(".")[2] in ADDED


@case_law(
    22,
    KEEP,
    rejects={
        "replaces_parameters": "keep+ws",
        "draws_at_conversion": "keep+wa",
        "thaws_gains": "keep+wa",
        "loses_hooks": "keep+pws",
    },
)
def test_law22_conversion_adds_gains_and_nothing_else(case: NetCase):
    """The same Parameter objects under the same names in order; hooks, modes and flags stay."""
    net = case.net()
    net.branch.eval()
    hook = net.stem.register_forward_hook(lambda *_: None)
    names, objects = zip(*net.named_parameters(remove_duplicate=False), strict=True)
    buffers = list(net.named_buffers())
    values = [value.detach().clone() for value in objects]
    modes = {name: module.training for name, module in net.named_modules()}
    attributes = {name: set(vars(module)) for name, module in net.named_modules()}
    random = torch.get_rng_state()
    report = case.convert(net)
    assert_same(torch.get_rng_state(), random, "random state")
    assert modes == {name: module.training for name, module in net.named_modules()}
    after = list(net.named_parameters(remove_duplicate=False))
    kept = [(name, value) for name, value in after if id(value) in {id(one) for one in objects}]
    assert [name for name, _ in kept] == list(names)
    for (name, found), original, bits in zip(kept, objects, values, strict=True):
        assert found is original, name
        assert_same(found.detach(), bits, name)
    known = {id(buffer) for _, buffer in buffers}
    assert [(n, b) for n, b in net.named_buffers() if id(b) in known] == buffers
    told = [row.name for row in report if row.action == "add"]
    told += [name.replace("branch.0", "again") for name in told]
    fresh = {name for name, value in (*after, *net.named_buffers())} - {*names, *dict(buffers)}
    assert all(added(name) or name in told for name in fresh), fresh
    assert net.tied.weight is net.twice.weight
    assert net.again is net.branch[0]
    assert hook.id in net.stem._forward_hooks
    for name, module in net.named_modules():
        extra = set(vars(module)) - attributes[name]
        assert all(attribute.startswith("_filterwise") for attribute in extra), name
        for parameter in (value for key, value in module.named_parameters() if added(key)):
            assert parameter.is_leaf
    if net.frozen in [module for _, module in host.converted(net)]:
        assert not any(p.requires_grad for n, p in net.frozen.named_parameters() if n != "bias")
    assert set(report.converted) >= {"stem", "branch.0", "twice", "tied", "frozen"}
    assert not {name for name in report.converted if name in ("again", "head")}


@pytest.mark.parametrize("case", KEEP, ids=lambda case: case.id)
def test_law22_an_older_optimizer_still_steps_the_raw_weights(case: NetCase):
    net = case.net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    case.convert(net)
    before = net.stem.weight.detach().clone()
    train(net, 1, optimizer)
    assert not torch.equal(net.stem.weight, before)


@case_law(
    23,
    NET_CASES,
    rejects={"keeps_gains": "keep+wa", "folds_on_the_way_back": "keep+cwn"},
)
def test_law23_round_trip(case: NetCase):
    """`unconvert_` restores the fingerprint; after training it returns the trained raw weights."""
    net = case.net()
    before = fingerprint(net)
    report = case.convert(net)
    if case.norm == "keep" and not any(row.action == "add" for row in report):
        fw.unconvert_(net)
        assert fingerprint(net) == before
        case.convert(net)
    train(net, 2)
    raw = {n: p.detach().clone() for n, p in net.named_parameters() if not added(n)}
    fw.unconvert_(net)
    assert {n for n, _ in net.named_parameters()} == set(raw)
    for name, value in net.named_parameters():
        assert_same(value.detach(), raw[name], name)
    assert not [name for name, _ in host.converted(net)]
    assert {type(net.stem), type(net.up)} == {nn.Conv2d, nn.ConvTranspose2d}
    net(batch())


def fan_in_1() -> nn.Module:
    return nn.Sequential(nn.Conv2d(4, 4, 1, groups=4), nn.ReLU(), nn.Conv2d(4, 2, 3))


def transposed() -> nn.Module:
    return nn.Sequential(nn.ConvTranspose2d(16, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 3))


def odd_channels() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 10, 3), nn.BatchNorm2d(10), nn.ReLU(), nn.Conv2d(10, 2, 3))


def converted_already() -> nn.Module:
    net = odd_channels()
    fw.convert_(net, "bn+ws")
    return net


REFUSED = {
    f"fan-in 1, {name}": (
        fan_in_1,
        NetCase(name).method,
        {"select": "0"},
        ["0 (Conv2d)", "fan-in 1"],
    )
    for name in (case.name for case in KEEP)
}
REFUSED |= {
    "a cell of one weight": (
        odd_channels,
        fw.EquivariantWeightStandardization(
            label=torch.arange(3).view(1, 3, 1, 1) + torch.arange(9).view(3, 3)
        ),
        {"select": "0"},
        ["0 (Conv2d)", "cell of one weight"],
    ),
    "EquiNorm, transposed": (transposed, "equinorm", {}, ["0 (ConvTranspose2d)", "transposed"]),
    "channels": (odd_channels, "gn(4)+ws", {}, ["1 (BatchNorm2d)", "10", "4"]),
    "second conversion": (converted_already, "wa", {}, ["converted", "unconvert_"]),
    "nothing selected": (lambda: nn.Sequential(nn.Linear(4, 2)), "wa", {}, ["select="]),
    "a pattern that matches nothing": (odd_channels, "bn+ws", {"select": "stem"}, ["'stem'"]),
}


@pytest.mark.parametrize("cause", REFUSED)
def test_law24_refusals_leave_the_fingerprint_and_say_the_way_out(cause):
    make, recipe, options, words = REFUSED[cause]
    net = make()
    before = fingerprint(net)
    with pytest.raises(fw.ConversionError) as refused:
        fw.convert_(net, recipe, **options)
    assert fingerprint(net) == before
    for word in (*words, "The model is unchanged."):
        assert word in str(refused.value)


@case_law(24, NET_CASES, rejects={"stops_half_way": "keep+ws"})
def test_law24_a_fault_at_any_layer_undoes_all(case: NetCase):
    """An error or Ctrl-C at each layer in turn leaves the fingerprint as it was."""
    layers = len(case.convert(case.net()).converted)
    right = host.install
    for stop in range(layers):
        for broken in (RuntimeError, KeyboardInterrupt):
            net, seen = case.net(), []
            before = fingerprint(net)

            def install(*args, stop=stop, broken=broken, seen=seen, **kwargs):
                seen.append(args)
                if len(seen) > stop:
                    raise broken("in the middle")
                return right(*args, **kwargs)

            with patch.object(host, "install", install), pytest.raises(broken):
                case.convert(net)
            assert fingerprint(net) == before, f"layer {stop}, {broken.__name__}"


def effective(net: nn.Module) -> dict[str, torch.Tensor]:
    return {name: host.effective_weight(layer).detach() for name, layer in host.converted(net)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
@pytest.mark.parametrize("case", NET_CASES, ids=lambda case: case.id)
def test_law25_fold_in_every_dtype(case: NetCase, dtype):
    check_fold(case, dtype)


@case_law(
    25,
    NET_CASES,
    rejects={
        "folds_the_raw_weight": "keep+ws",
        "folds_in_place": "keep+wa",
        "shares_storage": "none+wa",
    },
)
def test_law25_fold(case: NetCase):
    """A plain copy: weights equal the effective ones bit for bit, outputs the model's."""
    check_fold(case, torch.float32)


def check_fold(case: NetCase, dtype: torch.dtype) -> None:
    net = case.converted(dtype)
    before, x = fingerprint(net), batch(dtype)
    expected, out = effective(net), net(x)
    plain = fw.fold(net)
    assert fingerprint(net) == before
    for name, weight in expected.items():
        layer = plain.get_submodule(name)
        assert_same(layer.weight.detach(), weight, f"{name}.weight")
        assert type(layer) in (nn.Conv2d, nn.ConvTranspose2d)
    assert not [m for m in plain.modules() if type(m).__module__.startswith("filterwise")]
    assert not [m for m in plain.modules() if type(m).__name__.startswith("Filterwise")]
    assert_same(plain(x), out, "output")
    assert not storages(net) & storages(plain)
    with quiet():
        again = fw.fold(plain)
    for name, value in plain.state_dict().items():
        assert_same(again.state_dict()[name], value, f"folded twice: {name}")
    with quiet():
        merged = fw.fold(net, bn=True)
    allowed = OUTPUT[dtype] * out.detach().double().abs().max()
    assert_close(merged(x), out, absolute=allowed, what="with BatchNorm merged")
    norms = [m for m in merged.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) <= (1 if case.norm == "keep" else 0)


def storages(net: nn.Module) -> set[int]:
    return {t.untyped_storage().data_ptr() for t in net.state_dict(keep_vars=True).values()}


def test_law25_a_deep_copy_is_what_fold_starts_from():
    """Hooks and modes of the original survive in the copy, and the copy trains alone."""
    net = NetCase("wa", "none").converted()
    plain = fw.fold(net)
    before = copy.deepcopy(effective(net))
    train(plain, 1)
    for name, weight in effective(net).items():
        assert_same(weight, before[name], name)
