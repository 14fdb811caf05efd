"""The residual nets of PWS: one for pictures of 32 pixels, and a ResNet-50 with two layer norms."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import nn

from filterwise.lab.architectures.planes import convolution, draw_uniform, narrowed

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["PWSCifarNet", "PWSResNet50"]

EXPANSION = 4


class PWSCifarNet(nn.Module):
    """Fifty-six layers of pre-activation bottlenecks, the residual net of PWS's table 4.

    Three stages of six units of 16, 32 and 64 planes (and four times as many on the trunk) behind
    a 3x3 convolution of 64. A stage halves the map in its last unit, where the trunk is max-pooled;
    where planes change it goes through a 1x1 convolution. Without its norms, the trunk is divided
    by sqrt(2) before each ReLU on it. All this is as in the authors' code. Weights are He et al.'s
    uniform ones, fan-in.

    Attributes:
        stages: Names of what the stages are, in order.
    """

    stages = ("stage1", "stage2", "stage3")
    PLANES = (16, 32, 64)
    STRIDES = (2, 2, 1)
    UNITS = 6

    def __init__(self, channels: int, classes: int, width: float) -> None:
        """Build the net."""
        super().__init__()
        trunk = narrowed(64, width)
        self.stem = nn.Sequential(convolution(channels, trunk), nn.BatchNorm2d(trunk), nn.ReLU())
        for name, planes, stride in zip(self.stages, self.PLANES, self.STRIDES, strict=True):
            planes = narrowed(planes, width)
            units: list[nn.Module] = []
            for place in range(self.UNITS):
                last = place == self.UNITS - 1
                units.append(_Unit(trunk, planes, stride if last else 1))
                trunk = planes * EXPANSION
            self.add_module(name, nn.Sequential(*units))
        self.last = _Preactivation(trunk)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = convolution(trunk, classes, 1, bias=True)
        draw_uniform(self)

    def forward(self, pictures: Tensor) -> Tensor:
        """Return logits ``(pictures, classes)``."""
        x = self.stem(pictures)
        for name in self.stages:
            x = getattr(self, name)(x)
        return self.classifier(self.pool(self.last(x))).flatten(1)


class _Preactivation(nn.Module):
    """Norm and ReLU; once the norm is taken out, division by sqrt(2) and ReLU."""

    def __init__(self, trunk: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(trunk)

    def forward(self, trunk: Tensor) -> Tensor:
        if isinstance(self.norm, nn.Identity):
            return torch.relu(trunk / math.sqrt(2))
        return torch.relu(self.norm(trunk))


class _Unit(nn.Module):
    def __init__(self, trunk: int, planes: int, stride: int) -> None:
        super().__init__()
        out = planes * EXPANSION
        self.first = _Preactivation(trunk)
        self.branch = nn.Sequential(
            convolution(trunk, planes, 1),
            nn.BatchNorm2d(planes),
            nn.ReLU(),
            convolution(planes, planes, 3, stride),
            nn.BatchNorm2d(planes),
            nn.ReLU(),
            convolution(planes, out, 1, bias=True),
        )
        self.shortcut = convolution(trunk, out, 1, bias=True) if trunk != out else None
        self.pool = nn.MaxPool2d(stride) if stride > 1 else None

    def forward(self, trunk: Tensor) -> Tensor:
        x = self.first(trunk)
        if self.shortcut is not None:
            trunk = self.shortcut(x)
        if self.pool is not None:
            trunk = self.pool(trunk)
        return trunk + self.branch(x)


class PWSResNet50(nn.Module):
    """ResNet-50 without norms but for two of one group, behind the stem and behind the last stage.

    A block begins with ReLU and nothing comes after its sum, so that nothing but additions lies on
    the trunk (PWS, table 5, as in the authors' code). Convolutions have biases. No recipe touches
    the two norms. Weights start as in He et al. by fan-in.

    Attributes:
        stages: Names of what the stages are, in order.
        own_norms: Names of the norms that belong to the net, whatever it is converted by.
    """

    stages = ("layer1", "layer2", "layer3", "layer4")
    own_norms = ("norm1", "norm2")
    PLANES = (64, 128, 256, 512)
    BLOCKS = (3, 4, 6, 3)

    def __init__(self, channels: int, classes: int, width: float) -> None:
        """Build the net."""
        super().__init__()
        trunk = narrowed(self.PLANES[0], width)
        self.conv1 = nn.Conv2d(channels, trunk, 7, stride=2, padding=3)
        self.norm1 = nn.GroupNorm(1, trunk)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        for number, (name, count) in enumerate(zip(self.stages, self.BLOCKS, strict=True)):
            planes = narrowed(self.PLANES[number], width)
            blocks: list[nn.Module] = []
            for place in range(count):
                blocks.append(_Block(trunk, planes, 2 if number > 0 and place == 0 else 1))
                trunk = planes * EXPANSION
            self.add_module(name, nn.Sequential(*blocks))
        self.norm2 = nn.GroupNorm(1, trunk)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(trunk, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]

    def forward(self, pictures: Tensor) -> Tensor:
        """Return logits ``(pictures, classes)``."""
        x = self.maxpool(torch.relu(self.norm1(self.conv1(pictures))))
        for name in self.stages:
            x = getattr(self, name)(x)
        return self.fc(self.avgpool(torch.relu(self.norm2(x))).flatten(1))


class _Block(nn.Module):
    def __init__(self, trunk: int, planes: int, stride: int) -> None:
        super().__init__()
        out = planes * EXPANSION
        self.branch = nn.Sequential(
            convolution(trunk, planes, 1, bias=True),
            nn.ReLU(),
            convolution(planes, planes, 3, stride, bias=True),
            nn.ReLU(),
            convolution(planes, out, 1, bias=True),
        )
        changes = stride > 1 or trunk != out
        self.downsample = convolution(trunk, out, 1, stride, bias=True) if changes else None

    def forward(self, trunk: Tensor) -> Tensor:
        x = torch.relu(trunk)
        if self.downsample is not None:
            trunk = self.downsample(x)
        return trunk + self.branch(x)
