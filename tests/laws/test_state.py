"""Laws 26 to 29: checkpoints, options, copies, and nothing stale."""

from __future__ import annotations

import copy
import io
import json
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import filterwise as fw
from filterwise import host
from filterwise.methods.registry import METHODS
from support.compare import assert_same
from support.laws import case_law
from support.nets import NET_CASES, NetCase, batch, quiet, train

KEEP = [case for case in NET_CASES if case.norm == "keep"]


def saved(state: dict) -> dict:
    """Return a state through a file, as `torch.load` gives it with ``weights_only=True``."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def said(net: nn.Module, state: dict) -> list[str]:
    """Load with ``strict=True`` and return filterwise's warnings."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        net.load_state_dict(state, strict=True)
    assert all(issubclass(one.category, fw.CheckpointWarning) for one in found)
    return [str(one.message) for one in found]


def same_state(found: nn.Module, expected: nn.Module) -> None:
    found_state, expected_state = found.state_dict(), expected.state_dict()
    assert list(found_state) == list(expected_state)
    for name, value in expected_state.items():
        assert_same(found_state[name], value, name)


def fresh(case: NetCase) -> nn.Module:
    """Return another converted net, with other values."""
    torch.manual_seed(99)
    net = case.net()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.5)
    case.convert(net)
    return net.eval()


@case_law(26, NET_CASES, rejects={"forgets_gains": "keep+wa", "renames_keys": "keep+ws"})
def test_law26_converted_to_converted(case: NetCase):
    """Strict, bit-equal, under the plain keys, without a word."""
    net, other = case.converted(), fresh(case)
    assert not said(other, saved(net.state_dict()))
    same_state(other, net)
    assert_same(other(batch()), net(batch()), "output")
    keys = list(case.net().state_dict())
    kept = [key for key in net.state_dict() if key in keys]
    if case.norm == "keep":
        assert kept == keys


@case_law(26, KEEP, rejects={"forgets_start": "keep+wa"})
def test_law26_plain_to_converted(case: NetCase):
    """Missing gains take their initial value, that of the weights just loaded; said once."""
    plain, net = case.net(), case.converted()
    train(plain, 1)
    told = said(net, saved(plain.state_dict()))
    assert len(told) == 1
    assert "plain" in told[0]
    expected = case.net()
    expected.load_state_dict(plain.state_dict())
    case.convert(expected)
    same_state(net, expected)


@pytest.mark.parametrize("case", KEEP, ids=lambda case: case.id)
def test_law26_raw_weights_of_converted_to_plain(case: NetCase):
    net, plain = case.converted(), case.net()
    state = saved(net.state_dict())
    plain.load_state_dict({key: state[key] for key in plain.state_dict()}, strict=True)
    for name, value in plain.named_parameters():
        assert_same(value.detach(), net.get_parameter(name).detach(), name)
    if not case.has_gain:
        plain.load_state_dict(state, strict=True)


@pytest.mark.parametrize("case", KEEP, ids=lambda case: case.id)
def test_law26_folded_to_plain(case: NetCase):
    net = case.converted()
    folded = fw.fold(net)
    plain = case.net().eval()
    # Two gains on one raw weight are two weights.
    plain.tied.weight = nn.Parameter(plain.tied.weight.detach().clone())
    with torch.no_grad():
        # EquiNorm gives a layer without a bias one; the plain net needs it to hold the function.
        for name, layer in folded.named_modules():
            own = plain.get_submodule(name)
            if isinstance(layer, nn.Conv2d) and own.bias is None and layer.bias is not None:
                own.bias = nn.Parameter(torch.zeros_like(layer.bias))
    plain.load_state_dict(saved(folded.state_dict()), strict=True)
    assert_same(plain(batch()), folded(batch()), "output")


@case_law(27, KEEP, rejects={"options_lost": "keep+ws", "loads_without_a_word": "keep+pws"})
def test_law27_options_travel(case: NetCase):
    """Method and options are in the metadata, through files, deepcopy and a safetensors header."""
    net = case.converted()
    layers = [name for name, _ in host.converted(net)]
    for state in (net.state_dict(), saved(net.state_dict()), copy.deepcopy(net).state_dict()):
        for name in layers:
            record = state._metadata[name]["filterwise"]
            assert record["method"] == case.name
            for option, value in case.method.all_options().items():
                if isinstance(value, str | int | float):
                    assert record[option] == value, option
    header = json.loads(json.dumps(fw.describe(net)))
    assert header == dict.fromkeys(layers, str(case.method))
    stripped = dict(saved(net.state_dict()))
    told = said(fresh(case), stripped)
    assert len(told) == 1
    assert "unknown" in told[0]


OTHER = {
    "ws": (fw.WeightStandardization(eps=1e-3), ["eps", "1e-05", "0.001"]),
    "wa": (fw.WeightAlign(constant="preserving"), ["constant", "he", "preserving"]),
    "pws": (fw.ParametricWeightStandardization(gamma=0.5), ["gamma", "relative", "0.5"]),
    "equinorm": (fw.EquilibriumNormalization(momentum=0.5), ["momentum", "0.1", "0.5"]),
    "wn": (fw.WeightNormalization(eps=1e-3), ["eps", "1e-12", "0.001"]),
    "cwn": (fw.CenteredWeightNormalization(eps=1e-3), ["eps", "1e-12", "0.001"]),
    "centered": (fw.WeightStandardization(), ["centered", "ws"]),
    "sws": (fw.ScaledWeightStandardization(activation="silu"), ["activation", "relu", "silu"]),
    "ews": (fw.EquivariantWeightStandardization(label=[0], eps=1e-3), ["eps", "1e-05", "0.001"]),
}


@pytest.mark.parametrize("name", METHODS)
def test_law27_loading_under_other_options_names_both(name):
    case, (method, words) = NetCase(name), OTHER[name]
    net, other = case.converted(), case.net()
    with quiet():
        fw.convert_(other, fw.Recipe("keep", method), exclude=case.exclude)
    told = said(other, saved(net.state_dict()))
    assert len(told) == 1
    for word in words:
        assert word in told[0]


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda net: pickle.loads(pickle.dumps(net)),
    "average": lambda net: AveragedModel(net).module,
}


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("case", NET_CASES, ids=lambda case: case.id)
def test_law28_copies_in_every_way(case: NetCase, way):
    check_copies(case, COPIES[way])


@case_law(28, NET_CASES, rejects={"shares_a_copy": "keep+ws"})
def test_law28_copies_are_independent(case: NetCase):
    """A training step on one leaves the other bit-identical."""
    check_copies(case, lambda net: copy.deepcopy(net))


def check_copies(case: NetCase, way) -> None:
    net = case.converted()
    other = way(net).eval()
    same_state(other, net)
    assert_same(other(batch()), net(batch()), "output")
    for changed, left in ((net, other), (other, net)):
        before, out = copy.deepcopy(left.state_dict()), left.eval()(batch())
        train(changed, 1)
        for name, value in left.state_dict().items():
            assert_same(value, before[name], name)
        assert_same(left(batch()), out, "output")


def in_place(layer):
    layer.weight.mul_(1.5).add_(0.1)


def by_data(layer):
    # Nothing sees such a write between two evaluations; a call of eval() or train() drops what is
    # kept, as does keep_weights(model, False).
    layer.weight.data.add_(0.1 * torch.randn_like(layer.weight))
    layer.eval()


def by_new_data(layer):
    layer.weight.data = layer.weight.data * 1.3 + 0.2


def by_loading(layer):
    state = {
        name: value * 1.3 for name, value in layer.state_dict().items() if value.is_floating_point()
    }
    with quiet():
        layer.load_state_dict(state, strict=False)


def by_numpy(layer):
    layer.weight.detach().numpy()[:] += 0.25
    layer.eval()  # as above


def by_round_trip(layer):
    layer.double()
    layer.weight.mul_(1.3)
    layer.float()


def by_fused_step(layer):
    layer.weight.grad = torch.randn_like(layer.weight)
    torch.optim.SGD([layer.weight], lr=0.1, fused=True).step()


def by_average(layer):
    average = AveragedModel(layer)
    in_place(average.module)
    torch.utils.swap_tensors(layer.weight, average.module.weight)


def by_init(layer):
    nn.init.normal_(layer.weight)


CHANGES = [in_place, by_data, by_new_data, by_loading, by_numpy, by_round_trip, by_fused_step]
CHANGES += [by_average, by_init]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("case", KEEP, ids=lambda case: case.id)
def test_law29_nothing_stale_in_every_way(case: NetCase, change):
    check_stale(case, change)


@case_law(29, KEEP, rejects={"never_refreshed": "keep+ws"})
def test_law29_nothing_stale(case: NetCase):
    """Whatever moved the raw weight, the next effective weight is that of a fresh layer."""
    check_stale(case, in_place)


def check_stale(case: NetCase, change) -> None:
    net = case.converted()
    layer = net.branch[0]
    with torch.no_grad():
        layer(torch.rand(1, 16, 5, 5))
        before = host.effective_weight(layer)
        change(layer)
        after = host.effective_weight(layer)
    anew = pickle.loads(pickle.dumps(layer))
    assert_same(after, host.effective_weight(anew).detach(), "after the change")
    assert not torch.equal(before, after)
