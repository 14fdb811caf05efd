"""Mean average precision as Pascal VOC 2007 counts it, and the f-measure."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchvision.ops import box_iou

__all__ = ["VocScores"]

OVERLAP = 0.5
CONFIDENT = 0.5


class VocScores(Metric):
    """Eleven-point average precision of boxes at an overlap of 0.5, the mean over classes.

    As VOC's own program counts: findings of a class in the order of their scores; each belongs to
    the object of its picture and class that it overlaps most; if by half or more, the first one is
    right and each further one wrong; findings on objects marked difficult count neither way. The
    precision at recall r is the highest at any recall of r or more, and is averaged over r from 0
    to 1 in tenths (Everingham et al., IJCV 2010, section 4.2). Classes without an object are left
    out.

    ``f_measure`` is 2 TP / (2 TP + FP + FN) over all classes, of findings with a score of 0.5 or
    more.
    """

    better = {"map": "higher", "f_measure": "higher"}  # noqa: RUF012
    full_state_update = False
    rows: list[Tensor]
    objects: Tensor

    def __init__(self, classes: int, masks: bool, device: torch.device) -> None:
        """Make the metric for classes 1 to `classes` - 1."""
        super().__init__()
        del masks
        # Class, score, and whether it is right (1), wrong (0) or to be ignored (-1).
        self.add_state("rows", [], dist_reduce_fx="cat")
        self.add_state("objects", torch.zeros(classes, dtype=torch.long), dist_reduce_fx="sum")
        self.to(device)

    def update(self, found: list[dict[str, Tensor]], wanted: list[dict[str, Tensor]]) -> None:
        """Take the findings in some pictures."""
        for answer, truth in zip(found, wanted, strict=True):
            asked = truth["labels"][truth["iscrowd"] == 0]
            self.objects += torch.bincount(asked, minlength=len(self.objects))
            for label in answer["labels"].unique().tolist():
                mine, theirs = answer["labels"] == label, truth["labels"] == label
                scores, order = answer["scores"][mine].sort(descending=True, stable=True)
                right = _matched(
                    answer["boxes"][mine][order],
                    truth["boxes"][theirs],
                    truth["iscrowd"][theirs] == 1,
                )
                labels = torch.full_like(scores, label)
                self.rows.append(torch.stack([labels, scores, right.to(scores)], dim=1).double())

    def compute(self) -> dict[str, float]:
        """Return the values over all processes; none without an object."""
        rows: Any = self.rows
        if isinstance(rows, list):
            rows = torch.cat(rows) if rows else torch.zeros(0, 3, dtype=torch.double)
        labels, scores, right = rows.cpu().unbind(1)
        objects = self.objects.tolist()
        precisions = [
            _average(scores[labels == label], right[labels == label], count)
            for label, count in enumerate(objects)
            if count
        ]
        if not precisions:
            return {}
        sure = right[scores >= CONFIDENT]
        hits, misses = int((sure == 1).sum()), int((sure == 0).sum())
        measure = 2 * hits / (hits + misses + sum(objects))
        return {
            "map": round(sum(precisions) / len(precisions), 6),
            "f_measure": round(measure, 6),
        }


def _matched(boxes: Tensor, wanted: Tensor, ignored: Tensor) -> Tensor:
    """Return 1, 0 or -1 for each box, in the order of their scores."""
    right = torch.zeros(len(boxes), dtype=torch.long)
    if not len(wanted):
        return right
    overlaps, nearest = box_iou(boxes, wanted).max(1)
    taken = set()
    for place, (overlap, which) in enumerate(zip(overlaps.tolist(), nearest.tolist(), strict=True)):
        if overlap < OVERLAP:
            continue
        if bool(ignored[which]):
            right[place] = -1
        elif which not in taken:
            taken.add(which)
            right[place] = 1
    return right


def _average(scores: Tensor, right: Tensor, objects: int) -> float:
    counted = right >= 0
    order = scores[counted].sort(descending=True, stable=True).indices
    hits = (right[counted][order] == 1).double().cumsum(0)
    recall = hits / objects
    precision = hits / torch.arange(1, len(hits) + 1)
    points = []
    for tenth in range(11):
        reached = precision[recall >= tenth / 10 - 1e-12]
        points.append(float(reached.max()) if len(reached) else 0.0)
    return sum(points) / 11
