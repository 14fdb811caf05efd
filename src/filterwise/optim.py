"""Parameter groups by role: what weight decay should leave alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from filterwise.filters import check_module, weight_name
from filterwise.host import is_converted, state_of
from filterwise.norms import is_norm

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["param_groups"]


def param_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return two groups for any torch optimizer: decayed parameters, and those that are not.

    Not decayed: gains and offsets (of converted layers by their role, of other libraries' layers by
    holding one number per filter, whatever their shape), biases, parameters of activation norms and
    ``LayerNorm``, and all with fewer than two dimensions. Every parameter is in exactly one group,
    frozen ones too.

    Args:
        model: Any model, converted or not.
        weight_decay: Of the first group; the second has 0.

    Raises:
        ValueError: If the decay is negative.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
        >>> [len(group["params"]) for group in param_groups(model, 5e-4)]
        [1, 3]
    """
    check_module(model)
    if not weight_decay >= 0:
        raise ValueError(f"weight_decay must be >= 0, got {weight_decay!r}")
    decayed: dict[int, Tensor] = {}
    free: dict[int, Tensor] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            group = decayed if _is_decayed(module, name, parameter) else free
            if id(parameter) not in decayed and id(parameter) not in free:
                group[id(parameter)] = parameter
    return [
        {"params": list(decayed.values()), "weight_decay": weight_decay},
        {"params": list(free.values()), "weight_decay": 0.0},
    ]


def _is_decayed(module: nn.Module, name: str, parameter: Tensor) -> bool:
    if parameter.dim() < 2 or is_norm(module) or isinstance(module, nn.LayerNorm | nn.RMSNorm):
        return False
    if is_converted(module):
        return name == state_of(module).parameter or parameter.numel() > parameter.shape[0]
    if weight_name(module) == name:
        return True
    # A gain of another library, (filters, 1, 1, 1), would be decayed by the usual rule on dims.
    return parameter.numel() > parameter.shape[0]
