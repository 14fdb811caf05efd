"""Torchvision's residual nets for small pictures, with fewer planes, and one that it lacks."""

from __future__ import annotations

from typing import Any, Literal

from torch import nn
from torchvision.models import resnet

from filterwise.lab.architectures.planes import convolution, narrowed

__all__ = ["ResNet", "residual_net"]

LAYERS = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}
PLANES = 64
MULTIPLE = 16
"""A grouped block of 32x4d has 2 planes for 1 of the plain one: 16 leave one channel a group."""


class ResNet(resnet.ResNet):
    """Torchvision's ``ResNet``, under whose parameter names it goes.

    Attributes:
        stages: Names of what the stages are, in order.
    """

    stages = ("layer1", "layer2", "layer3", "layer4")

    def __init__(
        self,
        depth: int,
        stem: Literal["small", "large"],
        channels: int,
        classes: int,
        width: float,
        groups: int = 1,
        width_per_group: int = PLANES,
    ) -> None:
        """Build a net of so many layers.

        Args:
            depth: 18, 34, 50, 101 or 152.
            stem: ``large``: a 7x7 convolution of stride 2 and max pooling; ``small``: a 3x3
                convolution of stride 1 and no pooling, for pictures of 32 pixels.
            channels: Of the pictures.
            classes: Number of logits.
            width: Share of the planes.
            groups: Of the middle convolutions.
            width_per_group: Their planes in a group, for 64 of the block.
        """
        # Read while torchvision's constructor is at work.
        self._width = width
        block = resnet.BasicBlock if depth < 50 else resnet.Bottleneck
        super().__init__(
            block,
            [*LAYERS[depth]],
            num_classes=classes,
            groups=groups,
            width_per_group=width_per_group,
        )
        planes = narrowed(PLANES, width, MULTIPLE)
        self.conv1 = (
            convolution(channels, planes)
            if stem == "small"
            else nn.Conv2d(channels, planes, 7, stride=2, padding=3, bias=False)
        )
        nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")
        self.bn1 = nn.BatchNorm2d(planes)
        if stem == "small":
            self.maxpool = nn.Identity()
        self.fc = nn.Linear(narrowed(8 * PLANES, width, MULTIPLE) * block.expansion, classes)

    def _make_layer(self, block: Any, planes: int, *args: Any, **options: Any) -> nn.Sequential:
        if planes == PLANES:
            self.inplanes = narrowed(PLANES, self._width, MULTIPLE)
        return super()._make_layer(block, narrowed(planes, self._width, MULTIPLE), *args, **options)


def residual_net(
    channels: int, classes: int, width: float, *, depth: int, stem: Any = "small", groups: int = 1
) -> ResNet:
    """Build a ResNet, or of 32 groups a ResNeXt 32x4d (Xie et al., arXiv 1611.05431)."""
    in_group = PLANES if groups == 1 else 4
    return ResNet(depth, stem, channels, classes, width, groups, in_group)
