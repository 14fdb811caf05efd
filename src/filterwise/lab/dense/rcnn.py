"""Faster R-CNN and Mask R-CNN with a feature pyramid: torchvision's parts put together.

The form of Wu and He (arXiv 1803.08494) and Qiao et al. (arXiv 1903.10520): a box head of four
convolutions and one linear layer, a mask head of four convolutions, and an activation norm after
every convolution of backbone, pyramid and heads. Region proposals and predictors have none.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads, fastrcnn_loss, maskrcnn_loss
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import FeaturePyramidNetwork, FrozenBatchNorm2d, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from filterwise.lab.dense.backbones import residual_network
from filterwise.lab.dense.draws import PictureSampler, PictureTransform

if TYPE_CHECKING:
    from filterwise.lab.training.options import DetectionOptions

__all__ = ["PLAIN", "SCALING", "RegionDetector", "region_detector"]

PLAIN = ("rpn.", "roi_heads.box_predictor.", "roi_heads.mask_predictor.")
"""Where the names of layers begin that no recipe applies to."""
PARTS = {"backbone": "backbone.body.", "fpn": "backbone.fpn.", "heads": "roi_heads."}
SCALING = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
"""Mean and deviation of ImageNet's channels, in values from 0 to 1."""
LEVELS = ["0", "1", "2", "3"]


def region_detector(
    backbone: str, masks: bool, classes: int, size: int, options: DetectionOptions
) -> RegionDetector:
    """Build a detector with random weights.

    Args:
        backbone: A name of `filterwise.lab.dense.backbones.BACKBONES`.
        masks: Whether it is a Mask R-CNN.
        classes: With the background.
        size: Shorter side in pixels.
        options: Of the task.
    """

    def norm(part: str) -> type[nn.Module] | None:
        return nn.BatchNorm2d if part in options.normalized else None

    frozen = FrozenBatchNorm2d if options.frozen else nn.BatchNorm2d
    body = residual_network(backbone, norm=frozen if norm("backbone") else nn.Identity)
    width = options.channels
    pyramid = _Pyramid(body, width, norm("fpn"))
    anchors = AnchorGenerator(
        tuple((side,) for side in (32, 64, 128, 256, 512)), ((0.5, 1.0, 2.0),) * 5
    )
    proposals = PictureProposals(
        anchors,
        RPNHead(width, anchors.num_anchors_per_location()[0]),
        fg_iou_thresh=0.7,
        bg_iou_thresh=0.3,
        batch_size_per_image=256,
        positive_fraction=0.5,
        pre_nms_top_n={"training": 2000, "testing": 1000},
        post_nms_top_n={"training": 2000, "testing": 1000},
        nms_thresh=0.7,
    )
    heads = _heads(masks, classes, options, norm("heads"))
    sizes: Any = (*options.sizes, size)
    transform = PictureTransform(sizes, options.longest, *SCALING)
    return RegionDetector(pyramid, proposals, heads, transform)


def _heads(
    masks: bool, classes: int, options: DetectionOptions, norm: type[nn.Module] | None
) -> PictureHeads:
    width, linear = options.channels, 4 * options.channels
    parts: dict[str, Any] = {}
    if masks:
        parts = {
            "mask_roi_pool": MultiScaleRoIAlign(LEVELS, output_size=14, sampling_ratio=2),
            "mask_head": MaskRCNNHeads(width, [width] * 4, 1, norm_layer=norm),
            "mask_predictor": MaskRCNNPredictor(width, width, classes),
        }
    return PictureHeads(
        MultiScaleRoIAlign(LEVELS, output_size=7, sampling_ratio=2),
        FastRCNNConvFCHead((width, 7, 7), [width] * 4, [linear], norm_layer=norm),
        FastRCNNPredictor(linear, classes),
        fg_iou_thresh=0.5,
        bg_iou_thresh=0.5,
        batch_size_per_image=options.proposals,
        positive_fraction=0.25,
        bbox_reg_weights=None,
        score_thresh=0.05,
        nms_thresh=0.5,
        detections_per_img=100,
        **parts,
    )


class _Pyramid(nn.Module):
    """A backbone's four stages, and the pyramid on them."""

    def __init__(self, body: nn.Module, width: int, norm: type[nn.Module] | None) -> None:
        super().__init__()
        wide = int(body.fc.in_features)  # type: ignore[union-attr, arg-type]
        stages = {f"layer{number}": str(number - 1) for number in range(1, 5)}
        self.body = IntermediateLayerGetter(body, stages)
        self.fpn = FeaturePyramidNetwork(
            [wide // 8, wide // 4, wide // 2, wide], width, LastLevelMaxPool(), norm_layer=norm
        )
        self.out_channels = width

    def forward(self, pictures: Tensor) -> dict[str, Tensor]:
        return self.fpn(self.body(pictures))


class RegionDetector(GeneralizedRCNN):
    """A two-stage detector whose losses are sums over pictures.

    Torchvision averages over the boxes of all pictures of a batch together, so that a picture's
    weight depends on the others. Here each picture's loss is that of torchvision for this picture
    alone, and their sum is returned: any division of a step into micro-batches has the same
    gradient. Targets may have a ``seed``, which then decides all random choices for the picture.
    """

    def forward(self, images: list[Tensor], targets: list[dict[str, Any]] | None = None) -> Any:
        """Return the losses when training, each a sum over the pictures; findings otherwise."""
        seeds = [int(target["seed"]) for target in targets or () if "seed" in target]
        places: list[Any] = [
            self.transform,
            self.rpn.fg_bg_sampler,
            self.roi_heads.fg_bg_sampler,
        ]
        for place in places:
            place.seeds = deque(seeds)
        return super().forward(images, targets)


class PictureProposals(RegionProposalNetwork):
    """Torchvision's region proposals, with the sum of the pictures' losses."""

    def __init__(self, *parts: Any, **options: Any) -> None:
        """Take what torchvision's takes."""
        super().__init__(*parts, **options)
        sampler = self.fg_bg_sampler
        self.fg_bg_sampler = PictureSampler(sampler.batch_size_per_image, sampler.positive_fraction)

    def compute_loss(
        self,
        objectness: Tensor,
        pred_bbox_deltas: Tensor,
        labels: list[Tensor],
        regression_targets: list[Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Return the sums of the classification and of the box loss."""
        pictures = len(labels)
        per_picture = zip(
            objectness.reshape(pictures, -1, 1),
            pred_bbox_deltas.reshape(pictures, -1, 4),
            # Torchvision's are float32, and so would the loss be of a network in float64.
            [label.to(objectness.dtype) for label in labels],
            regression_targets,
            strict=True,
        )
        losses = [
            super(PictureProposals, self).compute_loss(scores, deltas, [label], [wanted])
            for scores, deltas, label, wanted in per_picture
        ]
        return sum_of(loss for loss, _ in losses), sum_of(loss for _, loss in losses)


class PictureHeads(RoIHeads):
    """Torchvision's heads, with the sum of the pictures' losses."""

    def __init__(self, *parts: Any, **options: Any) -> None:
        """Take what torchvision's takes."""
        super().__init__(*parts, **options)
        sampler = self.fg_bg_sampler
        self.fg_bg_sampler = PictureSampler(sampler.batch_size_per_image, sampler.positive_fraction)

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """Return findings and losses; one of them is empty."""
        if not self.training or targets is None:
            return super().forward(features, proposals, image_shapes, targets)
        proposals, matched, labels, wanted = self.select_training_samples(proposals, targets)
        found = self.box_head(self.box_roi_pool(features, proposals, image_shapes))
        logits, boxes = self.box_predictor(found)
        counts = [len(each) for each in labels]
        pairs = [
            _box_losses(*answer)
            for answer in zip(
                logits.split(counts), boxes.split(counts), labels, wanted, strict=True
            )
        ]
        losses = {
            "loss_classifier": sum_of(loss for loss, _ in pairs),
            "loss_box_reg": sum_of(loss for _, loss in pairs),
        }
        if self.has_mask():
            losses["loss_mask"] = self._mask_loss(
                features, proposals, image_shapes, targets, labels, matched
            )
        return [], losses

    def _mask_loss(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]],
        labels: list[Tensor],
        matched: list[Tensor],
    ) -> Tensor:
        positive = [torch.where(label > 0)[0] for label in labels]
        chosen = [boxes[places] for boxes, places in zip(proposals, positive, strict=True)]
        pooled = self.mask_roi_pool(features, chosen, image_shapes)  # type: ignore[misc]
        logits = self.mask_predictor(self.mask_head(pooled))  # type: ignore[misc]
        per_picture = zip(
            logits.split([len(places) for places in positive]),
            chosen,
            targets,
            [index[places] for index, places in zip(matched, positive, strict=True)],
            strict=True,
        )
        return sum_of(
            maskrcnn_loss(answer, [boxes], [target["masks"]], [target["labels"]], [index])
            for answer, boxes, target, index in per_picture
        )


def _box_losses(
    logits: Tensor, boxes: Tensor, labels: Tensor, wanted: Tensor
) -> tuple[Tensor, Tensor]:
    if not len(labels):
        # Numbers that are not finite leave no box: torchvision's mean over none is none either.
        return logits.sum(), boxes.sum()
    return fastrcnn_loss(logits, boxes, [labels], [wanted])


def sum_of(losses: Any) -> Tensor:
    """Return the sum of scalars."""
    return torch.stack(list(losses)).sum()
