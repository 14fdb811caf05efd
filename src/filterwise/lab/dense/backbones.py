"""Residual networks that dense tasks stand on."""

from __future__ import annotations

from difflib import get_close_matches
from typing import TYPE_CHECKING, NamedTuple

from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from filterwise.lab.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import nn

__all__ = ["BACKBONES", "residual_network"]


class _Form(NamedTuple):
    block: type[BasicBlock | Bottleneck]
    layers: tuple[int, ...]
    groups: int = 1
    width: int = 64


BACKBONES = {
    "resnet10": _Form(BasicBlock, (1, 1, 1, 1)),
    "resnet14": _Form(Bottleneck, (1, 1, 1, 1)),
    "resnet18": _Form(BasicBlock, (2, 2, 2, 2)),
    "resnet50": _Form(Bottleneck, (3, 4, 6, 3)),
    "resnet101": _Form(Bottleneck, (3, 4, 23, 3)),
    "resnext50_32x4d": _Form(Bottleneck, (3, 4, 6, 3), 32, 4),
    "resnext101_32x4d": _Form(Bottleneck, (3, 4, 23, 3), 32, 4),
}
"""Torchvision's residual network in these depths and widths; the smallest are for two cores."""


def residual_network(
    name: str,
    *,
    dilated: Sequence[bool] = (False, False, False),
    norm: Callable[..., nn.Module] | None = None,
) -> ResNet:
    """Build a residual network with random weights.

    Args:
        name: One of `BACKBONES`.
        dilated: For the last three stages: dilation in place of stride. Bottlenecks only.
        norm: Class of the norms; None is batch normalization.

    Raises:
        UsageError: If there is none of this name.
    """
    if name not in BACKBONES:
        nearest = get_close_matches(name, BACKBONES, n=1)
        hint = f"Nearest: {nearest[0]}." if nearest else f"There are {', '.join(BACKBONES)}."
        raise UsageError(f"model.name: there is no backbone {name!r}. {hint}")
    form = BACKBONES[name]
    if any(dilated) and form.block is BasicBlock:
        deeper = [each for each, other in BACKBONES.items() if other.block is Bottleneck]
        raise UsageError(
            f"model.name: {name} has no dilated form; take one of {', '.join(deeper)}."
        )
    return ResNet(
        form.block,
        list(form.layers),
        groups=form.groups,
        width_per_group=form.width,
        replace_stride_with_dilation=list(dilated),
        norm_layer=norm,
    )
