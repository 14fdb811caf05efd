"""VOC's layout, its eleven-point average precision, and SSD."""

from __future__ import annotations

import math

import pytest
import torch

from filterwise.lab.data.detection import load_scenes
from filterwise.lab.data.scenes import tensors_of
from filterwise.lab.errors import UsageError
from filterwise.lab.metrics.voc import VocScores
from filterwise.lab.tasks.detection import Detection
from filterwise.lab.training.place import make_fabric
from filterwise.lab.training.seeds import seed_everything
from filterwise.lab.training.settings import checked_training
from filterwise.lab.training.stepper import Stepper
from filterwise.lab.training.train import train
from support.scenes import samples, voc_entry, write_voc


def load(folder, skip_bad=False):
    return load_scenes(folder, (), (), skip_bad=skip_bad)


def test_boxes_are_edges_of_pixels_and_the_difficult_are_ignored(tmp_path):
    data = load(write_voc(tmp_path))
    assert [len(half.scenes) for half in (data.train, data.test)] == [3, 2]
    _, target = tensors_of(data.test.scenes[0], masks=False, training=False)
    assert target["boxes"].tolist() == [[4, 6, 24, 30], [29, 0, 40, 20]]
    assert [data.test.classes[label] for label in target["labels"]] == ["dog", "cat"]
    assert target["iscrowd"].tolist() == [0, 1]
    assert target["area"].tolist() == [20 * 24, 11 * 20]


def test_faults_are_listed_with_file_and_object(tmp_path):
    year = write_voc(tmp_path) / "VOCdevkit" / "VOC2012"
    wrong = [("dgo", (5, 7, 24, 30), 0), ("dog", (5, 7, 60, 30), 0), ("dog", (9, 7, 8, 30), 0)]
    (year / "Annotations" / "train0.xml").write_text(voc_entry(56, 40, wrong))
    (year / "Annotations" / "train1.xml").write_text("<annotation>")
    (year / "Annotations" / "train2.xml").unlink()
    (year / "JPEGImages" / "val0.jpg").unlink()
    with pytest.raises(UsageError, match="6 faulty entries") as caught:
        load(tmp_path)
    words = str(caught.value)
    assert "train0.xml, object 1: unknown class (dgo)" in words
    assert "train0.xml, object 2: box outside the picture" in words
    assert "train0.xml, object 3: box without area" in words
    assert "train1.xml: annotation that cannot be read" in words
    assert "train2.xml: missing annotation" in words
    assert "val0.jpg: missing picture" in words
    data = load(tmp_path, skip_bad=True)
    assert sum(data.left_out.values()) == 6
    # A picture whose objects are all faulty is one without objects.
    assert [len(scene.things) for scene in data.train.scenes] == [0]


ONE, TWO, FAR = [10.0, 10.0, 50.0, 50.0], [60.0, 10.0, 90.0, 40.0], [0.0, 60.0, 20.0, 90.0]


def truth(*boxes, labels=None, difficult=None):
    count = len(boxes)
    return {
        "boxes": torch.tensor(boxes).reshape(-1, 4),
        "labels": torch.tensor(labels or [1] * count, dtype=torch.int64),
        "iscrowd": torch.tensor(difficult or [0] * count, dtype=torch.int64),
    }


def answer(*boxes, labels=None, scores=None):
    count = len(boxes)
    return {
        "boxes": torch.tensor(boxes).reshape(-1, 4),
        "labels": torch.tensor(labels or [1] * count, dtype=torch.int64),
        "scores": torch.tensor(scores or [0.9 - 0.1 * place for place in range(count)]),
    }


def scores(answers, truths):
    counted = VocScores(4, False, torch.device("cpu"))
    for one, other in zip(answers, truths, strict=True):
        counted.update([one], [other])
    return counted.compute()


@pytest.mark.parametrize(
    ("answers", "truths", "wanted"),
    [
        ([answer(ONE, TWO)], [truth(ONE, TWO)], {"map": 1.0, "f_measure": 1.0}),
        ([answer()], [truth(ONE)], {"map": 0.0, "f_measure": 0.0}),
        ([answer()], [truth()], {}),
        # One of two found, first: precision 1 up to recall 0.5, so six of eleven points.
        ([answer(ONE, FAR)], [truth(ONE, TWO)], {"map": 6 / 11, "f_measure": 0.5}),
        # The wrong one first: 1/2 at recall 1.
        ([answer(FAR, ONE)], [truth(ONE)], {"map": 0.5, "f_measure": 2 / 3}),
        # A second finding of one object is wrong, though the other object is free.
        ([answer(ONE, ONE)], [truth(ONE)], {"map": 1.0, "f_measure": 2 / 3}),
        # Difficult: neither asked for nor held against.
        (
            [answer(TWO, ONE)],
            [truth(ONE, TWO, difficult=[0, 1])],
            {"map": 1.0, "f_measure": 1.0},
        ),
        # A class that is missed counts, one that is not there (2) does not.
        (
            [answer(ONE)],
            [truth(ONE, TWO, labels=[1, 3])],
            {"map": 0.5, "f_measure": 2 / 3},
        ),
        # Scores of two pictures are one order: right 0.9, wrong 0.8, right 0.7.
        (
            [answer(ONE, scores=[0.9]), answer(FAR, TWO, scores=[0.8, 0.7])],
            [truth(ONE), truth(TWO)],
            {"map": (6 * 1 + 5 * 2 / 3) / 11, "f_measure": 0.8},
        ),
        # Below one half nobody is sure.
        ([answer(ONE, scores=[0.4])], [truth(ONE)], {"map": 1.0, "f_measure": 0.0}),
    ],
)
def test_average_precision_and_f_measure_by_hand(answers, truths, wanted):
    assert scores(answers, truths) == pytest.approx(wanted, abs=1e-6)


def settings(folder, **changes):
    values = {
        "task": "detection",
        "data": {"name": str(folder), "size": 320, "augmentation": {"flip": 0.5}},
        "model": {"name": "ssd-vgg16", "recipe": "gn(groups=4)+ws", "width": 0.0625},
        "optimization": {"learning_rate": 0.001, "step_size": 3, "micro_batch": 2},
        "options": {"metric": "voc07", "augmentation": "ssd"},
    }
    for key, value in changes.items():
        values[key] = values.get(key, {}) | value if isinstance(value, dict) else value
    return checked_training(values)


@pytest.mark.parametrize(
    ("name", "recipe"),
    [("ssd-vgg16", "gn(groups=4)+ws"), ("ssd-vgg16", "pws"), ("ssd-resnet10", "gn(groups=4)+wa")],
)
def test_any_division_of_a_step_of_ssd_has_the_same_gradient(tmp_path, name, recipe):
    wanted = settings(
        write_voc(tmp_path), model={"name": name, "recipe": recipe}, precision="64-true"
    )
    seed_everything(0, "model")
    task = Detection(wanted, make_fabric(precision="64-true"))
    optimizer = torch.optim.SGD(task.model.parameters(), lr=0.0)
    stepper = Stepper(make_fabric(precision="64-true"), task.model, optimizer, task.loss)
    (step,) = task.epoch(0, 0)
    whole = [sample for part in step.parts for sample in part]
    found = []
    for parts in ([whole], step.parts):
        loss = stepper.step(parts, 3)
        assert math.isfinite(loss)
        found.append((loss, [p.grad.clone() for p in task.model.parameters()]))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-9)
    for one, other in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)


def test_ssd_has_six_maps_and_its_boxes_go_from_32_to_336(tmp_path):
    wanted = settings(write_voc(tmp_path))
    task = Detection(wanted, make_fabric())
    sides = []
    task.model.head.register_forward_pre_hook(
        lambda _m, inputs: sides.extend(each.shape[-1] for each in inputs[0])
    )
    boxes = []
    task.model.anchor_generator.register_forward_hook(lambda _m, _i, out: boxes.append(out[0]))
    (step,) = task.epoch(0, 0)
    task.loss(task.model, step.parts[0])
    assert sides == [40, 20, 10, 5, 3, 1]
    assert len(boxes[0]) == 4 * (40**2 + 3**2 + 1) + 6 * (20**2 + 10**2 + 5**2)
    sides = boxes[0][:, 2:] - boxes[0][:, :2]
    squares = sides[(sides[:, 0] - sides[:, 1]).abs() < 1e-3][:, 0]
    assert float(squares.min()) == pytest.approx(32, abs=1e-3)
    # The last map has a square of its own size, and one of the mean with the size after it.
    assert float(squares.max()) == pytest.approx((281.6 * 336) ** 0.5, abs=1e-2)


def test_divergence_of_a_detector_is_a_result(tmp_path):
    record = train(
        settings(
            write_voc(tmp_path),
            model={"recipe": "none"},
            optimization={"learning_rate": 1e12, "epochs": 3},
        )
    )
    assert record.status == "diverged"
    assert record.metrics["map"] == 0.0


def test_the_real_sample_is_without_fault():
    data = load(samples("voc_layout_from_coco"))
    assert [len(half.scenes) for half in (data.train, data.test)] == [30, 20]
    assert sum(len(s.things) for half in (data.train, data.test) for s in half.scenes) == 311
