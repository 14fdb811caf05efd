"""Average precision on cases that can be counted by hand."""

from __future__ import annotations

import pytest
import torch

from filterwise.lab.metrics.boxes import CocoScores

ONE, TWO = [10.0, 10.0, 50.0, 50.0], [60.0, 10.0, 90.0, 40.0]


def wanted(*boxes, labels=None, crowds=None):
    count = len(boxes)
    boxes = torch.tensor(boxes).reshape(-1, 4)
    return {
        "boxes": boxes,
        "labels": torch.tensor(labels or [1] * count, dtype=torch.int64),
        "area": (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]),
        "iscrowd": torch.tensor(crowds or [0] * count, dtype=torch.int64),
        "masks": drawn(boxes),
    }


def found(*boxes, labels=None, scores=None):
    count = len(boxes)
    boxes = torch.tensor(boxes).reshape(-1, 4)
    scores = scores or [1.0 - 0.1 * place for place in range(count)]
    return {
        "boxes": boxes,
        "labels": torch.tensor(labels or [1] * count, dtype=torch.int64),
        "scores": torch.tensor(scores),
        "masks": drawn(boxes).float().unsqueeze(1),
    }


def drawn(boxes):
    masks = torch.zeros(len(boxes), 100, 100, dtype=torch.uint8)
    for mask, (left, top, right, bottom) in zip(masks, boxes.long().tolist(), strict=True):
        mask[top:bottom, left:right] = 1
    return masks


def scores(answers, truths, masks=True):
    counted = CocoScores(3, masks, torch.device("cpu"))
    for answer, truth in zip(answers, truths, strict=True):
        counted.update([answer], [truth])
    return counted.compute()


def test_perfect():
    values = scores([found(ONE, TWO)], [wanted(ONE, TWO)])
    # 30x30 is small, 40x40 medium, and no object is large: that value is left out.
    names = {"ap", "ap50", "ap75", "ap_small", "ap_medium"}
    assert values == {f"{what}_{name}": 1.0 for what in ("box", "mask") for name in names}


def test_nothing_found_and_nothing_there():
    values = scores([found()], [wanted(ONE)])
    assert values["box_ap"] == values["mask_ap"] == 0.0
    # A picture without objects adds nothing but the chance of being wrong.
    assert scores([found(ONE), found()], [wanted(ONE), wanted()])["box_ap"] == 1.0
    assert scores([found()], [wanted()]) == {}


def test_a_wrong_finding_above_the_right_one_halves_the_precision():
    values = scores([found(TWO, ONE)], [wanted(ONE)], masks=False)
    assert values["box_ap50"] == pytest.approx(0.5)
    assert scores([found(ONE, TWO)], [wanted(ONE)], masks=False)["box_ap50"] == 1.0
    assert "mask_ap" not in values


def test_a_finding_in_a_crowd_counts_neither_way():
    truth = wanted(ONE, [60.0, 0.0, 100.0, 100.0], crowds=[0, 1])
    values = scores([found(TWO, ONE)], [truth])
    assert values["box_ap"] == values["mask_ap"] == 1.0


def test_a_class_that_is_missed_counts_and_one_that_is_not_there_does_not():
    truth = wanted(ONE, TWO, labels=[1, 2])
    assert scores([found(ONE)], [truth])["box_ap"] == pytest.approx(0.5)
    assert scores([found(ONE)], [wanted(ONE)])["box_ap"] == 1.0


def test_thresholds_of_overlap():
    """A box shifted by 6 of 40 pixels: 34 x 40 of 46 x 40 overlap, 0.739."""
    shifted = [16.0, 10.0, 56.0, 50.0]
    values = scores([found(shifted)], [wanted(ONE)])
    assert (values["box_ap50"], values["box_ap75"]) == (1.0, 0.0)
    assert values["box_ap"] == values["mask_ap"] == pytest.approx(0.5)
