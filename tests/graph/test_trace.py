"""Which way finds the graph, that nothing of it stays in the model, and models people use."""

from __future__ import annotations

import random

import numpy as np
import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.nn.utils import parametrizations

from filterwise import norms
from filterwise.filters import is_weight_layer
from filterwise.graph import trace
from filterwise.graph.flow import Flow
from filterwise.graph.observed import observe
from filterwise.graph.symbolic import trace_symbols


class Branching(nn.Module):
    """Control flow that depends on data, state that a forward changes, and randomness."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.unused = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))
        self.register_buffer("steps", torch.zeros(()))
        self.seen: list[torch.Tensor] = []

    def forward(self, x):
        self.steps += 1
        self.seen.append(x)
        self.last = x
        if x.mean() > 1e6:
            return self.unused(x)
        noise = random.random() + np.random.rand() + torch.rand(())
        return self.norm(self.conv(x)) + noise


def states():
    """Return everything that draws from a random state would move."""
    return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()


def fingerprint(model):
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    parts = [
        (name, type(module), module.training, set(module.__dict__), len(module._forward_hooks))
        for name, module in model.named_modules()
    ]
    return tensors, parts


def assert_same(before, after):
    assert before[1] == after[1]
    for name, tensor in before[0].items():
        assert torch.equal(tensor, after[0][name]), name


def test_symbols_serve_first():
    flow = trace(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), torch.randn(1, 3, 8, 8))
    assert flow.how == "traced"
    assert flow.sentence == "What follows what was found by symbolic tracing."


def test_a_run_serves_where_symbols_fail():
    flow = trace(Branching(), torch.randn(2, 3, 8, 8))
    assert flow.how == "ran"
    assert flow.sole_norm("conv") == "norm"
    assert flow.sentence.startswith(
        "What follows what was seen in one run with the example input, since symbolic tracing"
        " failed (TraceError: symbolically traced variables cannot be used as inputs to control"
        " flow)."
    )


def test_parts_that_were_not_used_are_judged_by_registration():
    flow = trace(Branching(), torch.randn(2, 3, 8, 8))
    assert "2 layers were not used in it" in flow.sentence
    assert "unused.0, unused.2." in flow.sentence
    assert [flow.is_last(name) for name in ("unused.0", "unused.2")] == [False, True]
    assert [flow.normalized(name) for name in ("unused.0", "unused.2")] == [True, False]
    assert flow.producers("unused.1") is None
    assert flow.sole_norm("unused.0") is None


def test_registration_order_serves_last_and_never_folds():
    flow = trace(Branching())
    assert flow.how == "registration order"
    assert "no example input was given" in flow.sentence
    assert flow.producers("norm") == ("conv",)
    assert flow.sole_norm("conv") is None
    assert flow.is_last("unused.2")
    assert not flow.is_last("conv")
    assert flow.branches() == []


def test_an_example_that_does_not_fit_is_named():
    flow = trace(Branching(), torch.randn(2, 5, 8, 8))
    assert flow.how == "registration order"
    assert "the run with the example input failed (RuntimeError: " in flow.sentence


@pytest.mark.parametrize("example", [None, torch.randn(2, 3, 8, 8), torch.randn(2, 5, 8, 8)])
def test_nothing_stays_in_the_model(example):
    model, fired = Branching(), []
    model.register_forward_hook(lambda *_: fired.append(1))
    model.conv.register_forward_pre_hook(lambda *_: fired.append(2))
    before, random_before = fingerprint(model), states()
    buffers = {name: id(buffer) for name, buffer in model.named_buffers()}
    trace(model, example)
    assert_same(before, fingerprint(model))
    assert states() == random_before
    assert {name: id(buffer) for name, buffer in model.named_buffers()} == buffers
    assert (model.seen, fired) == ([], [])


def test_the_example_is_not_written_to():
    class Careless(Branching):
        def forward(self, x):
            return super().forward(x.mul_(2))

    example = torch.ones(2, 3, 8, 8)
    assert trace(Careless(), example).how == "ran"
    assert torch.equal(example, torch.ones(2, 3, 8, 8))


def test_a_batch_of_one_that_training_refuses_runs_in_evaluation():
    class Pooled(Branching):
        def forward(self, x):
            return super().forward(x) if x.sum() > 0 else x

    model = Pooled()
    flow = trace(model, torch.ones(1, 3, 3, 3))  # one value per channel behind the convolution
    assert flow.how == "ran"
    assert model.training
    assert model.norm.training


def test_arguments_of_any_form():
    class Masked(Branching):
        def forward(self, images, mask=None):
            x = super().forward(images["left"])
            return x if mask is None else x * mask

    images = {"left": torch.randn(2, 3, 8, 8)}
    assert trace(Masked(), (images,)).how == "ran"
    assert trace(Masked(), (images, torch.ones(1))).how == "ran"
    assert trace(Masked(), {"images": images}).how == "ran"


def test_optional_arguments_keep_their_defaults():
    class Optional(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.masked, self.norm = (
                nn.Conv2d(3, 4, 1),
                nn.Conv2d(4, 4, 1),
                nn.BatchNorm2d(4),
            )

        def forward(self, x, mask=None):
            x = self.conv(x)
            if mask is not None:
                x = self.masked(x)
            return self.norm(x)

    model, x = Optional(), torch.randn(1, 3, 4, 4)
    assert trace(model).producers("norm") == ("conv",)
    assert trace(model, x).producers("norm") == ("conv",)
    assert trace(model, (x, x)).producers("norm") == ("masked",)


def test_parametrized_layers_are_single_layers():
    model = nn.Sequential(parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4))
    assert trace(model).sole_norm("0") == "1"


def test_an_empty_model():
    flow = trace(nn.Sequential())
    assert flow.branches() == []
    assert not flow.is_last("nothing")


def build(name):
    """Build without memory: tracing computes nothing."""
    library, _, name = name.partition(".")
    with torch.device("meta"):
        if library == "timm":
            return timm.create_model(name)
        options = {"weights_backbone": None} if "deeplab" in name else {}
        if name == "googlenet":
            options = {"init_weights": False}
        return torchvision.models.get_model(name, weights=None, **options)


def unnormalized(model, flow):
    """Return the convolutions that nothing normalizes."""
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    return [name for name in layers if not flow.normalized(name)]


@pytest.mark.parametrize(
    ("name", "last", "blocks", "into_no_norm"),
    # Blocks as the papers' tables list them: 3 + 4 + 6 + 3 in ResNet-50. Norms that no layer feeds
    # straight: in DenseNet the first of each dense layer, the transitions' and the last; in
    # ResNetV2 the first of each block and the last; in ConvNeXt those of stages and head.
    [
        ("torchvision.resnet50", ["fc"], 16, 0),
        ("torchvision.resnet18", ["fc"], 8, 0),
        ("torchvision.vgg16_bn", ["classifier.6"], 0, 0),
        ("torchvision.densenet121", ["classifier"], 0, 58 + 3 + 1),
        ("torchvision.mobilenet_v3_large", ["classifier.3"], 10, 0),
        ("torchvision.deeplabv3_resnet50", ["classifier.4"], 16, 0),
        ("torchvision.googlenet", ["aux1.fc2", "aux2.fc2", "fc"], 0, 0),
        ("timm.resnetv2_50", ["head.fc"], 16, 16 + 1),
        ("timm.tf_efficientnet_b0", ["classifier"], 9, 0),
        ("timm.convnext_pico", ["head.fc"], 12, 3 + 1),
    ],
)
def test_models_people_use(name, last, blocks, into_no_norm):
    model = build(name)
    flow = trace(model)
    layers = [name for name, module in model.named_modules() if is_weight_layer(module)]
    names = [name for name, module in model.named_modules() if norms.is_norm(module)]
    assert flow.how == "traced"
    assert [layer for layer in layers if flow.is_last(layer)] == last
    assert len(flow.branches()) == blocks
    assert sum(flow.producers(norm) == () for norm in names) == into_no_norm


def test_bottlenecks_have_three_layers_and_no_projection():
    branches = trace(build("torchvision.resnet50")).branches()
    assert branches[3].layers == ("layer2.0.conv1", "layer2.0.conv2", "layer2.0.conv3")
    assert {len(branch.layers) for branch in branches} == {3}


def test_nothing_normalizes_gates():
    model = build("torchvision.mobilenet_v3_large")
    bare = unnormalized(model, trace(model))
    assert len(bare) == 16  # two in each of the eight blocks with squeeze and excite
    assert all(name.endswith(("fc1", "fc2")) for name in bare)


@pytest.mark.parametrize(
    "name", ["torchvision.resnet18", "timm.resnetv2_50", "timm.efficientnet_b0"]
)
def test_a_run_and_symbols_agree(name):
    library, _, model_name = name.partition(".")
    model = (
        timm.create_model(model_name)
        if library == "timm"
        else torchvision.models.get_model(model_name, weights=None)
    ).eval()
    traced = Flow(model, trace_symbols(model), "traced", "")
    ran = Flow(model, observe(model, torch.randn(1, 3, 32, 32)), "ran", "")
    for layer, module in model.named_modules():
        if norms.is_norm(module):
            assert traced.producers(layer) == ran.producers(layer)
        elif is_weight_layer(module):
            assert traced.is_last(layer) == ran.is_last(layer)
            assert traced.normalized(layer) == ran.normalized(layer)
            assert traced.sole_norm(layer) == ran.sole_norm(layer)
    assert traced.branches() == ran.branches()


def test_a_detector_takes_a_run():
    model = torchvision.models.detection.fasterrcnn_mobilenet_v3_large_320_fpn(
        weights=None, weights_backbone=None, num_classes=3, min_size=64, max_size=64
    ).eval()
    flow = trace(model, ([torch.rand(3, 64, 64)],))
    assert flow.how == "ran"
    predictors = ["rpn.head.cls_logits", "rpn.head.bbox_pred"]
    predictors += [f"roi_heads.box_predictor.{name}" for name in ("cls_score", "bbox_pred")]
    layers = [name for name, module in model.named_modules() if is_weight_layer(module)]
    assert [layer for layer in layers if flow.is_last(layer)] == predictors
