"""Inputs made up for a model that nobody gave one for and that cannot be traced."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from filterwise.filters import CONVOLUTIONS, weight_name

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

__all__ = ["made_up_inputs"]

SIZES = {1: ((1024,), (16000,)), 2: ((64, 64), (224, 224)), 3: ((8, 64, 64), (16, 224, 224))}
"""Sizes to try, by the spatial dimensions of the first layer."""


def made_up_inputs(model: nn.Module) -> Iterator[tuple[tuple[Any, ...], str]]:
    """Yield arguments that a model may take, and what they are in words, smallest first.

    Only for a model whose first convolution or linear layer is a convolution, which tells the
    channels: a batch of one picture (signal, clip), and a list of one, as detection models take
    them; the same for each argument that has no default. Values are uniform in [0, 1) and the same
    at every call; no random state is moved.
    """
    first: Any = next((module for module in model.modules() if weight_name(module)), None)
    if not isinstance(first, CONVOLUTIONS):
        return
    weight, count = first.weight, _arguments(model)
    generator = torch.Generator("cpu").manual_seed(0)
    for size in _sizes(model, len(first.kernel_size)):
        shape = (first.in_channels, *size)
        x = torch.rand(shape, generator=generator, device="cpu").to(weight.device, weight.dtype)
        words = " x ".join(map(str, shape))
        yield (x[None],) * count, f"one made-up sample of {words}"
        if len(size) == 2:
            yield ([x],) * count, f"a list of one made-up picture of {words}"


def _sizes(model: Any, dimension: int) -> list[tuple[int, ...]]:
    """Return the sizes to try; a model of timm says in its configuration what it was made for."""
    small, *larger = SIZES[dimension]
    said = getattr(model, "pretrained_cfg", None)
    size = said.get("input_size") if isinstance(said, Mapping) else None
    mine = tuple(size[1:]) if isinstance(size, (tuple, list)) else ()
    return list(dict.fromkeys([small, *([mine] if len(mine) == dimension else []), *larger]))


def _arguments(model: nn.Module) -> int:
    """Return how many positional arguments a model's forward takes without a default."""
    return sum(
        parameter.default is parameter.empty
        and parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
        for parameter in inspect.signature(model.forward).parameters.values()
    )
