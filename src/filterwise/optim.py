"""What optimizers should know: which parameters not to decay, and adaptive gradient clipping."""

from __future__ import annotations

import math
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from filterwise.filters import check_module, layout_of, weight_name
from filterwise.graph import trace
from filterwise.host import is_converted, state_of
from filterwise.keeping import refuse_unfinished
from filterwise.norms import is_norm

if TYPE_CHECKING:
    from torch import Tensor

    from filterwise.filters import FilterLayout

__all__ = ["clip_grad_adaptive_", "param_groups", "unwrapped"]


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


def clip_grad_adaptive_(model: nn.Module, clipping: float = 0.01, eps: float = 1e-3) -> None:
    r"""Clip each filter's gradient by the size of that filter, in place.

    .. math:: G_i \leftarrow \lambda \frac{\|W_i\|^*}{\|G_i\|}\, G_i
        \quad\text{if}\quad \frac{\|G_i\|}{\|W_i\|^*} > \lambda,
        \qquad \|W_i\|^* = \max(\|W_i\|, \epsilon)

    with Frobenius norms. A unit i is a filter of a convolution, transposed convolution or linear
    layer (of the raw weight, in a converted layer), a row of any other parameter, and the whole of
    a parameter that is a vector, whatever its number of dimensions: biases, gains, norm parameters.
    That is the authors' code; timm's clips a gain of shape (O, 1, 1, 1) entry by entry. The
    classifier is left out: every layer behind which no other follows.

    Call it between the backward passes and the optimizer's step, under a `GradScaler` after its
    ``unscale_``. Parameters without a gradient are passed over. Norms are taken in float32 or
    wider; sharded parameters (DTensor) are clipped by their whole filters.

    Args:
        model: Any model, converted or not, wrapped or not.
        clipping: The largest ratio of gradient to weight, :math:`\lambda`.
        eps: The least norm that a unit counts as having, so that units at zero can move.

    Raises:
        ValueError: If an argument is no positive number, or a gradient is sparse.
        DeferralError: If gradients are still gathered in a window of `defer`.

    Source: Brock, De, Smith, Simonyan, *High-Performance Large-Scale Image Recognition Without
    Normalization*, arXiv 2102.06171, Eq. 3.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> model(torch.full((1, 4), 100.0)).sum().backward()
        >>> clip_grad_adaptive_(model)
        >>> ratio = model[0].weight.grad.norm(dim=1) / model[0].weight.norm(dim=1)
        >>> bool((ratio < 0.01001).all())
        True
    """
    check_module(model)
    for name, value in (("clipping", clipping), ("eps", eps)):
        if not (isinstance(value, int | float) and math.isfinite(value) and value > 0):
            raise ValueError(f"{name} must be a number > 0, got {value!r}")
    model = unwrapped(model)
    seen = {id(p) for module in _classifiers(model) for p in module.parameters(recurse=False)}
    layouts: list[tuple[Tensor, FilterLayout | None]] = []
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(prefix=prefix, recurse=False):
            if id(parameter) in seen or parameter.grad is None:
                continue
            seen.add(id(parameter))
            if parameter.grad.layout != torch.strided:
                raise ValueError(
                    f"the gradient of {name} is {parameter.grad.layout}, which has no filters to"
                    " clip by. No gradient has changed."
                )
            layouts.append((parameter, _units(module, name.rpartition(".")[2], parameter)))
    refuse_unfinished({id(parameter) for parameter, _ in layouts}, "adaptive gradient clipping")
    with torch.no_grad():
        for parameter, layout in layouts:
            _clip(parameter, layout, clipping, eps)


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model that DDP, DataParallel or `torch.compile` wraps, or the model itself."""
    while True:
        if isinstance(model, DistributedDataParallel | DataParallel):
            model = model.module
        elif isinstance(inner := model._modules.get("_orig_mod"), nn.Module):
            model = inner
        else:
            return model


_CLASSIFIERS: weakref.WeakKeyDictionary[nn.Module, tuple[list[int], list[Any]]] = (
    weakref.WeakKeyDictionary()
)


def _classifiers(model: nn.Module) -> list[nn.Module]:
    """Find the layers behind which none follows; once a model, since a step must be cheap."""
    layers = [(name, module) for name, module in model.named_modules() if weight_name(module)]
    now = [id(module) for _, module in layers]
    known = _CLASSIFIERS.get(model)
    if known is None or known[0] != now:
        flow = trace(model)
        found = [weakref.ref(module) for name, module in layers if flow.is_last(name)]
        known = _CLASSIFIERS[model] = (now, found)
    return [module for reference in known[1] if (module := reference()) is not None]


def _units(module: nn.Module, name: str, parameter: Tensor) -> FilterLayout | None:
    """Return where the units of a parameter lie; None for one that is a single unit."""
    if is_converted(module):
        state = state_of(module)
        if name == state.parameter:
            return state.layout
    elif weight_name(module) == name:
        return layout_of(module)
    if parameter.numel() == max(parameter.shape, default=1):
        return None
    return layout_of(module, name)


def _clip(parameter: Tensor, layout: FilterLayout | None, clipping: float, eps: float) -> None:
    gradient = parameter.grad
    assert gradient is not None
    wide = torch.promote_types(gradient.dtype, torch.float32)
    weight, axes = parameter.detach(), None
    if layout is not None:
        weight, axes = layout.split(weight)
        gradient, _ = layout.split(gradient)
    keep = axes is not None
    bound = torch.linalg.vector_norm(weight, dim=axes, keepdim=keep, dtype=wide)
    bound = bound.clamp_min(eps) * clipping
    norm = torch.linalg.vector_norm(gradient, dim=axes, keepdim=keep, dtype=wide)
    gradient.mul_(torch.where(norm > bound, bound / norm, 1.0))
