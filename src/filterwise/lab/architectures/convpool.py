"""Plain nets of 3x3 and 1x1 convolutions: ConvPool-CNN-C, and what PWS made of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from filterwise.lab.architectures.planes import (
    convolution,
    draw_fan_out,
    draw_uniform,
    narrowed,
)

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["ConvPool", "convpool_cnn_c", "pws_plain_cifar"]


class ConvPool(nn.Module):
    """Stages of 3, 3 and 2 convolutions, each with norm and ReLU, and max pooling between them.

    The third stage is a 3x3 convolution without padding and a 1x1 convolution.

    Attributes:
        stages: Names of what the stages are, in order.
    """

    stages = ("stage1", "stage2", "stage3")

    def __init__(self, channels: int, width: float, pool: nn.MaxPool2d) -> None:
        """Build the stages; `head` is what a net makes of the last map."""
        super().__init__()
        narrow, wide = narrowed(96, width), narrowed(192, width)
        self.stage1 = nn.Sequential(
            *_block(convolution(channels, narrow)),
            *_block(convolution(narrow, narrow)),
            *_block(convolution(narrow, narrow)),
        )
        self.stage2 = nn.Sequential(
            *_block(convolution(narrow, wide)),
            *_block(convolution(wide, wide)),
            *_block(convolution(wide, wide)),
        )
        self.planes = wide
        self.stage3 = nn.Sequential(
            *_block(nn.Conv2d(wide, wide, 3, bias=False)),
            *_block(convolution(wide, wide, 1)),
        )
        self.pool = pool
        self.head: nn.Module = nn.Identity()

    def forward(self, pictures: Tensor) -> Tensor:
        """Return logits ``(pictures, classes)``."""
        x = self.pool(self.stage1(pictures))
        x = self.stage3(self.pool(self.stage2(x)))
        return self.head(x).flatten(1)


def _block(layer: nn.Conv2d) -> list[nn.Module]:
    return [layer, nn.BatchNorm2d(layer.out_channels), nn.ReLU()]


def convpool_cnn_c(channels: int, classes: int, width: float) -> ConvPool:
    """Build ConvPool-CNN-C (Springenberg et al., arXiv 1412.6806, table 2), without its dropout.

    Logits are made at every place by a 1x1 convolution and averaged. The ReLU that the table has
    behind them is left out: a class could not be called less likely than nothing.
    """
    net = ConvPool(channels, width, nn.MaxPool2d(3, stride=2, padding=1))
    net.head = nn.Sequential(
        convolution(net.planes, classes, 1, bias=True), nn.AdaptiveAvgPool2d(1)
    )
    draw_fan_out(net)
    return net


def pws_plain_cifar(channels: int, classes: int, width: float) -> ConvPool:
    """Build the plain net of PWS on CIFAR-10 (its table 4), as its authors' code has it.

    Against ConvPool-CNN-C: max pooling over 2x2, one more 1x1 convolution of all planes, and the
    average before the layer that makes the logits. Weights are He et al.'s uniform ones, fan-in.
    """
    net = ConvPool(channels, width, nn.MaxPool2d(2))
    net.stage3.extend(_block(convolution(net.planes, net.planes, 1)))
    net.head = nn.Sequential(
        nn.AdaptiveAvgPool2d(1), convolution(net.planes, classes, 1, bias=True)
    )
    draw_uniform(net)
    return net
