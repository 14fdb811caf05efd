"""The two small nets that `filterwise compare` trains."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from filterwise.lab.architectures.planes import convolution, narrowed

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["PlainNet", "ResidualNet"]


class PlainNet(nn.Module):
    """Six weight layers in a row: five 3x3 convolutions, each with norm and ReLU, and a classifier.

    The map is halved twice, so an 8x8 picture ends as 2x2 and a norm still sees four values a
    channel of one picture; then it is averaged. The last layer is wide enough for group
    normalization to have four channels in each of its 32 groups: with one or two there would be
    next to nothing left in the average. Weights start as in He et al. (2015), fan-in.

    A deeper one repeats these convolutions in turn, each with as many planes in as out.
    """

    WIDTHS = (16, 16, 32, 64, 128)
    STRIDES = (1, 1, 2, 1, 2)

    def __init__(self, channels: int, classes: int, width: float = 1.0, *, depth: int = 6) -> None:
        """Build the net for pictures of `channels` channels with a share of its planes.

        Args:
            channels: Of the pictures.
            classes: Number of logits.
            width: Share of the planes.
            depth: Weight layers, the classifier among them; 6 or more.
        """
        super().__init__()
        layers: list[nn.Module] = []
        for place, (planes, stride) in enumerate(zip(self.WIDTHS, self.STRIDES, strict=True)):
            planes = narrowed(planes, width)
            # Of the convolutions beyond the five, those that fall to this place.
            for repeat in range(1 + len(range(place, depth - 1 - len(self.WIDTHS), 5))):
                layer = convolution(channels, planes, stride=1 if repeat else stride)
                layers += [layer, nn.BatchNorm2d(planes), nn.ReLU()]
                channels = planes
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(channels, classes)
        _start(self)

    def forward(self, pictures: Tensor) -> Tensor:
        """Return logits ``(pictures, classes)``."""
        return self.classifier(self.pool(self.features(pictures)).flatten(1))


class ResidualNet(nn.Module):
    """Fifty weight layers: a 3x3 convolution, 24 residual branches of two, and a classifier.

    A branch is ReLU, convolution, norm, ReLU, convolution, norm, and nothing but additions lies on
    the trunk (pre-activation, as in He et al. 2016, for which the gains of 1/sqrt(24) are meant).
    Where width or map changes, the trunk is averaged and padded with zero channels; no weights.
    """

    WIDTHS = (8, 16, 32)
    BLOCKS = 8

    def __init__(self, channels: int, classes: int, width: float = 1.0) -> None:
        """Build the net for pictures of `channels` channels with a share of its planes."""
        super().__init__()
        widths = [narrowed(planes, width) for planes in self.WIDTHS]
        trunk = widths[0]
        self.stem = nn.Sequential(convolution(channels, trunk), nn.BatchNorm2d(trunk))
        blocks: list[nn.Module] = []
        for stage, planes in enumerate(widths):
            for place in range(self.BLOCKS):
                stride = 2 if stage > 0 and place == 0 else 1
                blocks.append(_Block(trunk, planes, stride))
                trunk = planes
        self.blocks = nn.Sequential(*blocks)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(trunk, classes)
        _start(self)

    def forward(self, pictures: Tensor) -> Tensor:
        """Return logits ``(pictures, classes)``."""
        trunk = self.blocks(self.stem(pictures))
        return self.classifier(self.pool(trunk.relu()).flatten(1))


class _Block(nn.Module):
    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.ReLU(),
            convolution(channels, width, stride=stride),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            convolution(width, width),
            nn.BatchNorm2d(width),
        )
        self.stride, self.added = stride, width - channels

    def forward(self, trunk: Tensor) -> Tensor:
        branch = self.branch(trunk)
        if self.stride > 1:
            trunk = nn.functional.avg_pool2d(trunk, self.stride, ceil_mode=True)
        if self.added:
            trunk = nn.functional.pad(trunk, (0, 0, 0, 0, 0, self.added))
        return trunk + branch


def _start(net: nn.Module) -> None:
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
            nn.init.zeros_(module.bias)
