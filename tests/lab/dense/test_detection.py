"""Detectors: micro-batches and torchvision's own loss, conversion, runs."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from torch import nn
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork

from filterwise.host import Hosted
from filterwise.lab.dense.rcnn import PLAIN
from filterwise.lab.errors import UsageError
from filterwise.lab.tasks.detection import Detection
from filterwise.lab.training.place import make_fabric
from filterwise.lab.training.seeds import seed_everything
from filterwise.lab.training.settings import checked_training
from filterwise.lab.training.stepper import Stepper
from filterwise.lab.training.train import train
from filterwise.methods.registry import METHODS
from support.scenes import samples, write_coco

OPTIONS = {"channels": 32, "proposals": 16, "longest": 64}


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    return write_coco(tmp_path_factory.mktemp("coco"))


def settings(folder, **changes):
    values = {
        "task": "detection",
        "data": {"name": str(folder), "size": 40},
        "model": {"name": "mask-rcnn-resnet10", "recipe": "gn+ws"},
        "optimization": {"learning_rate": 0.01, "step_size": 3, "micro_batch": 2},
        "options": OPTIONS,
    }
    for key, value in changes.items():
        values[key] = values.get(key, {}) | value if isinstance(value, dict) else value
    return checked_training(values)


def task_of(wanted):
    seed_everything(0, "model")
    return Detection(wanted, make_fabric(precision=wanted.precision))


def gradients(task, parts):
    """Gradients of one step through the engine's stepper, which moves nothing at rate zero."""
    optimizer = torch.optim.SGD(task.model.parameters(), lr=0.0)
    stepper = Stepper(make_fabric(precision="64-true"), task.model, optimizer, task.loss)
    loss = stepper.step(parts, sum(len(part) for part in parts))
    return loss, {
        name: each.grad.clone()
        for name, each in task.model.named_parameters()
        if each.requires_grad
    }


def recipe_of(method):
    """The method behind group norms, as settings hold it; labels of ews are tensors, never text."""
    return f"gn(groups=16)+{method}"


@pytest.mark.filterwarnings("ignore:the EquiNorm layer:filterwise.FilterwiseWarning")
@pytest.mark.parametrize("method", [name for name in METHODS if name != "ews"])
def test_any_division_into_micro_batches_has_the_gradient_of_the_whole(coco, method):
    """Two and one, and all three pictures at once, one of them without a box."""
    task = task_of(settings(coco, model={"recipe": recipe_of(method)}, precision="64-true"))
    (step,) = task.epoch(0, 0)
    whole = [sample for part in step.parts for sample in part]
    assert [len(part) for part in step.parts] == [2, 1]
    loss, wanted = gradients(task, [whole])
    assert math.isfinite(loss)
    assert sum(bool(value.abs().max()) for value in wanted.values()) > 60
    ones = [[sample] for sample in whole]
    for parts in (ones, step.parts) if method == "ws" else (step.parts,):
        found_loss, found = gradients(task, parts)
        if method == "equinorm":
            # Its statistics are those of a micro-batch, as batch normalization's.
            assert math.isfinite(found_loss)
            continue
        assert found_loss == pytest.approx(loss, rel=1e-10)
        for name, value in found.items():
            torch.testing.assert_close(value, wanted[name], rtol=1e-7, atol=1e-10)


def stock(model):
    """Torchvision's own classes on the same layers."""
    model = copy.deepcopy(model)
    model.rpn.__class__, model.roi_heads.__class__ = RegionProposalNetwork, RoIHeads
    model.__class__ = GeneralizedRCNN
    return model


def test_a_picture_has_torchvisions_loss(coco):
    """With every box chosen nothing is drawn: the mean of what torchvision says of each alone."""
    wanted = settings(coco, options={**OPTIONS, "proposals": 100_000}, precision="64-true")
    task = task_of(wanted)
    for sampler in (task.model.rpn.fg_bg_sampler, task.model.roi_heads.fg_bg_sampler):
        sampler.batch_size_per_image, sampler.positive_fraction = 10**6, 0.5
    (step,) = task.epoch(0, 0)
    whole = [sample for part in step.parts for sample in part]
    theirs, alone = stock(task.model), []
    for sample in whole:
        pictures, targets = task._inputs([sample])
        losses = theirs(pictures, [{k: v for k, v in targets[0].items() if k != "seed"}])
        alone.append(float(sum(losses.values()).detach()))
    assert len(whole[0][1]["boxes"]) + len(whole[1][1]["boxes"]) + len(whole[2][1]["boxes"]) == 3
    loss, _ = gradients(task, [whole])
    # Theirs is float32 in one place.
    assert loss == pytest.approx(sum(alone) / 3, rel=1e-6)


def test_region_proposals_and_predictors_stay_plain(coco):
    task = task_of(settings(coco, model={"recipe": "gn(groups=16)+ws"}))
    layers = {name: each for name, each in task.model.named_modules() if hasattr(each, "weight")}
    plain = {name: each for name, each in layers.items() if name.startswith(PLAIN)}
    assert len(plain) == 7
    assert not any(isinstance(each, Hosted) for each in plain.values())
    convolutions = [
        each for name, each in layers.items() if isinstance(each, nn.Conv2d) and name not in plain
    ]
    assert len(convolutions) == 28
    assert all(isinstance(each, Hosted) for each in convolutions)
    norms = [name for name, each in layers.items() if isinstance(each, nn.GroupNorm)]
    assert {".".join(name.split(".")[:2]) for name in norms} == {
        "backbone.body",
        "backbone.fpn",
        "roi_heads.box_head",
        "roi_heads.mask_head",
    }
    assert not [m for m in task.model.modules() if isinstance(m, nn.BatchNorm2d)]


def test_a_run_of_each_detector_and_what_its_record_says(coco, tmp_path):
    record = train(settings(coco), tmp_path)
    assert record.status == "finished"
    assert {"box_ap", "mask_ap50"} <= record.metrics.keys()
    assert record.facts["pictures"] == {"train": 3, "test": 2}
    assert record.facts["classes"] == 2
    short = {"model": {"name": "faster-rcnn-resnet10", "recipe": "bn"}, "precision": "bf16-mixed"}
    faster = train(settings(coco, **short))
    assert faster.status == "finished"
    assert not any(name.startswith("mask") for name in faster.metrics)


def test_frozen_norms_do_not_train_and_batch_norm_stays_out_of_the_heads(coco):
    wanted = settings(
        coco,
        model={"recipe": "keep"},
        options={**OPTIONS, "frozen": True, "normalized": ["backbone"]},
        optimization={"micro_batch": 1},
    )
    task = task_of(wanted)
    kinds = {type(module).__name__ for module in task.model.modules()}
    assert "FrozenBatchNorm2d" in kinds
    assert "BatchNorm2d" not in kinds
    assert train(wanted).status == "finished"


def test_sizes_are_drawn_by_the_picture(coco):
    wanted = settings(coco, options={**OPTIONS, "sizes": [24, 32, 48]})
    task = task_of(wanted)
    seen = []
    task.model.transform.register_forward_hook(lambda _m, _i, out: seen.extend(out[0].image_sizes))
    for _ in range(2):
        for number in range(3):
            (step,) = task.epoch(number, 0)
            for part in step.parts:
                task.loss(task.model, part)
    assert len({min(size) for size in seen}) > 1
    # A shorter side of 48 would have a longer one of 67, and 64 is allowed.
    assert {min(size) for size in seen} <= {24, 32, 45}
    half = len(seen) // 2
    assert seen[:half] == seen[half:]


def test_workers_change_nothing(coco):
    changes = {"data": {"augmentation": {"flip": 0.5}}}
    alone = [step.parts for step in task_of(settings(coco, **changes)).epoch(1, 0)]
    state = torch.get_rng_state()
    task = task_of(settings(coco, **changes, execution={"workers": 1}))
    state = torch.get_rng_state()
    other = [step.parts for step in task.epoch(1, 0)]
    assert torch.equal(state, torch.get_rng_state())
    assert json.dumps(plain(alone)) == json.dumps(plain(other))


def plain(values):
    if isinstance(values, torch.Tensor):
        return values.tolist()
    if isinstance(values, dict):
        return {key: plain(value) for key, value in values.items()}
    return [plain(value) for value in values] if isinstance(values, list | tuple) else values


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": {"name": "mask-rnn-resnet50"}}, "Nearest: mask-rcnn-resnet50"),
        ({"data": {"name": "/nowhere"}}, "there is no folder /nowhere"),
        ({"options": {"train": ["train2018"]}}, "no part 'train2018'. Nearest: train2017"),
    ],
)
def test_what_is_not_there_is_named(coco, changes, words):
    with pytest.raises(UsageError, match=words):
        task_of(settings(coco, **changes))


def test_the_real_sample_trains():
    folder = samples("coco")
    wanted = settings(folder, data={"size": 64, "train_samples": 3, "test_samples": 2})
    record = train(wanted)
    assert record.status == "finished"
    assert record.facts["pictures"] == {"train": 50, "test": 50}
    assert record.facts["classes"] == 80
