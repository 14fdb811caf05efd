"""VGG16 with BatchNorm: for small pictures with one linear layer, and torchvision's."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torchvision.models import vgg

from filterwise.lab.architectures.planes import convolution, draw_fan_out, narrowed

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["SmallVGG", "vgg16"]

STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
HIDDEN = 4096
MAP = 7


class SmallVGG(nn.Module):
    """Thirteen 3x3 convolutions in five stages, each ended by max pooling; average; one linear.

    Simonyan and Zisserman, arXiv 1409.1556, configuration D, without the hidden linear layers.

    Attributes:
        stages: Names of what the stages are, in order.
    """

    stages = tuple(f"stage{number}" for number in range(1, 6))

    def __init__(self, channels: int, classes: int, width: float) -> None:
        """Build the net; weights start as in He et al. by fan-out."""
        super().__init__()
        for name, planes in zip(self.stages, STAGES, strict=True):
            layers: list[nn.Module] = []
            for count in planes:
                count = narrowed(count, width)
                layers += [convolution(channels, count), nn.BatchNorm2d(count), nn.ReLU()]
                channels = count
            self.add_module(name, nn.Sequential(*layers, nn.MaxPool2d(2)))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, classes)
        draw_fan_out(self)

    def forward(self, pictures: Tensor) -> Tensor:
        """Return logits ``(pictures, classes)``."""
        x = pictures
        for name in self.stages:
            x = getattr(self, name)(x)
        return self.fc(self.pool(x).flatten(1))


def vgg16(channels: int, classes: int, width: float, *, norms: bool) -> vgg.VGG:
    """Build torchvision's VGG16, under its parameter names, with a share of its planes."""
    plan: list[str | int] = []
    for stage in STAGES:
        plan += [*(narrowed(count, width) for count in stage), "M"]
    with torch.device("meta"):
        # Its hidden layers have 120 million weights, which are replaced.
        net = vgg.VGG(nn.Sequential(), init_weights=False)
    net.features = vgg.make_layers(plan, batch_norm=norms)
    planes, hidden = narrowed(STAGES[-1][-1], width), narrowed(HIDDEN, width)
    net.features[0] = nn.Conv2d(channels, narrowed(STAGES[0][0], width), 3, padding=1)
    net.classifier = nn.Sequential(
        nn.Linear(planes * MAP * MAP, hidden),
        nn.ReLU(True),
        nn.Dropout(),
        nn.Linear(hidden, hidden),
        nn.ReLU(True),
        nn.Dropout(),
        nn.Linear(hidden, classes),
    )
    draw_fan_out(net)
    for module in net.classifier:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, 0, 0.01)
            nn.init.zeros_(module.bias)
    return net
