"""The networks that are timed, built with BatchNorm and fixed first weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

__all__ = ["NETS", "Net", "SmallNet"]


class SmallNet(nn.Module):
    """Many small layers in a row: 3x3 convolutions of as many channels, each with norm and ReLU.

    What is paid per layer, rather than per weight, shows here.
    """

    def __init__(self, layers: int = 50, channels: int = 16, classes: int = 10) -> None:
        """Build the net; pictures have `channels` channels."""
        super().__init__()
        blocks: list[nn.Module] = []
        for _ in range(layers):
            convolution = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
            nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")
            blocks += [convolution, nn.BatchNorm2d(channels), nn.ReLU()]
        self.features = nn.Sequential(*blocks)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(channels, classes)

    def forward(self, pictures: Tensor) -> Tensor:
        """Return logits ``(pictures, classes)``."""
        return self.classifier(self.pool(self.features(pictures)).flatten(1))


class _Segmentation(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pictures: Tensor) -> Tensor:
        return self.model(pictures)["out"]


@dataclass(frozen=True)
class Net:
    """A network of the benchmarks.

    Attributes:
        name: As it is asked for.
        title: As it is described in tables.
        make: Builds it, with BatchNorm, drawing from torch's global generator.
        channels: Channels of its pictures.
        size: Height and width of its pictures.
        classes: Number of classes.
        dense: Whether every pixel has a label.
    """

    name: str
    title: str
    make: Callable[[], nn.Module]
    channels: int = 3
    size: int = 224
    classes: int = 1000
    dense: bool = False

    def build(self) -> nn.Module:
        """Return the network, always with the same first weights, in training mode."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return self.make().train()

    def data(self, batch: int, size: int | None, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return one micro-batch of pictures and its labels, always the same."""
        size = size or self.size
        generator = torch.Generator().manual_seed(1)
        pictures = torch.randn(batch, self.channels, size, size, generator=generator)
        shape = (batch, size, size) if self.dense else (batch,)
        labels = torch.randint(self.classes, shape, generator=generator)
        return pictures.to(device), labels.to(device)


def _resnet50() -> nn.Module:
    from torchvision.models import resnet50

    return resnet50(weights=None)


def _deeplabv3() -> nn.Module:
    from torchvision.models.segmentation import deeplabv3_resnet50

    return _Segmentation(deeplabv3_resnet50(weights=None, weights_backbone=None, num_classes=21))


NETS = {
    net.name: net
    for net in (
        Net("resnet50", "ResNet-50", _resnet50),
        Net("small", "50 layers of 16 channels", SmallNet, channels=16, size=8, classes=10),
        Net("deeplabv3", "DeepLabv3 (ResNet-50)", _deeplabv3, classes=21, dense=True),
        Net("toy", "6 layers of 16 channels", lambda: SmallNet(6), channels=16, size=8, classes=10),
    )
}
"""Networks by name."""
