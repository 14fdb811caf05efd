"""What is shipped: each architecture whole, and a small one of the same blocks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import timm
import torchvision
from timm.layers.hybrid_embed import HybridEmbed
from timm.layers.std_conv import StdConv2d, StdConv2dSame
from timm.models import nfnet
from timm.models.resnetv2 import ResNetV2
from timm.models.vision_transformer import VisionTransformer
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.models.segmentation.deeplabv3 import DeepLabHead, DeepLabV3

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

__all__ = ["ARCHITECTURES", "Architecture"]

CLASSES = 10


@dataclass(frozen=True)
class Architecture:
    """One model to ship.

    Attributes:
        name: Its name in timm or torchvision.
        recipe: What it is converted by; "adopt" where its own library standardizes.
        whole: Makes it as published, with random weights.
        small: Makes one of the same blocks, with a block a stage and few channels.
        size: Side of the pictures that it takes.
        small_size: Side for the small one.
        exclude: What the recipe leaves alone.
    """

    name: str
    recipe: str
    whole: Callable[[], nn.Module]
    small: Callable[[], nn.Module]
    size: int = 224
    small_size: int = 64
    exclude: tuple[str, ...] = ()


def _timm(name: str) -> Callable[[], nn.Module]:
    return partial(timm.create_model, name, num_classes=CLASSES)


def _small_resnet(**options: Any) -> torchvision.models.ResNet:
    return torchvision.models.ResNet(Bottleneck, [1, 1, 1, 1], num_classes=CLASSES, **options)


def _small_norm_free(name: str) -> Callable[[], nn.Module]:
    config = nfnet.model_cfgs[name]
    channels = tuple(width // 4 for width in config.channels)
    groups = {"group_size": 16} if config.group_size else {}
    small = replace(config, depths=(1, 1, 1, 1), channels=channels, num_features=256, **groups)
    return partial(nfnet.NormFreeNet, small, num_classes=CLASSES)


def _small_bit() -> nn.Module:
    return ResNetV2(
        [1, 1, 1, 1],
        channels=(128, 256, 256, 512),
        num_classes=CLASSES,
        stem_type="fixed",
        conv_layer=partial(StdConv2d, eps=1e-8),
    )


def _small_hybrid() -> nn.Module:
    trunk = ResNetV2(
        [1, 1, 1],
        channels=(128, 128, 256),
        num_classes=0,
        global_pool="",
        in_chans=3,
        preact=False,
        stem_type="same",
        conv_layer=partial(StdConv2dSame, eps=1e-8),
    )
    return VisionTransformer(
        img_size=64,
        patch_size=1,
        embed_dim=64,
        depth=2,
        num_heads=2,
        num_classes=CLASSES,
        embed_layer=partial(HybridEmbed, backbone=trunk),
    )


def _deeplab() -> nn.Module:
    return torchvision.models.segmentation.deeplabv3_resnet50(
        weights=None, weights_backbone=None, num_classes=CLASSES
    )


def _small_deeplab() -> nn.Module:
    resnet = torchvision.models.ResNet(
        Bottleneck, [1, 1, 1, 1], replace_stride_with_dilation=[False, True, False]
    )
    trunk = IntermediateLayerGetter(resnet, {"layer3": "out"})
    return DeepLabV3(trunk, DeepLabHead(1024, CLASSES))


def _detector_backbone() -> nn.Module:
    model = torchvision.models.detection.fasterrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=CLASSES
    )
    return model.backbone


def _small_detector_backbone() -> nn.Module:
    resnet = _small_resnet()
    levels = {f"layer{stage}": str(stage - 1) for stage in range(1, 5)}
    return BackboneWithFPN(resnet, levels, [256, 512, 1024, 2048], 64)


ARCHITECTURES = {
    one.name: one
    for one in (
        Architecture(
            "resnet50",
            "gn+ws",
            partial(torchvision.models.resnet50, num_classes=CLASSES),
            _small_resnet,
        ),
        Architecture(
            "resnext50_32x4d",
            "bn+wa",
            partial(torchvision.models.resnext50_32x4d, num_classes=CLASSES),
            partial(_small_resnet, groups=32, width_per_group=4),
        ),
        Architecture("deeplabv3_resnet50", "bn+ws", _deeplab, _small_deeplab),
        Architecture(
            "fasterrcnn_resnet50_fpn backbone",
            "gn+ws",
            _detector_backbone,
            _small_detector_backbone,
            320,
            exclude=("*fpn.*",),  # nothing normalizes there
        ),
        Architecture(
            "resnet18 with EquiNorm",
            "equinorm",
            partial(torchvision.models.resnet18, num_classes=CLASSES),
            partial(torchvision.models.ResNet, BasicBlock, [1, 1, 1, 1], num_classes=CLASSES),
        ),
        Architecture("resnetv2_50x1_bit", "adopt", _timm("resnetv2_50x1_bit"), _small_bit),
        Architecture("nf_resnet50", "adopt", _timm("nf_resnet50"), _small_norm_free("nf_resnet50")),
        Architecture(
            "dm_nfnet_f0", "adopt", _timm("dm_nfnet_f0"), _small_norm_free("dm_nfnet_f0"), 192
        ),
        Architecture(
            "eca_nfnet_l0", "adopt", _timm("eca_nfnet_l0"), _small_norm_free("eca_nfnet_l0")
        ),
        Architecture("vit_base_r50_s16_224", "adopt", _timm("vit_base_r50_s16_224"), _small_hybrid),
    )
}
