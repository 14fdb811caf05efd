"""Conversion: what it selects, adds, keeps, refuses, and that it is all or nothing."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torchvision
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations

import filterwise as fw
from filterwise import host
from support.fingerprint import fingerprint

pytestmark = pytest.mark.filterwarnings(
    "ignore::filterwise.NormalizationWarning", "ignore:.*has seen no training batch"
)

RECIPES = ["gn+ws", "bn+ws", "wa", "pws", "equinorm", "wn", "bn+cwn", "gn+centered", "sws", "none"]


class Net(nn.Module):
    """A residual net with all that a conversion must carry over."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 24, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(24)
        self.depthwise = nn.Conv2d(24, 24, 3, padding=1, groups=24)
        self.branch = nn.Sequential(
            nn.Conv2d(24, 24, 3, padding=1, bias=False),
            nn.BatchNorm2d(24),
            nn.ReLU(),
            nn.Dropout(0.1),
        )
        self.again = self.branch[0]
        self.small = nn.Conv2d(24, 8, 1)
        self.up = nn.ConvTranspose2d(8, 8, 2, stride=2)
        self.up_norm = nn.BatchNorm2d(8)
        self.head = nn.Conv2d(8, 10, 1)

    def forward(self, x):
        x = torch.relu(self.norm(self.stem(x)))
        x = x + self.branch(self.depthwise(x))
        x = x + self.again(x)
        x = self.up_norm(self.up(self.small(x)))
        return self.head(x).mean((2, 3))


def actions(report):
    return {row.name: row.action for row in report}


def test_default_selection_and_norms():
    report = fw.convert_(Net(), "gn+ws")
    assert actions(report) == {
        "stem": "convert",
        "norm": "replace",
        "depthwise": "keep",
        "branch.0": "convert",
        "branch.1": "replace",
        "small": "convert",
        "up": "convert",
        "up_norm": "replace",
        "head": "keep",
    }
    reasons = {row.name: row.reason for row in report}
    assert "depthwise" in reasons["depthwise"]
    assert "classifier" in reasons["head"]
    assert "12 groups" in reasons["norm"]
    assert report.converted == ["stem", "branch.0", "small", "up"]
    assert {row.name: row.fan_in for row in report}["up"] == 8 * 4


def test_removing_norms_gives_the_layers_before_them_a_bias():
    net = Net()
    report = fw.convert_(net, "wa")
    added = [row.name for row in report if row.action == "add"]
    assert added == ["stem.bias", "branch.0.bias"]
    assert net.stem.bias.shape == (24,)
    assert net.stem.bias.eq(0).all()
    assert isinstance(net.norm, nn.Identity)
    assert isinstance(net.branch[3], nn.Dropout)
    assert "norm.weight" not in net.state_dict()


def test_reused_module_is_converted_once_and_stays_one_module():
    net = Net()
    fw.convert_(net, "gn+ws")
    assert net.again is net.branch[0]
    assert sum(host.is_converted(m) for m in net.modules()) == 4


def test_tied_weight_of_two_modules_stays_tied():
    net = nn.Sequential(
        nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 1)
    )
    net[2].weight = net[0].weight
    fw.convert_(net, "wa")
    assert net[0].weight is net[2].weight
    assert net[0].gain is not net[2].gain


@pytest.mark.parametrize("recipe", RECIPES)
def test_conversion_keeps_parameters_modes_hooks_and_the_random_state(recipe):
    net = Net().double()
    net.branch[0].weight.requires_grad_(False)
    net.branch.eval()
    seen = []
    net.stem.register_forward_hook(lambda *_: seen.append("stem"))
    before = dict(net.named_parameters())
    values = {name: value.detach().clone() for name, value in before.items()}
    state = torch.get_rng_state()
    report = fw.convert_(net, recipe, exclude="up")
    assert torch.equal(torch.get_rng_state(), state)
    after = dict(net.named_parameters())
    for name, value in before.items():
        if name.split(".")[-2:] and name in after:
            assert after[name] is value
            assert torch.equal(value, values[name])
    assert not net.branch[0].weight.requires_grad
    assert not net.branch.training
    assert net.training
    if hasattr(net.branch[0], "gain") and isinstance(net.branch[0].gain, nn.Parameter):
        assert net.branch[0].gain.dtype == torch.float64
        assert not net.branch[0].gain.requires_grad
    out = net(torch.rand(2, 3, 8, 8, dtype=torch.float64))
    assert torch.isfinite(out).all()
    assert seen == ["stem"]
    assert str(report)


@pytest.mark.parametrize("recipe", ["keep+ws", "keep+wa", "keep+pws", "keep+wn", "keep+cwn"])
def test_round_trip_restores_everything(recipe):
    net = Net()
    before = fingerprint(net)
    fw.convert_(net, recipe)
    assert fingerprint(net) != before
    fw.unconvert_(net)
    assert fingerprint(net) == before


def test_round_trip_after_training_returns_the_trained_raw_weights():
    net = Net()
    fw.convert_(net, "gn+wa")
    optimizer = torch.optim.SGD(fw.param_groups(net, 5e-4), lr=0.1)
    net(torch.rand(2, 3, 8, 8)).square().sum().backward()
    optimizer.step()
    trained = net.stem.weight.detach().clone()
    fw.unconvert_(net)
    assert type(net.stem) is nn.Conv2d
    assert torch.equal(net.stem.weight, trained)
    assert isinstance(net.norm, nn.GroupNorm)


def test_unconverting_a_plain_model_is_an_empty_report():
    assert len(fw.unconvert_(Net())) == 0


class OwnWeights(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.scale = nn.Conv2d(8, 8, 1, groups=8)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x):
        return self.head(self.norm(self.scale(self.conv(x))))


REFUSALS = [
    (
        lambda: OwnWeights(),
        "gn+ws",
        {"select": "scale"},
        ["scale (Conv2d)", "fan-in 1", 'exclude="scale"'],
    ),
    (lambda: Net(), "equinorm", {}, ["up (ConvTranspose2d)", "transposed", "phases"]),
    (lambda: Net(), "gn(16)+ws", {}, ["norm (BatchNorm2d)", "24", "16"]),
    (lambda: nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2)), "wa", {}, ["no layer", "select="]),
    (lambda: nn.BatchNorm2d(8), "gn", {}, ["itself an activation norm"]),
    (lambda: nn.DataParallel(Net()), "gn+ws", {}, ["DataParallel", "inner model first"]),
    (
        lambda: parametrizations.weight_norm(nn.Conv2d(8, 8, 3)),
        "wa",
        {"select": lambda *_: True},
        ["ParametrizedConv2d", "adopt_(model)"],
    ),
    (
        lambda: parametrizations.orthogonal(nn.Conv2d(8, 8, 3)),
        "wa",
        {"select": lambda *_: True},
        ["parametrized"],
    ),
]


@pytest.mark.parametrize(("make", "recipe", "options", "words"), REFUSALS)
def test_refusals_say_what_and_leave_the_model_alone(make, recipe, options, words):
    net = make()
    before = fingerprint(net)
    with pytest.raises(fw.ConversionError) as caught:
        fw.convert_(net, recipe, **options)
    for word in [*words, "The model is unchanged."]:
        assert word in str(caught.value)
    assert fingerprint(net) == before
    rows = [row for row in fw.plan(net, recipe, **options) if row.action == "refuse"]
    assert rows
    assert fingerprint(net) == before


def test_second_conversion_is_refused_with_the_way_out():
    net = Net()
    fw.convert_(net, "gn+ws")
    before = fingerprint(net)
    with pytest.raises(
        fw.ConversionError, match=r"already converted \(4 layers, 'gn\+ws'; first: stem"
    ):
        fw.convert_(net, "wa")
    assert fingerprint(net) == before
    fw.unconvert_(net)
    fw.convert_(net, "wa")


def test_norm_alone_allows_a_later_conversion():
    net = Net()
    fw.convert_(net, "gn")
    assert isinstance(net.norm, nn.GroupNorm)
    fw.convert_(net, "keep+ws")


def test_taken_attribute_is_refused():
    net = Net()
    net.stem.gain = 3
    with pytest.raises(fw.ConversionError, match="already has an attribute gain"):
        fw.convert_(net, "wa")


def test_foreign_standardized_layers_are_refused():
    from timm.layers import StdConv2d

    net = nn.Sequential(StdConv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 2, 1))
    with pytest.raises(fw.ConversionError, match=r"itself \(StdConv2d\).*adopt_\(model\)"):
        fw.convert_(net, "wa")
    fw.convert_(net, "wa", exclude="0")


class TestSelection:
    def test_patterns(self):
        net = torchvision.models.resnet18()
        report = fw.plan(net, "gn+ws", select=["layer[34].*", "fc"])
        assert all(name.startswith(("layer3", "layer4", "fc")) for name in report.converted)
        assert "fc" in report.converted

    def test_predicate(self):
        report = fw.plan(Net(), "gn+ws", select=lambda _, module: module.bias is None)
        assert report.converted == ["stem", "branch.0"]

    def test_exclude_keeps_norms_too(self):
        report = fw.plan(Net(), "wa", exclude=["norm", "branch.*"])
        assert actions(report)["norm"] == "keep"
        assert actions(report)["branch.0"] == "keep"
        assert "stem.bias" not in actions(report)

    def test_pattern_that_matches_nothing_is_an_error(self):
        with pytest.raises(fw.ConversionError, match="branch"):
            fw.plan(Net(), "gn+ws", exclude="branch")
        with pytest.raises(fw.ConversionError, match="Nearest: stem"):
            fw.plan(Net(), "gn+ws", select="stm")

    def test_named_weight(self):
        class Attention(nn.Module):
            def __init__(self):
                super().__init__()
                self.attn = nn.MultiheadAttention(16, 2)

            def forward(self, x):
                return self.attn(x, x, x)[0]

        net = Attention()
        report = fw.convert_(net, "wn", select="attn.in_proj_weight")
        assert report.converted == ["attn.in_proj_weight"]
        assert "attn.in_proj_weight_gain" in net.state_dict()
        assert fw.describe(net) == {"attn.in_proj_weight": "wn"}
        with pytest.raises(fw.ConversionError, match="behind its back"):
            fw.convert_(Attention(), "wn", select="attn.out_proj")


@pytest.mark.parametrize("fault", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("recipe", ["gn+wa", "equinorm"])
def test_a_fault_at_any_layer_leaves_the_model_as_it_was(monkeypatch, fault, recipe):
    real = host.install
    exclude = "up" if recipe == "equinorm" else None
    for at in range(3):
        net = Net()
        before = fingerprint(net)
        calls = []

        def failing(*arguments, calls=calls, at=at):
            calls.append(1)
            if len(calls) == at + 1:
                raise fault("injected")
            real(*arguments)

        monkeypatch.setattr(host, "install", failing)
        with pytest.raises(fault):
            fw.convert_(net, recipe, exclude=exclude)
        assert fingerprint(net) == before


def test_ws_without_a_norm_warns_and_says_how_much_activations_grow():
    net = Net()
    with pytest.warns(
        fw.NormalizationWarning, match="nothing normalizes the output of stem"
    ) as got:
        report = fw.convert_(net, "ws")
    assert len(got) == 1
    assert "4 times those of a He layer" in str(got[0].message)
    assert any("nothing normalizes" in note for note in report.notes)


def test_new_parameters_are_told():
    report = fw.convert_(Net(), "gn+wa")
    assert any("4 parameters are new" in note for note in report.notes)


def test_norm_asked_for_where_there_is_none():
    net = nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 1))
    report = fw.convert_(net, "gn+wa")
    assert any("no activation norm" in note for note in report.notes)


def test_resnet50_converts_trains_and_is_told_layer_by_layer():
    net = torchvision.models.resnet50(num_classes=5)
    report = fw.convert_(net, "gn+ws")
    assert len(report.converted) == 53
    assert actions(report)["fc"] == "keep"
    assert sum(row.action == "replace" for row in report) == 53
    net(torch.rand(2, 3, 32, 32)).sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in net.parameters())
    assert pickle.loads(pickle.dumps(net.layer1)) is not None
    assert fw.describe(net)["layer4.2.conv3"] == "ws"


def test_method_instance_means_its_text():
    net, other = Net(), Net()
    fw.convert_(net, fw.WeightAlign(constant="preserving"))
    fw.convert_(other, "wa(constant=preserving)")
    assert fw.describe(net) == fw.describe(other)
    assert net.stem._filterwise.method == other.stem._filterwise.method


def test_equivariant_labels_by_class():
    rings = [[[[0, 1, 0], [1, 0, 1], [0, 1, 0]]]]
    net = nn.Sequential(
        nn.Conv2d(8, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3),
        nn.BatchNorm2d(8),
        nn.Flatten(),
        nn.Linear(8, 2),
    )
    fw.convert_(net, fw.Recipe("bn", fw.EquivariantWeightStandardization(label=rings)))
    weight = host.effective_weight(net[0])
    mask = torch.tensor(rings).expand_as(weight) == 1
    torch.testing.assert_close((weight * mask).sum((1, 2, 3)), torch.zeros(8), atol=1e-5, rtol=0)
    again = copy.deepcopy(net)
    assert torch.equal(host.effective_weight(again[0]), weight)


@pytest.mark.parametrize("select", ["0.linear1", "0.self_attn.in_proj_weight"])
def test_weights_that_a_fast_path_reads_are_refused(select):
    net = nn.Sequential(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True))
    with pytest.raises(fw.ConversionError, match="TransformerEncoderLayer behind its back"):
        fw.convert_(net, "wn", select=select)


def test_wrapped_by_ddp_is_refused(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        with pytest.raises(fw.ConversionError, match="never be reduced"):
            fw.convert_(DistributedDataParallel(Net()), "gn+wa")
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("training", [True, False])
def test_head_that_only_training_uses_is_seen_in_either_mode(training):
    class Auxiliary(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.body_norm = nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16)
            self.side, self.side_norm = nn.Conv2d(16, 16, 1, bias=False), nn.BatchNorm2d(16)
            self.side_head, self.head = nn.Conv2d(16, 4, 1), nn.Conv2d(16, 4, 1)

        def forward(self, x):
            x = self.body_norm(self.body(x)).relu()
            out = self.head(x)
            return (out, self.side_head(self.side_norm(self.side(x)))) if self.training else out

    report = actions(fw.convert_(Auxiliary().train(training), "wa"))
    assert report["side_head"] == report["head"] == "keep"
    assert report["side.bias"] == report["body.bias"] == "add"


def test_batch_norm_behind_an_addition_takes_the_dimension_of_the_convolutions():
    net = torchvision.models.densenet121()
    fw.convert_(net, "gn")
    report = fw.convert_(net, "bn")
    assert {row.action for row in report} == {"keep", "replace"}


def test_lazy_model_is_refused():
    with pytest.raises(fw.ConversionError, match="run it once"):
        fw.convert_(nn.Sequential(nn.LazyConv2d(8, 3), nn.Conv2d(8, 2, 1)), "wa")


def test_norms_inside_a_norm_are_one_norm():
    from timm.layers import convert_splitbn_model

    net = convert_splitbn_model(Net(), 2)
    report = fw.convert_(net, "gn+ws")
    assert [row.name for row in report if row.action == "replace"] == [
        "norm",
        "branch.1",
        "up_norm",
    ]


def test_compiled_model_is_refused():
    with pytest.raises(fw.ConversionError, match=r"torch\.compile"):
        fw.convert_(torch.compile(Net()), "gn+wa")


class PreActivation(nn.Module):
    """A block whose shortcut reads what the norm was given; activations work in place."""

    def __init__(self, relu=True):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.norm, self.relu = nn.BatchNorm2d(8), nn.ReLU(inplace=True)
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.calls_relu = relu
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x):
        x = self.stem(x)
        y = self.norm(x)
        y = self.relu(y) if self.calls_relu else y.relu_()
        return self.head(x + self.conv(y))


class Untraceable(PreActivation):
    """The same, found by a run."""

    def forward(self, x):
        if x.sum() > 1e9:
            return x
        return super().forward(x)


@pytest.mark.parametrize("make", [PreActivation, Untraceable])
@pytest.mark.parametrize("recipe", ["wa", "none"])
def test_a_removed_norm_leaves_the_shortcut_what_it_read(make, recipe):
    torch.manual_seed(0)
    net = make().eval()
    report = fw.convert_(net, recipe)
    row = next(row for row in report if row.name == "norm")
    assert row.reason == "others read its input, so relu works in place no longer"
    x = torch.randn(2, 3, 12, 12)
    seen = net.stem(x)
    expected = net.head(seen + net.conv(torch.relu(seen)))
    torch.testing.assert_close(net(x), expected)
    if recipe == "wa":
        torch.testing.assert_close(fw.fold(net)(x), expected)
    net(x).square().sum().backward()


def test_an_activation_fused_into_a_removed_norm_works_in_place_no_longer():
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    net = timm.create_model("resnetv2_50", num_classes=4).eval()
    fw.convert_(net, "wa")
    x = torch.randn(1, 3, 32, 32)
    other = copy.deepcopy(net)
    for module in other.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    assert torch.equal(net(x), other(x))
    assert any(isinstance(m, nn.ReLU) and m.inplace for m in net.modules())  # where it is free


def test_a_function_that_works_in_place_behind_a_removed_norm_is_refused():
    net = PreActivation(relu=False)
    before = fingerprint(net)
    with pytest.raises(fw.ConversionError, match=r'relu in the model.*exclude="norm"'):
        fw.convert_(net, "wa")
    assert fingerprint(net) == before
    fw.convert_(net, "wa", exclude="norm")


def test_in_place_activations_come_back_when_a_conversion_fails(monkeypatch):
    net = PreActivation()

    def fail(*_arguments):
        raise RuntimeError("no")

    monkeypatch.setattr(host, "install", fail)
    with pytest.raises(RuntimeError, match="no"):
        fw.convert_(net, "wa")
    assert net.relu.inplace
    assert isinstance(net.norm, nn.BatchNorm2d)


def test_by_registration_order_every_activation_stops_working_in_place():
    class Unseen(PreActivation):
        def forward(self, x, y):
            return super().forward(x) if bool(y) else x

    net = Unseen()
    with pytest.warns(fw.FilterwiseWarning, match="order of registration"):
        fw.convert_(net, "wa")
    assert not net.relu.inplace
