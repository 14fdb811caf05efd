"""Average precision of boxes and masks, as COCO counts it."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import torch
from torchmetrics.detection import MeanAveragePrecision

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["CocoScores"]

NAMES = {
    "map": "ap",
    "map_50": "ap50",
    "map_75": "ap75",
    "map_small": "ap_small",
    "map_medium": "ap_medium",
    "map_large": "ap_large",
}
"""Of torchmetrics' values, those that the papers print, under the names of records."""


class CocoScores:
    """Average precision over thresholds, at 0.5 and 0.75, and by size; faster-coco-eval counts.

    Values are shares from 0 to 1, ``box_ap`` and, with masks, ``mask_ap`` and so on. A value for
    which there is no object at all (none of that size, say) is left out.
    """

    better = {  # noqa: RUF012
        f"{what}_{name}": "higher" for what in ("box", "mask") for name in NAMES.values()
    }

    def __init__(self, classes: int, masks: bool, device: torch.device) -> None:
        """Make the metric for classes 1 to `classes` - 1."""
        del classes
        self._kinds = {"bbox": "box", "segm": "mask"} if masks else {"bbox": "box"}
        self._precision = MeanAveragePrecision(
            iou_type=tuple(self._kinds),  # type: ignore[arg-type]
            backend="faster_coco_eval",
        ).to(device)

    def update(self, found: list[dict[str, Tensor]], wanted: list[dict[str, Tensor]]) -> None:
        """Take the findings in some pictures; masks are probabilities or bytes."""
        if "segm" in self._kinds:
            found = [{**each, "masks": each["masks"].squeeze(1) > 0.5} for each in found]
            wanted = [{**each, "masks": each["masks"] > 0} for each in wanted]
        self._precision.update(found, wanted)

    def compute(self) -> dict[str, float]:
        """Return the values over all processes."""
        with warnings.catch_warnings():
            # Pictures without a finding are no error, and metrics are computed once.
            warnings.simplefilter("ignore", UserWarning)
            values = self._precision.compute()
        alone = len(self._kinds) == 1
        return {
            f"{what}_{name}": round(float(values[key if alone else f"{kind}_{key}"]), 6)
            for kind, what in self._kinds.items()
            for key, name in NAMES.items()
            if float(values[key if alone else f"{kind}_{key}"]) >= 0
        }
