"""Residual nets without norms that start by Fixup, whose factors go onto gains if there are any."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from filterwise import host
from filterwise.lab.architectures.planes import convolution, narrowed
from filterwise.lab.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["FixupResNet", "fixup_resnet"]

LAYERS = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}
PLANES = (64, 128, 256, 512)
EXPANSION = 4


class FixupResNet(nn.Module):
    """ResNet with Fixup's scalars in place of norms.

    Zhang et al., arXiv 1901.09321: a bias before each convolution, ReLU and the linear layer, a
    multiplier behind each branch. Of L branches with m convolutions each, a branch's last
    convolution starts at 0 and the others with He et al.'s deviation (fan-out) times
    :math:`L^{-1/(2m-2)}`; the linear layer starts at 0.

    A weight that is normalized does not see its own scale, so `start` puts these factors on the
    gains of a converted net.

    The stem is one 3x3 convolution for pictures of 32 pixels, or ImageNet's 7x7 one with stride 2
    and a max-pooling behind it.

    Attributes:
        stages: Names of what the stages are, in order.
    """

    stages = ("layer1", "layer2", "layer3", "layer4")

    def __init__(
        self, depth: int, channels: int, classes: int, width: float, *, large: bool
    ) -> None:
        """Build the net; its weights are not yet Fixup's."""
        super().__init__()
        trunk = narrowed(PLANES[0], width)
        self.conv1 = convolution(channels, trunk, *((7, 2) if large else (3,)))
        self.bias1 = _scalar(0.0)
        self.maxpool = nn.MaxPool2d(3, 2, padding=1) if large else nn.Identity()
        for number, (name, count) in enumerate(zip(self.stages, LAYERS[depth], strict=True)):
            planes = narrowed(PLANES[number], width)
            blocks: list[nn.Module] = []
            for place in range(count):
                stride = 2 if number > 0 and place == 0 else 1
                out = planes * EXPANSION if depth >= 50 else planes
                blocks.append(_Block(trunk, planes, out, stride))
                trunk = out
            self.add_module(name, nn.Sequential(*blocks))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.bias2 = _scalar(0.0)
        self.fc = nn.Linear(trunk, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.fc.weight)
        nn.init.zeros_(self.fc.bias)

    def forward(self, pictures: Tensor) -> Tensor:
        """Return logits ``(pictures, classes)``."""
        x = self.maxpool(torch.relu(self.conv1(pictures) + self.bias1))
        for name in self.stages:
            x = getattr(self, name)(x)
        return self.fc(self.pool(x).flatten(1) + self.bias2)

    @torch.no_grad()
    def start(self) -> None:
        """Put Fixup's factors onto the gains of the branches, or onto weights that have none.

        Raises:
            UsageError: If a convolution is normalized by a method without a gain.
        """
        branches = [module for module in self.modules() if isinstance(module, _Block)]
        for block in branches:
            factor = len(branches) ** (-1 / (2 * len(block.convs) - 2))
            for place, layer in enumerate(block.convs):
                last = place == len(block.convs) - 1
                self._target(layer).mul_(0.0 if last else factor)

    def _target(self, layer: nn.Module) -> Tensor:
        if not host.is_converted(layer):
            return layer.weight  # type: ignore[return-value]
        gain = host.gain_of(layer)
        if gain is None:
            method = host.state_of(layer).method
            raise UsageError(
                f"a Fixup net cannot start under {method}: a normalized weight does not see its"
                f" own scale, and {method.name} has no gain to put Fixup's factors on. Use a method"
                " with one (wa, wn, pws, ...), or a net with norms."
            )
        return gain


class _Block(nn.Module):
    def __init__(self, trunk: int, planes: int, out: int, stride: int) -> None:
        super().__init__()
        layers = [convolution(trunk, planes, 3, stride), convolution(planes, planes)]
        if out != planes:
            layers = [
                convolution(trunk, planes, 1),
                convolution(planes, planes, 3, stride),
                convolution(planes, out, 1),
            ]
        self.convs = nn.ModuleList(layers)
        self.before = nn.ParameterList([_scalar(0.0) for _ in layers])
        self.behind = nn.ParameterList([_scalar(0.0) for _ in layers])
        self.scale = _scalar(1.0)
        changes = stride > 1 or trunk != out
        self.downsample = convolution(trunk, out, 1, stride) if changes else None

    def forward(self, trunk: Tensor) -> Tensor:
        x = first = trunk + self.before[0]
        for place, layer in enumerate(self.convs):
            if place:
                x = torch.relu(x + self.behind[place - 1]) + self.before[place]
            x = layer(x)
        if self.downsample is not None:
            trunk = self.downsample(first)
        return torch.relu(trunk + x * self.scale + self.behind[-1])


def _scalar(value: float) -> nn.Parameter:
    return nn.Parameter(torch.full((1,), value))


def fixup_resnet(
    channels: int, classes: int, width: float, *, depth: int, large: bool = False
) -> FixupResNet:
    """Build a Fixup ResNet for pictures of 32 pixels, or with ImageNet's large stem."""
    return FixupResNet(depth, channels, classes, width, large=large)
