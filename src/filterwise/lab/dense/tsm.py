"""Temporal Shift Module on a residual network (Lin et al., arXiv 1811.08383)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from filterwise.lab.dense.backbones import residual_network

__all__ = ["ClipNetwork", "TemporalShift", "clip_network"]


class TemporalShift(nn.Module):
    """Moves a share of the channels by one frame: some back in time, as many forward.

    ``y[t, c] = x[t + 1, c]`` for the first ``channels // share`` channels, ``x[t - 1, c]`` for as
    many after them, ``x[t, c]`` for the rest; zero where there is no such frame.
    """

    def __init__(self, frames: int, share: int = 8) -> None:
        """Take frames a clip, and the part of the channels that goes each way."""
        super().__init__()
        self.frames, self.share = frames, share

    def forward(self, values: Tensor) -> Tensor:
        """Return the shifted ``(clips * frames, channels, height, width)``."""
        clips = values.unflatten(0, (-1, self.frames))
        moved = values.shape[1] // self.share
        back, ahead, rest = clips.split([moved, moved, values.shape[1] - 2 * moved], dim=2)
        none = torch.zeros_like(back[:, :1])
        back = torch.cat([back[:, 1:], none], dim=1)
        ahead = torch.cat([none, ahead[:, :-1]], dim=1)
        return torch.cat([back, ahead, rest], dim=2).flatten(0, 1)

    def extra_repr(self) -> str:
        """Return frames and share."""
        return f"frames={self.frames}, share={self.share}"


class ClipNetwork(nn.Module):
    """A residual network of frames, shifted in each branch; the frames' logits are averaged."""

    def __init__(self, body: ResNet, classes: int, frames: int, dropout: float) -> None:
        """Take a residual network, whose classifier is replaced."""
        super().__init__()
        self.frames = frames
        self.body: Any = body
        self.body.fc = nn.Sequential(nn.Dropout(dropout), nn.Linear(body.fc.in_features, classes))
        for block in body.modules():
            if isinstance(block, BasicBlock | Bottleneck):
                # In the branch, before its first convolution; weights keep their names.
                block.register_module("shift", TemporalShift(frames))
                block.conv1.register_forward_pre_hook(_Shifting(block.shift))  # type: ignore[arg-type]

    def forward(self, clips: Tensor) -> Tensor:
        """Return logits ``(clips, classes)`` of ``(clips, frames, 3, height, width)``."""
        return self.body(clips.flatten(0, 1)).unflatten(0, (-1, self.frames)).mean(1)


class _Shifting:
    """The hook that shows a convolution what its block's shift makes of its input."""

    def __init__(self, shift: TemporalShift) -> None:
        self.shift = shift

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        del module
        return (self.shift(inputs[0]), *inputs[1:])


def clip_network(backbone: str, classes: int, frames: int, dropout: float = 0.5) -> ClipNetwork:
    """Build a network with random weights.

    Args:
        backbone: A name of `filterwise.lab.dense.backbones.BACKBONES`.
        classes: Number of logits.
        frames: Of a clip.
        dropout: Before the classifier.
    """
    return ClipNetwork(residual_network(backbone), classes, frames, dropout)
