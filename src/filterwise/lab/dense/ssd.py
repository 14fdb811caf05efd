"""SSD at 320 pixels: torchvision's parts put together, with a norm after every convolution.

Liu et al., arXiv 1512.02325, in the form of Liu et al. (AAAI 2021): six maps of 40, 20, 10, 5, 3
and 1, default boxes of 32 to 336 pixels (those of SSD300, scaled to 320), no dropout.
"""

from __future__ import annotations

from collections import OrderedDict
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
from torchvision.models.detection.ssd import SSD
from torchvision.models.vgg import make_layers
from torchvision.ops import Conv2dNormActivation

from filterwise.lab.dense.backbones import residual_network

__all__ = ["PARTS", "SIZE", "OneShotDetector", "one_shot_detector"]

SIZE = 320
PARTS = {"backbone": "backbone.", "predictors": "head."}
SIZES = (32.0, 64.0, 118.4, 172.8, 227.2, 281.6, 336.0)
RATIOS = ([2], [2, 3], [2, 3], [2, 3], [2], [2])
VGG16 = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512)


def one_shot_detector(backbone: str, classes: int, width: float = 1.0) -> OneShotDetector:
    """Build a detector with random weights.

    Args:
        backbone: ``vgg16``, or a name of `filterwise.lab.dense.backbones.BACKBONES`.
        classes: With the background.
        width: Share of the planes of the VGG and of the added layers.
    """
    maps = _VggMaps(width) if backbone == "vgg16" else _ResidualMaps(backbone, width)
    boxes = DefaultBoxGenerator(
        [list(each) for each in RATIOS], scales=[side / SIZE for side in SIZES]
    )
    return OneShotDetector(maps, boxes, (SIZE, SIZE), classes, nms_thresh=0.5)


class OneShotDetector(SSD):
    """Torchvision's SSD, whose losses are sums over pictures.

    A picture's loss is divided by the number of its own matched boxes, as in the paper's formula;
    torchvision divides by that of all pictures of a micro-batch.
    """

    def compute_loss(
        self,
        targets: list[dict[str, Tensor]],
        head_outputs: dict[str, Tensor],
        anchors: list[Tensor],
        matched_idxs: list[Tensor],
    ) -> dict[str, Tensor]:
        """Return the sums of the box and of the classification loss."""
        found = [
            super(OneShotDetector, self).compute_loss(
                [target],
                {name: values[place : place + 1] for name, values in head_outputs.items()},
                [anchors[place]],
                [matched_idxs[place]],
            )
            for place, target in enumerate(targets)
        ]
        return {name: torch.stack([each[name] for each in found]).sum() for name in found[0]}


class _VggMaps(nn.Module):
    """VGG-16 to its fourth pooling, the rest with dilation, and four smaller maps."""

    def __init__(self, width: float) -> None:
        super().__init__()
        planes = _planes(width)
        form: Any = [each if isinstance(each, str) else planes(each) for each in VGG16]
        self.body = make_layers(form, batch_norm=True)
        pools = [place for place, layer in enumerate(self.body) if isinstance(layer, nn.MaxPool2d)]
        self.fourth = pools[3]
        wide, deep = planes(512), planes(1024)
        self.dilated = nn.Sequential(
            nn.MaxPool2d(3, 1, 1),
            _block(wide, deep, kernel_size=3, dilation=6),
            _block(deep, deep, kernel_size=1),
        )
        # The first map is brought to one length at each place, times a learned factor a channel.
        self.factor = nn.Parameter(torch.full((wide,), 20.0))
        self.added = _added(deep, planes, first=True)
        self.out_channels = [wide, deep, planes(512), planes(256), planes(256), planes(256)]

    def forward(self, pictures: Tensor) -> dict[str, Tensor]:
        values = self.body[: self.fourth](pictures)
        first = self.factor.view(1, -1, 1, 1) * nn.functional.normalize(values)
        values = self.dilated(self.body[self.fourth :](values))
        return _named([first, values, *_along(self.added, values)])


class _ResidualMaps(nn.Module):
    """Maps of strides 8, 16 and 32 of a residual network, and three smaller ones."""

    def __init__(self, backbone: str, width: float) -> None:
        super().__init__()
        body = residual_network(backbone)
        planes, deep = _planes(width), body.fc.in_features
        stages = {"layer2": "0", "layer3": "1", "layer4": "2"}
        self.body = IntermediateLayerGetter(body, stages)
        self.added = _added(deep, planes, first=False)
        self.out_channels = [deep // 4, deep // 2, deep, planes(512), planes(256), planes(256)]

    def forward(self, pictures: Tensor) -> dict[str, Tensor]:
        maps = list(self.body(pictures).values())
        return _named([*maps, *_along(self.added, maps[-1])])


def _planes(width: float) -> Any:
    # Whole multiples of 8, so that groups divide them.
    return lambda full: max(8, round(full * width / 8) * 8)


def _block(channels: int, planes: int, **form: Any) -> nn.Module:
    return Conv2dNormActivation(channels, planes, **form)


def _added(channels: int, planes: Any, first: bool) -> nn.ModuleList:
    """Return the layers behind the backbone: from 20 to 10 (if `first`), 5, 3 and 1; or from 10."""
    halved = partial(_block, kernel_size=3, stride=2)
    inner = partial(_block, kernel_size=3, padding=0)
    forms = [(256, 512, halved), (128, 256, halved), (128, 256, inner), (128, 256, inner)]
    if not first:
        forms = [(256, 512, halved), *forms[2:]]
    layers = nn.ModuleList()
    for narrow, wide, form in forms:
        layers.append(
            nn.Sequential(
                _block(channels, planes(narrow), kernel_size=1),
                form(planes(narrow), planes(wide)),
            )
        )
        channels = planes(wide)
    return layers


def _along(layers: nn.ModuleList, values: Tensor) -> list[Tensor]:
    found = []
    for layer in layers:
        values = layer(values)
        found.append(values)
    return found


def _named(maps: list[Tensor]) -> dict[str, Tensor]:
    return OrderedDict((str(place), values) for place, values in enumerate(maps))
