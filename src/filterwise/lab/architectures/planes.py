"""Narrower nets: a share of the planes, and first weights that several families draw."""

from __future__ import annotations

from torch import nn

__all__ = ["convolution", "draw_fan_out", "draw_uniform", "narrowed"]


def narrowed(planes: int, width: float, multiple: int = 8) -> int:
    """Return a share of some planes, as a multiple of at least that many; all of them for 1."""
    if width == 1:
        return planes
    return max(multiple, round(planes * width / multiple) * multiple)


def convolution(
    channels: int, planes: int, kernel: int = 3, stride: int = 1, *, bias: bool = False
) -> nn.Conv2d:
    """Return a convolution that keeps the size of a map, but for its stride."""
    return nn.Conv2d(channels, planes, kernel, stride, padding=kernel // 2, bias=bias)


def draw_fan_out(net: nn.Module) -> None:
    """Draw He et al.'s normal weights by fan-out, as torchvision's residual nets do; biases 0."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def draw_uniform(net: nn.Module) -> None:
    """Draw He et al.'s uniform weights by fan-in, as PWS's nets start; biases 0."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_uniform_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
