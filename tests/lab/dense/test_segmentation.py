"""Segmentation: maps and their faults, mean intersection over union, DeepLabv3."""

from __future__ import annotations

import math

import numpy
import pytest
import torch
from PIL import Image
from torch import nn

from filterwise.lab.data.maps import load_maps, tensors_of_map
from filterwise.lab.errors import UsageError
from filterwise.lab.metrics.maps import MapScores
from filterwise.lab.tasks.segmentation import Segmentation
from filterwise.lab.training.place import make_fabric
from filterwise.lab.training.seeds import seed_everything
from filterwise.lab.training.settings import checked_training
from filterwise.lab.training.stepper import Stepper
from filterwise.lab.training.train import train
from filterwise.methods.registry import METHODS
from support.scenes import picture, samples, write_voc


@pytest.fixture(scope="module")
def voc(tmp_path_factory):
    return write_voc(tmp_path_factory.mktemp("voc"))


def load(folder, skip_bad=False):
    return load_maps(folder, (), (), skip_bad=skip_bad)


def folders(path):
    """Write the layout of mask folders."""
    (path / "classes.txt").write_text("background\nroad\nsky\n")
    for part, count in (("train", 2), ("val", 1)):
        (path / part / "masks").mkdir(parents=True)
        for number in range(count):
            picture(path / part / "images" / f"{number}.png", 20, 16)
            values = numpy.full((16, 20), number + 1, dtype=numpy.uint8)
            Image.fromarray(values).save(path / part / "masks" / f"{number}.png")
    return path


def test_maps_are_those_of_the_files(voc):
    data = load(voc)
    assert [len(data.train), len(data.test), len(data.classes)] == [3, 2, 21]
    shown, values = tensors_of_map(data.train[0])
    assert shown.shape == (3, 40, 56)
    assert values.unique().tolist() == [0, 12, 255]
    assert int((values == 12).sum()) == 20 * 24


def test_mask_folders_and_their_faults(tmp_path):
    assert load(folders(tmp_path)).classes == ("background", "road", "sky")
    masks = tmp_path / "train" / "masks"
    Image.fromarray(numpy.full((16, 20), 7, dtype=numpy.uint8)).save(masks / "0.png")
    Image.fromarray(numpy.full((9, 20), 1, dtype=numpy.uint8)).save(masks / "1.png")
    for name in ("2", "3", "4", "5"):
        picture(tmp_path / "train" / "images" / f"{name}.png", 20, 16)
    picture(masks / "3.png", 20, 16)
    (masks / "4.png").write_bytes(b"no picture")
    Image.fromarray(numpy.full((16, 20), 1, dtype=numpy.uint8)).save(masks / "5.png")
    (tmp_path / "val" / "images" / "0.png").write_bytes(b"no picture")
    picture(tmp_path / "val" / "images" / "9.png", 20, 16)
    Image.fromarray(numpy.zeros((16, 20), dtype=numpy.uint8)).save(tmp_path / "val/masks/9.png")
    with pytest.raises(UsageError, match="6 faulty entries") as caught:
        load(tmp_path)
    words = str(caught.value)
    assert "0.png: value of no class (7; there are 3 classes, and 255 for none)" in words
    assert "1.png: mask of another size (20x9, the picture 20x16)" in words
    assert "2.png: missing mask" in words
    assert "3.png: mask with colours in place of numbers" in words
    assert "4.png: broken mask" in words
    assert "broken picture" in words
    data = load(tmp_path, skip_bad=True)
    assert [len(data.train), len(data.test)] == [1, 1]
    (tmp_path / "classes.txt").unlink()
    with pytest.raises(UsageError, match=r"has no classes\.txt"):
        load(tmp_path)


def values_of(wanted, found, classes=4):
    scores = MapScores(classes, torch.device("cpu"))
    logits = nn.functional.one_hot(torch.tensor([found]), classes).permute(0, 3, 1, 2)
    scores.update(logits.float(), torch.tensor([wanted], dtype=torch.uint8))
    return scores.compute()


@pytest.mark.parametrize(
    ("wanted", "found", "result"),
    [
        ([[0, 1], [2, 2]], [[0, 1], [2, 2]], {"miou": 1.0, "pixel_accuracy": 1.0}),
        ([[0, 0], [1, 1]], [[1, 1], [0, 0]], {"miou": 0.0, "pixel_accuracy": 0.0}),
        # Void is neither right nor wrong.
        ([[0, 255], [1, 255]], [[0, 1], [1, 0]], {"miou": 1.0, "pixel_accuracy": 1.0}),
        ([[255, 255], [255, 255]], [[0, 1], [1, 0]], {}),
        # Class 2 is not there and is called once: it has a union and no intersection.
        ([[0, 0], [1, 1]], [[0, 2], [1, 1]], {"miou": (1 / 2 + 1 + 0) / 3, "pixel_accuracy": 0.75}),
        # Class 1 is there and never called.
        ([[0, 0], [0, 1]], [[0, 0], [0, 0]], {"miou": (3 / 4 + 0) / 2, "pixel_accuracy": 0.75}),
    ],
)
def test_mean_intersection_over_union_by_hand(wanted, found, result):
    assert values_of(wanted, found) == pytest.approx(result, abs=1e-6)


def settings(folder, **changes):
    values = {
        "task": "segmentation",
        "data": {"name": str(folder), "size": 33, "augmentation": {"flip": 0.5}},
        "model": {"name": "deeplabv3-resnet14", "recipe": "gn(groups=8)+ws"},
        "optimization": {
            "learning_rate": 0.007,
            "step_size": 3,
            "micro_batch": 2,
            "schedule": {"kind": "polynomial"},
        },
        "options": {"channels": 16},
    }
    for key, value in changes.items():
        values[key] = values.get(key, {}) | value if isinstance(value, dict) else value
    return checked_training(values)


def task_of(wanted):
    seed_everything(0, "model")
    return Segmentation(wanted, make_fabric(precision=wanted.precision))


@pytest.mark.filterwarnings("ignore:the EquiNorm layer:filterwise.FilterwiseWarning")
@pytest.mark.parametrize("method", [name for name in METHODS if name != "ews"])
def test_any_division_into_micro_batches_has_the_gradient_of_the_whole(voc, method):
    """The mean over pictures of the mean over their pixels, against plain torch."""
    wanted = settings(voc, model={"recipe": f"gn(groups=8)+{method}"}, precision="64-true")
    task = task_of(wanted)
    for module in task.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    (step,) = task.epoch(0, 0)
    whole = [sample for part in step.parts for sample in part]
    optimizer = torch.optim.SGD(task.model.parameters(), lr=0.0)
    stepper = Stepper(make_fabric(precision="64-true"), task.model, optimizer, task.loss)
    found = stepper.step(step.parts, 3)
    assert math.isfinite(found)
    gradients = [each.grad.clone() for each in task.model.parameters()]
    if method == "equinorm":
        return
    task.model.zero_grad()
    mean, deviation = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
    pictures = torch.stack([shown for shown, _ in whole]).double()
    pictures -= torch.tensor(mean, dtype=torch.double).view(3, 1, 1)
    pictures /= torch.tensor(deviation, dtype=torch.double).view(3, 1, 1)
    logits = task.model(pictures)["out"]
    losses = [
        nn.functional.cross_entropy(answer[None], values[None].long(), ignore_index=255)
        for answer, (_, values) in zip(logits, whole, strict=True)
    ]
    loss = torch.stack(losses).mean()
    loss.backward()
    assert found == pytest.approx(float(loss.detach()), rel=1e-10)
    for value, parameter in zip(gradients, task.model.parameters(), strict=True):
        torch.testing.assert_close(value, parameter.grad, rtol=1e-7, atol=1e-10)


def test_the_stride_is_sixteen_and_all_blocks_of_the_last_stage_are_dilated(voc):
    task = task_of(settings(voc, model={"name": "deeplabv3-resnet50", "recipe": "keep"}))
    maps = task.model.backbone(torch.zeros(1, 3, 64, 48))["out"]
    assert maps.shape[-2:] == (4, 3)
    assert [block.conv2.dilation for block in task.model.backbone.layer4] == [(2, 2)] * 3
    assert [block.conv2.dilation for block in task.model.backbone.layer3] == [(1, 1)] * 6
    rates = [branch[0].dilation[0] for branch in list(task.model.classifier[0].convs)[1:4]]
    assert rates == [6, 12, 18]


def test_a_picture_smaller_than_the_crop_is_filled_up_with_void(voc):
    wanted = settings(voc, data={"size": 129}, options={"channels": 16, "scales": [1.0, 1.0]})
    (step,) = task_of(wanted).epoch(0, 0)
    for shown, values in [sample for part in step.parts for sample in part]:
        assert shown.shape == (3, 129, 129)
        assert int((values == 12).sum()) == 20 * 24
        assert int((values == 255).sum()) == 129 * 129 - 40 * 56 + 24
        assert shown[:, values == 255].float().mean() < 128


def test_a_run_and_a_norm_that_sees_one_value(voc, tmp_path):
    record = train(settings(voc), tmp_path)
    assert record.status == "finished"
    assert {"miou", "pixel_accuracy"} == record.metrics.keys()
    alone = {"model": {"recipe": "bn"}, "optimization": {"micro_batch": 1}}
    failed = train(settings(voc, **alone))
    assert (failed.status, failed.steps) == ("failed", 0)
    assert "one value a channel" in failed.why


def test_a_backbone_without_dilation_is_refused(voc):
    with pytest.raises(UsageError, match="resnet10 has no dilated form; take one of resnet14"):
        task_of(settings(voc, model={"name": "deeplabv3-resnet10"}))
    with pytest.raises(UsageError, match="Nearest: deeplabv3-resnet50"):
        task_of(settings(voc, model={"name": "deeplab-resnet50"}))


def test_the_real_sample_trains():
    folder = samples("voc_layout_from_coco")
    wanted = settings(folder, data={"train_samples": 3, "test_samples": 2})
    record = train(wanted)
    assert record.status == "finished"
    assert record.facts["pictures"] == {"train": 30, "test": 20}
    assert record.facts["left_out"] == {}
