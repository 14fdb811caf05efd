"""DeepLabv3 at output stride 16: torchvision's parts put together.

Chen et al., arXiv 1706.05587: the last stage is dilated in place of its stride, the pyramid's rates
are 6, 12 and 18, and with multi-grid (1, 1, 1) all three blocks of the stage have dilation 2;
torchvision leaves the first of them undilated.
"""

from __future__ import annotations

from typing import cast

from torch import nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.resnet import Bottleneck
from torchvision.models.segmentation.deeplabv3 import ASPP, DeepLabV3

from filterwise.lab.dense.backbones import residual_network

__all__ = ["PREDICTOR", "deeplab"]

PREDICTOR = "classifier.4"
"""Name of the last layer, which no recipe applies to."""
RATES = (6, 12, 18)


def deeplab(backbone: str, classes: int, channels: int = 256) -> DeepLabV3:
    """Build a segmenter with random weights; it answers ``out``, logits of the pictures' size.

    Args:
        backbone: One of `filterwise.lab.dense.backbones.BACKBONES` that has bottlenecks.
        classes: With the background.
        channels: Of the pyramid.
    """
    body = residual_network(backbone, dilated=(False, False, True))
    for block in cast("nn.Sequential", body.layer4):
        convolution = cast("Bottleneck", block).conv2
        convolution.dilation = convolution.padding = (2, 2)
    classifier = nn.Sequential(
        ASPP(body.fc.in_features, RATES, channels),
        nn.Conv2d(channels, channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.Conv2d(channels, classes, 1),
    )
    return DeepLabV3(IntermediateLayerGetter(body, {"layer4": "out"}), classifier)
