"""Pre-activation residual nets for pictures of 32 pixels: EquiNorm's wide and its deep one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from filterwise.lab.architectures.planes import convolution, draw_fan_out, narrowed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

__all__ = ["PreActivationNet", "preactivation_resnet152", "wide_residual_20"]

EXPANSION = 4


class PreActivationNet(nn.Module):
    """Stages of pre-activation blocks (He et al., arXiv 1603.05027) behind a 3x3 convolution.

    A block is norm, ReLU and convolution two or three times; where planes or map change, the trunk
    goes through a 1x1 convolution of what the first ReLU gave. The map is halved at the beginning
    of every stage but the first.

    Attributes:
        stages: Names of what the stages are, in order.
    """

    def __init__(
        self,
        channels: int,
        classes: int,
        planes: Sequence[int],
        blocks: Sequence[int],
        *,
        bottleneck: bool,
        last_norm: bool,
    ) -> None:
        """Build the net; weights start as in He et al. by fan-out.

        Args:
            channels: Of the pictures.
            classes: Number of logits.
            planes: Of each stage.
            blocks: Of each stage.
            bottleneck: Blocks of 1x1, 3x3 and 1x1 convolutions with four times the planes behind
                them, in place of two 3x3.
            last_norm: Whether norm and ReLU come before the average.
        """
        super().__init__()
        wide = EXPANSION if bottleneck else 1
        self.stem = convolution(channels, planes[0])
        self.stages = tuple(f"stage{number}" for number in range(1, len(planes) + 1))
        trunk = planes[0]
        for number, (name, count) in enumerate(zip(self.stages, blocks, strict=True)):
            stage: list[nn.Module] = []
            for place in range(count):
                stride = 2 if number > 0 and place == 0 else 1
                stage.append(_Block(trunk, planes[number], planes[number] * wide, stride))
                trunk = planes[number] * wide
            self.add_module(name, nn.Sequential(*stage))
        self.head = nn.Sequential(nn.BatchNorm2d(trunk), nn.ReLU()) if last_norm else nn.Identity()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(trunk, classes)
        draw_fan_out(self)

    def forward(self, pictures: Tensor) -> Tensor:
        """Return logits ``(pictures, classes)``."""
        x = self.stem(pictures)
        for name in self.stages:
            x = getattr(self, name)(x)
        return self.fc(self.pool(self.head(x)).flatten(1))


class _Block(nn.Module):
    def __init__(self, trunk: int, planes: int, out: int, stride: int) -> None:
        super().__init__()
        if planes == out:
            layers = [convolution(trunk, planes, 3, stride), convolution(planes, out)]
        else:
            layers = [
                convolution(trunk, planes, 1),
                convolution(planes, planes, 3, stride),
                convolution(planes, out, 1),
            ]
        self.first = nn.Sequential(nn.BatchNorm2d(trunk), nn.ReLU())
        branch: list[nn.Module] = [layers[0]]
        for layer in layers[1:]:
            branch += [nn.BatchNorm2d(layer.in_channels), nn.ReLU(), layer]
        self.branch = nn.Sequential(*branch)
        changes = stride > 1 or trunk != out
        self.shortcut = convolution(trunk, out, 1, stride) if changes else None

    def forward(self, trunk: Tensor) -> Tensor:
        x = self.first(trunk)
        if self.shortcut is not None:
            trunk = self.shortcut(x)
        return trunk + self.branch(x)


def wide_residual_20(channels: int, classes: int, width: float) -> PreActivationNet:
    """Build the wide net of EquiNorm: 9.7 million parameters for ten classes.

    Twenty convolution-like layers (a 3x3 stem, three stages of three blocks of two, and the linear
    layer) and 96 planes after the first; of the forms that fit this description of Defazio and
    Bottou, arXiv 1812.04549, section 6.1, it is the one that has 9.7 million parameters.
    """
    planes = [narrowed(count, width) for count in (96, 192, 384)]
    return PreActivationNet(channels, classes, planes, (3, 3, 3), bottleneck=False, last_norm=True)


def preactivation_resnet152(channels: int, classes: int, width: float) -> PreActivationNet:
    """Build the pre-activation ResNet-152 of EquiNorm, 58.1 million parameters for ten classes.

    As in the code that the paper starts from (Verma et al., arXiv 1806.05236) neither norm nor ReLU
    comes before the average.
    """
    planes = [narrowed(count, width) for count in (64, 128, 256, 512)]
    return PreActivationNet(
        channels, classes, planes, (3, 8, 36, 3), bottleneck=True, last_norm=False
    )
