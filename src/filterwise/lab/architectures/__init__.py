"""The lab's own architectures: what no library has as the papers mean it.

::

    small           the two nets that are compared, the plain one also with more layers
    residual        torchvision's ResNets for pictures of 32 pixels
    vgg             VGG16, likewise
    fixup           ResNets without norms
    preactivation   the wide net of EquiNorm, and its ResNet-152
    convpool        plain nets
    pws             the residual nets of PWS
    signal          the net of WeightAlign's figure 2

Each is written with BatchNorm, unless it has no norms by nature, and is converted by a recipe.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

__all__ = ["ARCHITECTURES", "NARROWED", "Architecture"]


@dataclass(frozen=True)
class Architecture:
    """How a net is built; its module is imported when that is done.

    Attributes:
        module: In this package.
        function: Takes channels, classes and width.
        options: What else it is given.
    """

    module: str
    function: str
    options: dict[str, Any] = field(default_factory=dict)

    def __call__(self, channels: int, classes: int, width: float = 1.0) -> nn.Module:
        """Build the net with first weights from torch's global generator.

        Args:
            channels: Of the pictures.
            classes: Number of logits.
            width: Share of the planes; multiples of 8 are left, of 16 in ResNets.
        """
        found = import_module(f"{__name__}.{self.module}")
        return getattr(found, self.function)(channels, classes, width, **self.options)


def _residual(depth: int, **options: Any) -> Architecture:
    return Architecture("residual", "residual_net", {"depth": depth, **options})


DEPTHS = (18, 34, 50, 101, 152)
PLAIN = (12, 18, 24, 30)

ARCHITECTURES: dict[str, Callable[..., nn.Module]] = {
    "plain": Architecture("small", "PlainNet"),
    **{f"plain{depth}": Architecture("small", "PlainNet", {"depth": depth}) for depth in PLAIN},
    "residual": Architecture("small", "ResidualNet"),
    **{f"resnet{depth}_cifar": _residual(depth) for depth in DEPTHS},
    "resnext50_32x4d_cifar": _residual(50, groups=32),
    "resnext101_32x4d_cifar": _residual(101, groups=32),
    "resnext101_32x4d": _residual(101, groups=32, stem="large"),
    "vgg16_cifar": Architecture("vgg", "SmallVGG"),
    **{
        f"fixup_resnet{depth}_cifar": Architecture("fixup", "fixup_resnet", {"depth": depth})
        for depth in DEPTHS
    },
    "fixup_resnet50": Architecture("fixup", "fixup_resnet", {"depth": 50, "large": True}),
    "wide_residual_20": Architecture("preactivation", "wide_residual_20"),
    "preactivation_resnet152": Architecture("preactivation", "preactivation_resnet152"),
    "convpool_cnn_c": Architecture("convpool", "convpool_cnn_c"),
    "pws_plain_cifar": Architecture("convpool", "pws_plain_cifar"),
    "pws_resnet_cifar": Architecture("pws", "PWSCifarNet"),
    "pws_resnet50": Architecture("pws", "PWSResNet50"),
    "wa_signal_8": Architecture("signal", "SignalNet"),
}
"""The lab's own networks by name: each takes channels, classes and width."""

NARROWED: dict[str, Callable[..., nn.Module]] = {
    **{f"resnet{depth}": _residual(depth, stem="large") for depth in DEPTHS},
    "resnext50_32x4d": _residual(50, groups=32, stem="large"),
    "vgg16": Architecture("vgg", "vgg16", {"norms": False}),
    "vgg16_bn": Architecture("vgg", "vgg16", {"norms": True}),
}
"""Networks of torchvision of which a share of the planes can be asked for."""
