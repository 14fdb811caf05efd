"""The untrained net on which WeightAlign draws what becomes of a signal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from filterwise.lab.architectures.planes import convolution, narrowed

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["SignalNet"]


class SignalNet(nn.Module):
    """Seven 3x3 convolutions of 64 planes, each with norm and ReLU, an average and a linear layer.

    WeightAlign, figures 2, 7 and 8; the paper gives the number of layers, ReLU, He et al.'s start
    and no bias, the rest is chosen. A bias that a removed norm leaves behind starts at 0.
    """

    CONVOLUTIONS = 7
    PLANES = 64

    def __init__(self, channels: int, classes: int, width: float) -> None:
        """Build the net."""
        super().__init__()
        planes = narrowed(self.PLANES, width)
        layers: list[nn.Module] = []
        for _ in range(self.CONVOLUTIONS):
            layers += [convolution(channels, planes), nn.BatchNorm2d(planes), nn.ReLU()]
            channels = planes
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(planes, classes, bias=False)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")

    def forward(self, pictures: Tensor) -> Tensor:
        """Return logits ``(pictures, classes)``."""
        return self.classifier(self.pool(self.features(pictures)).flatten(1))
