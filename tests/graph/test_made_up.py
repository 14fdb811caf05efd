"""Models that cannot be traced are run once with an input made up from their first convolution."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import nn

import filterwise as fw
from filterwise.graph import trace
from filterwise.graph.made_up import made_up_inputs


class Untraceable(nn.Module):
    """Reads a value, which a symbol has none of; takes pictures of one side, or of any."""

    def __init__(self, side=None):
        super().__init__()
        self.position = nn.Parameter(torch.zeros(4, 4))  # no layer, though it is registered first
        self.conv, self.unused = nn.Conv2d(5, 4, 3, bias=False), nn.Conv2d(4, 4, 3)
        self.head, self.norm = nn.Conv2d(4, 7, 1), nn.BatchNorm2d(4)
        self.side = side

    def forward(self, x):
        if x.mean() > 1e6 or (self.side and x.shape[-1] != self.side):
            raise ValueError("not for me")
        return self.head(self.norm(self.conv(x)))


def test_a_made_up_run_tells_what_follows_what():
    arguments, words = next(made_up_inputs(Untraceable()))
    assert arguments[0].shape == (1, 5, 64, 64)
    assert words == "one made-up sample of 5 x 64 x 64"
    report = fw.plan(Untraceable(), "none+wa")
    assert "seen in one run with one made-up sample of 5 x 64 x 64" in report.notes[0]
    rows = {row.name: row for row in report}
    assert rows["head"].reason.startswith("classifier")
    assert rows["conv.bias"].action == "add"


def test_the_model_says_its_size():
    model = Untraceable(side=96)
    assert "guessed from the order" in fw.plan(model, "gn+ws").notes[0]
    model.pretrained_cfg = {"input_size": (5, 96, 96)}
    assert "made-up sample of 5 x 96 x 96" in fw.plan(model, "gn+ws").notes[0]


@pytest.mark.parametrize(
    ("first", "shapes"),
    [
        (nn.Conv1d(2, 3, 3), [(1, 2, 1024), (1, 2, 16000)]),
        (nn.Conv3d(2, 3, 3), [(1, 2, 8, 64, 64), (1, 2, 16, 224, 224)]),
        (nn.Linear(2, 3), []),
        (nn.Sequential(nn.Flatten(), nn.Linear(2, 3), nn.Conv2d(2, 3, 3)), []),
    ],
)
def test_shapes_follow_the_first_layer(first, shapes):
    assert [arguments[0].shape for arguments, _ in made_up_inputs(first)] == shapes


def test_every_argument_without_a_default_gets_one():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, left, right, steps=3):
            return self.conv(left) + self.conv(right) + steps

    assert [len(arguments) for arguments, _ in made_up_inputs(Pair())] == [2] * 4


def test_only_conversion_runs_a_model_unasked():
    assert trace(Untraceable()).how == "registration order"


def test_nothing_is_left_of_the_run():
    model, before = Untraceable(side=64), torch.get_rng_state()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    fw.plan(model, "gn+ws")
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_every_predictor_of_a_detector_is_left_alone():
    model = torchvision.models.detection.ssdlite320_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=3
    )
    kept = [row.name for row in fw.plan(model, "bn+ws") if "predictor" in row.reason]
    heads = ("classification_head", "regression_head")
    assert kept == [f"head.{head}.module_list.{level}.1" for head in heads for level in range(6)]
