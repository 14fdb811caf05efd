"""Which architectures there are, how they are grouped in families, and how large they are."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from torch import nn

__all__ = [
    "SAMPLE",
    "Architecture",
    "all_architectures",
    "build",
    "count_parameters",
    "representatives",
    "sample",
]

SAMPLE = (
    "timm/test_resnet",
    "timm/test_efficientnet",
    "timm/test_vit",
    "timm/test_convnext2",
    "timm/test_maxvit",
    "timm/test_nfnet",
    "timm/tf_mobilenetv3_small_minimal_100",
    "timm/repghostnet_050",
    "torchvision/shufflenet_v2_x0_5",
    "torchvision/quantized_mobilenet_v2",
    "torchvision/lraspp_mobilenet_v3_large",
    "torchvision/ssdlite320_mobilenet_v3_large",
)
"""What the tests examine: small models, of every kind of trouble one."""

KINDS = {
    "detection": "detection",
    "optical_flow": "optical flow",
    "quantization": "quantizable",
    "segmentation": "segmentation",
    "video": "video",
}
"""Kind of a model by the package of torchvision that holds it; classification otherwise."""


@dataclass(frozen=True)
class Architecture:
    """A model that a library builds by name.

    Attributes:
        library: ``timm`` or ``torchvision``.
        name: The library's name for it.
        family: Module that builds it and, in timm, the first word of its name: what is alike.
        kind: ``classification``, ``detection``, ``segmentation``, ``video``, ``quantizable`` (as
            floating-point model) or ``optical flow``.
    """

    library: str
    name: str
    family: str
    kind: str

    def __str__(self) -> str:
        """Return library and name."""
        return f"{self.library}/{self.name}"


def all_architectures() -> list[Architecture]:
    """Return every architecture of timm and torchvision, by library and name."""
    import timm
    from timm.models import _registry
    from torchvision import models

    homes: Mapping[str, str] = _registry._model_to_module
    found = [
        Architecture("timm", name, _timm_family(name, homes[name]), "classification")
        for name in timm.list_models()
    ]
    for name in models.list_models():
        words = models.get_model_builder(name).__module__.split(".")[2:]
        kind = KINDS.get(words[0], "classification")
        found.append(Architecture("torchvision", name, ".".join(words), kind))
    return sorted(found, key=str)


def _timm_family(name: str, home: str) -> str:
    word = re.match(r"[a-z]+", name.removeprefix("test_"))
    return f"{home}: {word[0]}" if word and word[0] != home else home


def sample(architectures: Iterable[Architecture]) -> list[Architecture]:
    """Return those of `SAMPLE`, in its order."""
    known = {str(one): one for one in architectures}
    return [known[name] for name in SAMPLE if name in known]


def representatives(
    architectures: Iterable[Architecture], parameters: Mapping[str, int]
) -> list[Architecture]:
    """Return the smallest architecture of each family, smaller ones first.

    The further families of a module come after the first of every module. timm's own test models
    stand for a family only where it has no other.

    Args:
        architectures: All of them.
        parameters: How many each has; those that are not in it are left out.
    """
    smallest: dict[tuple[str, str], Architecture] = {}
    for one in sorted(architectures, key=lambda one: _size(one, parameters)):
        if str(one) in parameters:
            smallest.setdefault((one.library, one.family), one)
    ranks: Counter[tuple[str, str]] = Counter()
    order = {}
    for one in smallest.values():
        home = (one.library, one.family.partition(":")[0])
        order[one] = (ranks[home], parameters[str(one)], str(one))
        ranks[home] += 1
    return sorted(order, key=lambda one: order[one])


def _size(one: Architecture, parameters: Mapping[str, int]) -> tuple[bool, int, str]:
    return one.name.startswith("test_"), parameters.get(str(one), 0), one.name


def build(one: Architecture, options: Mapping[str, Any] | None = None) -> nn.Module:
    """Build an architecture with random weights, in training mode.

    Args:
        one: Which.
        options: What its builder is given beside.
    """
    given: dict[str, Any] = dict(options or {})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if one.library == "timm":
            import timm

            return timm.create_model(one.name, pretrained=False, **given).train()
        import inspect

        from torchvision import models

        builder = models.get_model_builder(one.name)
        takes: Sequence[str] = list(inspect.signature(builder).parameters)
        given["weights"] = None
        if "weights_backbone" in takes:
            given["weights_backbone"] = None
        if one.family.rpartition(".")[2] in ("googlenet", "inception"):
            given["init_weights"] = True  # silences a warning of torchvision
        if one.family == "video.mvit":
            return _mvit(builder, given).train()
        return builder(**given).train()


def _mvit(builder: Callable[..., nn.Module], given: dict[str, Any]) -> nn.Module:
    """Build an MViT for clips of another size, which its builders write out and do not take."""
    from torchvision.models.video import mvit

    sizes = {word: given.pop(word) for word in ("spatial_size", "temporal_size") if word in given}
    made = mvit._mvit
    with mock.patch.object(mvit, "_mvit", lambda **words: made(**{**words, **sizes})):
        return builder(**given)


def count_parameters(one: Architecture) -> int:
    """Return the number of parameters, without making any where the architecture allows."""
    try:
        with torch.device("meta"):
            model = build(one)
    except Exception:  # it computes something from its own weights
        model = build(one)
    return sum(parameter.numel() for parameter in model.parameters())
