"""Random choices that depend on a picture's own seed, not on what else is in the micro-batch.

Torchvision draws from the global generator, so that the boxes a picture is trained on depend on the
pictures before it, on the size of a micro-batch and on the number of processes. With these, a step
is the same however it is divided.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from torch import Tensor
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler
from torchvision.models.detection.transform import GeneralizedRCNNTransform

__all__ = ["PictureSampler", "PictureTransform"]


class PictureSampler(BalancedPositiveNegativeSampler):
    """Torchvision's choice of boxes to train on, one seed for each picture.

    Attributes:
        seeds: Of the pictures still to come; without one the choice is torchvision's own.
    """

    def __init__(self, batch_size_per_image: int, positive_fraction: float) -> None:
        """Choose so many boxes of a picture, at most this fraction of them positive."""
        super().__init__(batch_size_per_image, positive_fraction)
        self.seeds: deque[int] = deque()

    def __call__(self, matched_idxs: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return masks of the positive and negative boxes chosen, for each picture."""
        positive, negative = [], []
        for labels in matched_idxs:
            if not self.seeds:
                more, less = super().__call__([labels])
            else:
                devices = [labels.device] if labels.is_cuda else []
                with torch.random.fork_rng(devices=devices):
                    torch.manual_seed(self.seeds.popleft())
                    more, less = super().__call__([labels])
            positive += more
            negative += less
        return positive, negative


class PictureTransform(GeneralizedRCNNTransform):
    """Torchvision's resizing and scaling, with a seed for the size of each picture.

    The last of the shorter sides is the one for tests, the others are those to train with.

    Attributes:
        seeds: Of the pictures still to come; without one the choice is torchvision's own.
    """

    def __init__(self, *sizes: Any) -> None:
        """Take what torchvision's takes."""
        super().__init__(*sizes)
        self.seeds: deque[int] = deque()

    def torch_choice(self, k: list[int]) -> int:
        """Return one of the shorter sides to train with."""
        sizes = k[:-1] or k
        return (
            sizes[self.seeds.popleft() % len(sizes)] if self.seeds else super().torch_choice(sizes)
        )
