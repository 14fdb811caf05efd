"""What a converted layer needs for Equilibrium Normalization alone: its input's statistics."""

from __future__ import annotations

import dataclasses
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from filterwise.errors import FilterwiseWarning
from filterwise.filters import CONVOLUTIONS

if TYPE_CHECKING:
    from torch import Tensor

    from filterwise.methods.equinorm import EquilibriumNormalization

__all__ = ["BUFFERS", "batched", "buffers", "effective_weight", "paper_factor", "refusal"]

BUFFERS = ("input_mean", "num_batches_tracked", "geometry_factor")


def refusal(module: nn.Module) -> str | None:
    """Return why the method can have no input statistics for this layer, or None."""
    if isinstance(module, (*CONVOLUTIONS, nn.Linear)):
        return None
    return (
        "is not a convolution or linear layer, and EquiNorm has to see the input its weight meets"
    )


def buffers(module: Any, method: EquilibriumNormalization, weight: Tensor) -> dict[str, Tensor]:
    """Return the buffers of a layer before any batch: means of 1, 0 batches, phi of 1.

    phi is kept for ``geometry="paper"`` alone, where it depends on the size of the input.
    """
    channels = module.in_features if isinstance(module, nn.Linear) else module.in_channels
    dtype = torch.promote_types(weight.dtype, torch.float32)
    made = {
        "input_mean": weight.new_ones(channels, dtype=dtype),
        "num_batches_tracked": weight.new_zeros((), dtype=torch.long),
    }
    if method.geometry == "paper":
        made["geometry_factor"] = weight.new_ones((), dtype=dtype)
    return made


def effective_weight(
    module: Any,
    method: EquilibriumNormalization,
    weight: Tensor,
    gain: Tensor | None,
    x: Tensor | None,
    offset: Tensor | None = None,
) -> Tensor:
    """Return the layer's effective weight: by its batch in training, else by the running mean."""
    paper = method.geometry == "paper"
    if not module.training or x is None:
        _look_once(module, "evaluation", weight, module.input_mean, None)
        factor = module.geometry_factor if paper else 1.0
        mean = module.input_mean
        return method.effective(weight, mean, gain, geometry_factor=factor, offset=offset)
    linear = isinstance(module, nn.Linear)
    if x.numel() == 0:
        return method.effective(weight, module.input_mean, gain, offset=offset)
    x = batched(module, x)
    mean = method.input_mean(x, -1 if linear else 1)
    factor = 1.0 if linear or not paper else paper_factor(module, x)
    with torch.no_grad():
        seen = module.num_batches_tracked
        running = module.input_mean
        rate = method.momentum + (1 - method.momentum) * (seen == 0).to(running.dtype)
        running.lerp_(mean.detach().to(running.dtype), rate)
        seen.add_(1)
        if paper:
            module.geometry_factor.fill_(factor)
    _look_once(module, "training", weight, mean, x)
    return method.effective(weight, mean, gain, geometry_factor=factor, offset=offset)


def batched(module: Any, x: Tensor) -> Tensor:
    """Return a layer's input with the batch axis that a single sample may lack."""
    spatial = 0 if isinstance(module, nn.Linear) else len(module.kernel_size)
    return x.unsqueeze(0) if x.dim() == spatial + 1 else x


def paper_factor(module: Any, x: Tensor) -> float:
    """Return prod(S_out * stride / S_in), the factor that the paper's r amounts to."""
    factor = 1.0
    for axis, size in enumerate(x.shape[2:]):
        reach = module.dilation[axis] * (module.kernel_size[axis] - 1)
        padding = module.padding if isinstance(module.padding, str) else 2 * module.padding[axis]
        padding = {"same": reach, "valid": 0}.get(str(padding), padding)
        out = (size + int(padding) - reach - 1) // module.stride[axis] + 1
        factor *= out * module.stride[axis] / size
    return factor


def _look_once(module: Any, mode: str, weight: Tensor, mean: Tensor, x: Tensor | None) -> None:
    """Warn of statistics that cannot balance the layer: once a layer and mode, since it waits."""
    state: Any = module.__dict__["_filterwise"]
    looked = state.looked
    if mode in looked or mean.is_meta or torch.compiler.is_compiling() or _is_wrapped(mean):
        return
    looked.add(mode)
    method = state.method
    if x is None:
        problems = []
        if int(module.num_batches_tracked) == 0:
            problems = ["has seen no training batch: evaluation takes input means of 1"]
    else:
        alone = dataclasses.replace(method, synchronize=False)
        axis = -1 if isinstance(module, nn.Linear) else 1
        size = alone.input_mean(x.detach().float().square(), axis).sqrt()
        found = method.problems(weight.detach(), mean.detach(), size)
        problems = [what for _, what in found]
    for what in problems:
        # Without a name in it, the same sentence of many layers is shown once.
        name = f" {state.label}" if x is not None else ""
        warnings.warn(f"the EquiNorm layer{name} {what}", FilterwiseWarning, stacklevel=5)


def _is_wrapped(tensor: Tensor) -> bool:
    """Tell a tensor inside torch.func, whose values cannot be read."""
    functorch = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]
    return functorch.is_functorch_wrapped_tensor(tensor)
