"""What follows what in small networks, whose answers are known by looking at them.

Every network is asked about twice: traced symbolically, and watched during a run.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from filterwise.graph.flow import Flow
from filterwise.graph.observed import observe
from filterwise.graph.symbolic import trace_symbols


@pytest.fixture(params=["traced", "ran"])
def flow_of(request):
    def flow(model, *inputs):
        inputs = inputs or (torch.randn(2, 4, 8, 8),)
        if request.param == "traced":
            return Flow(model, trace_symbols(model), "traced", "")
        return Flow(model, observe(model, tuple(inputs)), "ran", "")

    return flow


def conv(inputs=4, outputs=4, kernel=3):
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)


class Chain(nn.Sequential):
    """conv - norm - relu - conv - relu - flatten - classifier."""

    def __init__(self):
        super().__init__()
        self.first = conv()
        self.norm = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.second = conv()
        self.relu2 = nn.ReLU()
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(4 * 64, 3)


def test_a_chain(flow_of):
    flow = flow_of(Chain())
    assert flow.producers("norm") == ("first",)
    assert flow.sole_norm("first") == "norm"
    assert flow.sole_norm("second") is None
    assert [flow.is_last(name) for name in ("first", "second", "fc")] == [False, False, True]
    assert [flow.normalized(name) for name in ("first", "second", "fc")] == [True, False, False]
    assert flow.branches() == []


def test_a_norm_that_will_be_removed_does_not_count(flow_of):
    flow = flow_of(Chain())
    assert not flow.normalized("first", removed=["norm"])


def test_a_norm_of_last_axes_normalizes_but_produces_no_bias(flow_of):
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 2))
    flow = flow_of(model, torch.randn(2, 8))
    assert flow.normalized("0")
    assert flow.sole_norm("0") is None


class Residual(nn.Module):
    """The four spellings of an addition, one block each, the first with a projection."""

    def __init__(self, spelling):
        super().__init__()
        self.spelling = spelling
        self.stem = conv()
        self.conv1, self.norm1 = conv(), nn.BatchNorm2d(4)
        self.conv2, self.norm2 = conv(), nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        x = functional.relu(self.stem(x))
        out = functional.relu(self.norm1(self.conv1(x)))
        out = self.norm2(self.conv2(out))
        if self.spelling == "+":
            out = out + x
        elif self.spelling == "+=":
            out += x
        elif self.spelling == "torch.add":
            out = torch.add(out, x)
        else:
            out = out.add_(x)
        return self.fc(functional.relu(out).mean((2, 3)))


@pytest.mark.parametrize("spelling", ["+", "+=", "torch.add", "add_"])
def test_a_residual_block(flow_of, spelling):
    flow = flow_of(Residual(spelling))
    assert [branch.layers for branch in flow.branches()] == [("conv1", "conv2")]
    assert flow.sole_norm("conv2") == "norm2"
    assert not flow.normalized("stem")
    assert flow.is_last("fc")


class PreActivation(nn.Module):
    """Norm before its convolution; the stem's output goes into a norm and past it."""

    def __init__(self):
        super().__init__()
        self.stem = conv()
        self.norm1, self.conv1 = nn.BatchNorm2d(4), conv()
        self.norm2, self.conv2 = nn.BatchNorm2d(4), conv()
        self.last_norm = nn.BatchNorm2d(4)

    def forward(self, x):
        x = self.stem(x)
        out = self.conv1(self.norm1(x).relu())
        out = self.conv2(self.norm2(out).relu())
        return self.last_norm(x + out).relu()


def test_a_pre_activation_block_without_a_head(flow_of):
    flow = flow_of(PreActivation())
    assert flow.producers("norm1") == ("stem",)
    assert flow.producers("last_norm") == ()
    assert flow.sole_norm("stem") is None  # it feeds the shortcut, too
    assert flow.sole_norm("conv1") == "norm2"
    assert not flow.is_last("conv2")  # a norm takes the sum: a backbone's last block
    assert flow.normalized("conv2")
    assert flow.normalized("stem")
    assert [branch.layers for branch in flow.branches()] == [("conv1", "conv2")]


class Dense(nn.Module):
    """Concatenation in front of a norm, as in DenseNet."""

    def __init__(self):
        super().__init__()
        self.stem = conv()
        self.norm, self.grow = nn.BatchNorm2d(8), conv(8)
        self.side = conv()

    def forward(self, x):
        x = self.stem(x)
        return self.grow(self.norm(torch.cat([x, self.side(x)], 1)))


def test_a_concatenation_is_not_straight_into_a_norm(flow_of):
    flow = flow_of(Dense())
    assert flow.producers("norm") == ()
    assert flow.sole_norm("side") is None
    assert flow.normalized("side")
    assert not flow.normalized("stem")
    assert flow.is_last("grow")
    assert flow.branches() == []


class Gated(nn.Module):
    """Squeeze and excite inside a residual branch, beside a projection."""

    def __init__(self):
        super().__init__()
        self.stem = conv()
        self.expand = conv(4, 8, 1)
        self.squeeze, self.excite = nn.Conv2d(8, 2, 1), nn.Conv2d(2, 8, 1)
        self.project = conv(8, 4, 1)
        self.shortcut = conv(4, 4, 1)

    def forward(self, x):
        x = self.stem(x)
        out = self.expand(x)
        gate = self.squeeze(functional.adaptive_avg_pool2d(out, 1)).relu()
        out = out * torch.sigmoid(self.excite(gate))
        return self.project(out) + self.shortcut(x)


def test_gates_and_projections_are_not_the_branch(flow_of):
    flow = flow_of(Gated())
    assert [branch.layers for branch in flow.branches()] == [("expand", "project")]
    assert not flow.is_last("excite")
    assert not flow.normalized("excite")
    assert flow.is_last("project")
    assert flow.is_last("shortcut")


class Lateral(nn.Module):
    """A feature pyramid: the sum joins a part of the network with a lateral 1x1 convolution."""

    def __init__(self):
        super().__init__()
        self.bottom, self.stage1 = conv(), conv()
        self.stage2, self.stage3, self.stage4 = conv(), conv(), conv()
        self.top, self.lateral = conv(4, 4, 1), conv(4, 4, 1)

    def forward(self, x):
        x = self.stage1(self.bottom(x))
        high = self.stage4(self.stage3(self.stage2(x[:, :, ::2, ::2])))
        return functional.interpolate(self.top(high), x.shape[-2:]) + self.lateral(x)


def test_a_lateral_connection_is_no_residual_branch(flow_of):
    assert flow_of(Lateral()).branches() == []


class Nested(nn.Module):
    """A residual block inside a long residual connection."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = conv(), conv(), conv(), conv()

    def forward(self, x):
        y = self.a(x)
        y = y + self.c(self.b(y).relu())
        return x + self.d(y)


def test_a_layer_belongs_to_the_innermost_branch(flow_of):
    layers = [branch.layers for branch in flow_of(Nested()).branches()]
    assert layers == [("b", "c"), ("a", "d")]


class Scaled(nn.Module):
    """A branch multiplied by a parameter, as in ConvNeXt."""

    def __init__(self):
        super().__init__()
        self.one, self.two = conv(), conv()
        self.scale = nn.Parameter(torch.ones(4, 1, 1))

    def forward(self, x):
        return x + self.scale * self.two(functional.gelu(self.one(x)))


def test_a_scaled_branch(flow_of):
    flow = flow_of(Scaled())
    assert [branch.layers for branch in flow.branches()] == [("one", "two")]
    assert flow.is_last("two")


class Reused(nn.Module):
    """One convolution called twice, one norm behind two convolutions."""

    def __init__(self):
        super().__init__()
        self.twice, self.once = conv(), conv()
        self.norm, self.shared = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x):
        x = self.norm(self.twice(x))
        x = self.shared(self.twice(x))
        return self.shared(self.once(x))


def test_reused_modules(flow_of):
    flow = flow_of(Reused())
    assert flow.producers("norm") == ("twice",)
    assert flow.producers("shared") == ("twice", "once")
    assert flow.sole_norm("twice") is None
    assert flow.sole_norm("once") is None
    assert flow.normalized("twice")


def test_a_module_under_two_names_goes_by_the_first(flow_of):
    model = nn.Sequential(conv(), nn.ReLU())
    model.add_module("again", model[0])
    model.add_module("norm", nn.BatchNorm2d(4))
    flow = flow_of(model)
    assert flow.producers("norm") == ("0",)
    assert flow.sole_norm("0") is None  # it is called twice


def test_values_that_pass_unchanged_are_straight(flow_of):
    class Straight(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.empty, self.norm = conv(), nn.Identity(), nn.BatchNorm2d(4)
            self.other, self.drop, self.norm2 = conv(), nn.Dropout(), nn.BatchNorm2d(4)

        def forward(self, x):
            x = self.norm(self.empty(self.conv(x)).contiguous())
            return self.norm2(self.drop(self.other(x)))

    flow = flow_of(Straight())
    assert flow.sole_norm("conv") == "norm"
    assert flow.sole_norm("other") is None
    assert flow.producers("norm2") == ()


class Heads(nn.Module):
    """Two predictors, of which one also steers the other without a gradient."""

    def __init__(self):
        super().__init__()
        self.trunk, self.boxes, self.classes = conv(), conv(4, 2, 1), conv(6, 3, 1)

    def forward(self, x):
        x = self.trunk(x).relu()
        boxes = self.boxes(x)
        return {"boxes": boxes, "classes": [self.classes(torch.cat([x, boxes.detach()], 1))]}


def test_a_predictor_whose_output_goes_on_without_gradient_is_last(flow_of):
    flow = flow_of(Heads())
    assert [flow.is_last(n) for n in ("trunk", "boxes", "classes")] == [False, True, True]


class Functional(nn.Module):
    """Weights and norms that are functions."""

    def __init__(self):
        super().__init__()
        self.conv, self.other = conv(), conv()
        self.weight = nn.Parameter(torch.randn(4, 4))

    def forward(self, x):
        x = functional.group_norm(self.conv(x), 2)
        x = self.other(x).mean((2, 3))
        return functional.linear(x, self.weight)


def test_functions_with_weights_count(flow_of):
    flow = flow_of(Functional())
    assert flow.normalized("conv")
    assert not flow.is_last("other")
    assert flow.is_last("")  # the model's own weight


@pytest.mark.parametrize("model", [conv(), nn.Linear(8, 2)], ids=["conv", "linear"])
def test_a_model_that_is_one_layer(flow_of, model):
    flow = flow_of(model)
    assert flow.is_last("")
    assert not flow.normalized("")


def test_memory_written_through_a_view_is_followed():
    class Written(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.last = conv(), nn.BatchNorm2d(4), conv()

        def forward(self, x):
            canvas = torch.zeros(x.shape)
            canvas[:, :2] = self.conv(x)[:, :2]
            part = canvas[:, 2:]
            part += 1
            return self.last(self.norm(canvas))

    flow = Flow(model := Written(), observe(model, torch.randn(2, 4, 8, 8)), "ran", "")
    assert flow.producers("norm") == ()
    assert flow.normalized("conv")
    assert not flow.is_last("conv")


class Shortcut(nn.Module):
    """norm - relu - conv, and around it what reads the norm's input too."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.stem, self.norm, self.relu, self.conv = (
            conv(),
            nn.BatchNorm2d(4),
            nn.ReLU(inplace=how != "out of place"),
            conv(),
        )
        self.drop = nn.Dropout(0.0)

    def forward(self, x):
        x = self.stem(x)
        y = self.norm(x)
        if self.how == "by a function":
            y = functional.relu(y, inplace=True)
        elif self.how == "by a method":
            y = y.relu_()
        elif self.how == "through a view":
            y = self.relu(self.drop(y).flatten(1).view_as(y))
        else:
            y = self.relu(y)
        y = self.conv(y)
        return y if self.how == "alone" else x + y


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("a module", ["relu"]),
        ("through a view", ["relu"]),
        ("by a function", [None]),
        ("by a method", [None]),
        ("out of place", []),
        ("alone", []),
    ],
)
def test_who_writes_over_what_a_removed_norm_was_given(flow_of, how, expected):
    found = flow_of(Shortcut(how)).writers("norm", {"norm"})
    assert [node.module for node in found] == expected


def test_two_removed_norms_in_a_row_hand_on_the_same_tensor(flow_of):
    class Two(Shortcut):
        def forward(self, x):
            x = self.stem(x)
            return x + self.conv(self.relu(self.norm2(self.norm(x))))

    model = Two("a module")
    model.norm2 = nn.BatchNorm2d(4)
    flow = flow_of(model)
    for norm in ("norm", "norm2"):
        assert [node.module for node in flow.writers(norm, {"norm", "norm2"})] == ["relu"]


def test_what_follows_a_norm_is_not_known_by_registration_order():
    model = Shortcut("a module")
    flow = Flow(model, trace_symbols(model), "registration order", "")
    assert flow.writers("norm", {"norm"}) is None
