"""Activation norms: which modules are norms, and what replaces one.

A norm is recognised by torch's classes, or by its structure where a library brings its own: other
libraries are never imported. A class that fuses norm, dropout and activation becomes its own
library's counterpart, taken from the module it came from, so that its checkpoint keys stay.
"""

from __future__ import annotations

import copy
import re
import sys
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.parameter import is_lazy

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["STATISTICS", "channels", "is_norm", "normalize", "normalizes", "replacement"]

GROUPS = 32
BATCH_NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
STATISTICS = ("running_mean", "running_var")
AFFINE = ("weight", "bias")
NORM_CLASS = re.compile(r"(Batch|Layer|Group|Instance|Rms|RMS|Evo|FilterResponse|Simple)Norm")
PICTURE = re.compile(r"[123]d")
HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)


def is_norm(module: nn.Module) -> bool:
    """Tell whether a module is an activation norm, which recipes replace or remove.

    These are batch norms (synchronized and frozen too), group and instance norms, layer norms over
    the channels of pictures, and classes that fuse one of them with an activation. A plain
    `torch.nn.LayerNorm` is none: it normalizes the last axis, in attention blocks mostly.
    """
    if isinstance(module, (_NormBase, nn.GroupNorm)):
        return True
    if isinstance(module, nn.LayerNorm):
        return _is_over_channels(module)
    return _is_frozen(module) or _is_fused_elsewhere(module)


def normalizes(module: nn.Module) -> bool:
    """Tell whether a module fixes the scale of what passes: a norm, or a plain layer norm.

    More than `is_norm`: norms that no recipe touches normalize a layer's output all the same.
    """
    if is_norm(module) or isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        return True
    named = any(NORM_CLASS.search(cls.__name__) for cls in type(module).__mro__)
    return named and all(p.dim() < 2 for p in module.parameters() if not is_lazy(p))


def channels(norm: nn.Module) -> int:
    """Return the number of channels that a norm normalizes.

    Raises:
        ValueError: If it is lazy and has seen no input yet.
    """
    return _channels(norm)


def replacement(
    norm: nn.Module,
    wanted: str,
    channels: int | None = None,
    *,
    dimension: int | None = None,
    like: Tensor | None = None,
) -> tuple[nn.Module, str]:
    """Build what takes a norm's place; the norm itself is not changed.

    Device, dtype, mode, hooks, affine parameters (the same objects, so that an optimizer goes on
    with them) and a fused dropout or activation are kept; eps and momentum are torch's own. A norm
    without affine values stays without.

    Args:
        norm: The norm that is there.
        wanted: ``bn``, ``gn`` (32 groups; where the channels do not divide, their largest divisor
            that is at most 32 and leaves two channels a group), ``gn(16)``, ``ln`` (one group),
            ``in`` (a group per channel), ``none`` (removed) or ``keep``.
        channels: Number of channels, where the norm does not know it (a lazy one).
        dimension: Spatial dimensions (1, 2, 3) for ``bn``, where the norm does not tell.
        like: Tensor whose device and dtype new statistics take, where the norm has no tensor.

    Returns:
        The module, and why, in words. The module is `norm` itself where it stays.

    Raises:
        ValueError: If the channels do not divide, if the norm's channels or dimension are unknown,
            or if its forward does more than normalize, in a way that cannot be kept.
    """
    if wanted == "keep":
        return norm, "the recipe keeps norms"
    if wanted == "none":
        _refuse_hidden_work(norm)
        rest = _rest(norm)
        new = _sequence(rest) if rest else nn.Identity()
        return _carry(norm, new), f"what was fused stays: {', '.join(rest)}" if rest else ""
    count = channels if channels is not None else _channels(norm)
    if wanted == "bn":
        return _batch_norm(norm, count, dimension, like)
    groups, reason = _groups(wanted, count)
    if _has_groups(norm) == groups:
        return norm, f"already {_in_words(groups, count)}"
    plain = nn.GroupNorm(groups, count, affine=False)
    return _build(norm, plain, "GroupNormAct", {"num_groups": groups}), reason


def _is_over_channels(norm: nn.LayerNorm) -> bool:
    """Tell a layer norm for pictures, by its class's name or its own word for the layout."""
    if len(norm.normalized_shape) != 1:
        return False
    pictures = any(PICTURE.search(cls.__name__) for cls in type(norm).__mro__)
    return pictures or getattr(norm, "data_format", None) == "channels_first"


def _is_frozen(module: nn.Module) -> bool:
    """Tell a batch norm whose statistics and affine values are buffers."""
    fixed = {*AFFINE, *STATISTICS} <= {*module._buffers.keys()}
    return fixed and not module._parameters and "Norm" in type(module).__name__


def _is_fused_elsewhere(module: nn.Module) -> bool:
    """Tell a norm with an activation in it that derives from none of torch's norms."""
    weight = dict(module.named_parameters(recurse=False)).get("weight")
    if weight is None or is_lazy(weight) or weight.dim() != 1:
        return False
    if {*STATISTICS} <= {*module._buffers.keys()}:
        return _named_activation(module) is not None
    name = type(module).__name__
    named = NORM_CLASS.match(name) and "Act" in name and PICTURE.search(name)
    return bool(named) and isinstance(getattr(module, "act", None), nn.Module)


def _channels(norm: nn.Module) -> int:
    if isinstance(norm, _NormBase) and norm.num_features:
        return norm.num_features
    if isinstance(norm, nn.GroupNorm):
        return norm.num_channels
    if isinstance(norm, nn.LayerNorm):
        return norm.normalized_shape[-1]
    for tensor in (*norm.parameters(recurse=False), *norm.buffers(recurse=False)):
        if not is_lazy(tensor) and tensor.dim() == 1:
            return tensor.numel()
    raise ValueError("it is lazy and has seen no input. Run the model once, then convert it")


def _groups(wanted: str, count: int) -> tuple[int, str]:
    """Return the number of groups for a word of the recipe, and the sentence for the report."""
    if wanted in ("ln", "in"):
        groups = 1 if wanted == "ln" else count
        return groups, _in_words(groups, count)
    if wanted == "gn":
        if count % GROUPS == 0:
            return GROUPS, _in_words(GROUPS, count)
        fitting = [d for d in range(1, GROUPS + 1) if count % d == 0 and count >= 2 * d]
        groups = max(fitting, default=1)
        return groups, f"{_in_words(groups, count)}: {count} do not divide by {GROUPS}"
    groups = int(wanted.removeprefix("gn(").removesuffix(")"))
    if count % groups:
        fitting = [d for d in range(1, count + 1) if count % d == 0]
        nearest = min(fitting, key=lambda divisor: abs(divisor - groups))
        raise ValueError(
            f"{count} channels do not divide into {groups} groups. Write gn({nearest}), or gn,"
            " which takes a number that divides"
        )
    return groups, _in_words(groups, count)


def _in_words(groups: int, count: int) -> str:
    size = count // groups
    text = f"{groups} group{'' if groups == 1 else 's'} of {size} channel{'' if size == 1 else 's'}"
    return f"{text} (instance normalization)" if size == 1 and count > 1 else text


def _has_groups(norm: Any) -> int | None:
    """Return how many groups a norm has already; None where it is of another kind."""
    if isinstance(norm, nn.GroupNorm):
        return norm.num_groups
    same = isinstance(norm, _InstanceNorm) and not norm.track_running_stats
    return norm.num_features if same else None


def _batch_norm(
    norm: nn.Module, count: int, dimension: int | None, like: Tensor | None
) -> tuple[nn.Module, str]:
    if isinstance(norm, _BatchNorm):
        return norm, "already batch normalization"
    spatial = _dimension(norm) or dimension
    if spatial not in BATCH_NORMS:
        raise ValueError(
            f"{type(norm).__name__} does not tell whether its input has 1, 2 or 3 spatial"
            " dimensions, and no convolution before it does. Leave it out with exclude="
        )
    known = [value for value in norm.state_dict().values() if value.is_floating_point()]
    tensor = known[0] if known else like
    place: dict[str, Any] = {}
    if tensor is not None:
        place = {"device": tensor.device, "dtype": tensor.dtype}
    frozen = _is_frozen(norm)

    def take_over(new: nn.Module) -> None:
        for name in STATISTICS if frozen else ():
            getattr(new, name).copy_(getattr(norm, name))

    plain = BATCH_NORMS[spatial](count, affine=False, **place)
    new = _build(norm, plain, "BatchNormAct2d" if spatial == 2 else "", place, take_over)
    return (
        new,
        "statistics taken over; the affine values stay frozen" if frozen else "new statistics",
    )


def _dimension(norm: nn.Module) -> int | None:
    """Return the spatial dimensions that the name of a norm's class tells (LayerNorm2d: 2)."""
    for cls in type(norm).__mro__:
        if found := PICTURE.search(cls.__name__):
            return int(found.group()[0])
    return None


def _build(
    norm: nn.Module, plain: Any, fused: str, arguments: dict[str, Any], finish: Any = None
) -> nn.Module:
    """Finish a new norm: affine values, what was fused, mode and hooks.

    Args:
        norm: The norm that is there.
        plain: The new norm, torch's own, without affine values.
        fused: Name of the class that fuses such a norm with an activation, if there is one.
        arguments: What that class takes beside the number of channels.
        finish: Called with the new norm, to fill its statistics.
    """
    _refuse_hidden_work(norm)
    count = _channels(plain)
    affine = {name: _affine(norm, name, count) for name in AFFINE}
    rest = _rest(norm)
    counterpart = _counterpart(norm, fused, count, arguments) if _is_fused(norm) else None
    new: Any = plain if counterpart is None else counterpart
    new.affine = any(value is not None for value in affine.values())
    for name, value in affine.items():
        new.register_parameter(name, value)
    if finish is not None:
        with torch.no_grad():
            finish(new)
    if counterpart is not None:
        new.drop = norm._modules.get("drop") or nn.Identity()
        new.act = rest.get("act") or nn.Identity()
    elif rest:
        plain.training = norm.training
        new = _sequence({"norm": plain, **rest})
    return _carry(norm, new)


def _affine(norm: nn.Module, name: str, count: int) -> nn.Parameter | None:
    """Return an affine parameter of the new norm: the old one itself where it is a parameter."""
    old = norm._parameters.get(name)
    if old is None:
        fixed = norm._buffers.get(name)
        return None if fixed is None else nn.Parameter(fixed.detach().clone(), requires_grad=False)
    if not is_lazy(old) and old.shape == (count,):
        return old
    start = 1.0 if name == "weight" else 0.0
    values = torch.full((count,), start, device=old.device, dtype=old.dtype)
    return nn.Parameter(values, requires_grad=old.requires_grad)


def _is_fused(norm: nn.Module) -> bool:
    return isinstance(norm._modules.get("act"), nn.Module)


def _counterpart(
    norm: nn.Module, name: str, count: int, arguments: dict[str, Any]
) -> nn.Module | None:
    """Return the class of that name beside the norm's own class, built, or None."""
    for cls in type(norm).__mro__:
        home = cls.__module__
        if home.startswith("torch."):
            break
        for place in (home, home.rpartition(".")[0]):
            fused = getattr(sys.modules.get(place), name, None) if name else None
            if isinstance(fused, type) and issubclass(fused, nn.Module):
                try:
                    return fused(count, affine=False, apply_act=False, **arguments)
                except TypeError:  # a class of the same name that takes other arguments
                    return None
    return None


def _rest(norm: nn.Module) -> dict[str, nn.Module]:
    """Return what is fused into a norm beside the norm: dropout first, then the activation."""
    activation = _named_activation(norm)
    if activation is not None:
        return {} if isinstance(activation, nn.Identity) else {"act": activation}
    rest = {
        name: child
        for name, child in norm.named_children()
        if not isinstance(child, nn.Identity) and not any(is_norm(m) for m in child.modules())
    }
    return dict(sorted(rest.items(), key=lambda item: item[0] != "drop"))


def _named_activation(norm: nn.Module) -> nn.Module | None:
    """Return the activation that an in-place activated batch norm names in words."""
    for attribute, slope in (("act_name", "act_param"), ("activation", "activation_param")):
        word = getattr(norm, attribute, None)
        if word == "leaky_relu":
            return nn.LeakyReLU(float(getattr(norm, slope, 0.01)))
        if word in ("elu", "relu", "identity", "none"):
            return {"elu": nn.ELU, "relu": nn.ReLU}.get(word, nn.Identity)()
    return None


def _sequence(parts: dict[str, nn.Module]) -> nn.Sequential:
    """Return a sequence whose parts keep their names, and with them their checkpoint keys."""
    sequence = nn.Sequential()
    for name, part in parts.items():
        sequence.add_module(name, part)
    return sequence


def _carry(norm: nn.Module, new: nn.Module) -> nn.Module:
    """Give the new module the old one's mode and hooks, by whose handles they can be removed."""
    new.training = norm.training
    for name in HOOKS:
        if name in norm.__dict__:
            new.__dict__[name] = norm.__dict__[name]
    return new


def _refuse_hidden_work(norm: nn.Module) -> None:
    """Refuse a class of its own whose forward does more than its norm and its child modules.

    An activation written into the forward would be lost without a word, so a copy is run on a few
    numbers and compared with what the new module will keep.
    """
    if getattr(type(norm).forward, "__module__", "").startswith("torch.nn."):
        return
    try:
        probe = copy.deepcopy(norm).to("cpu", torch.float32).eval()
        for module in probe.modules():
            module._forward_hooks.clear()
            module._forward_pre_hooks.clear()
        shape = (2, _channels(norm), *[3] * (_dimension(norm) or 2))
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            kept = normalize(probe, x)
            if kept is None:
                return
            for part in _rest(probe).values():
                kept = part(kept)
            same = torch.allclose(type(norm).forward(probe, x.clone()), kept, rtol=1e-3, atol=1e-3)
    except Exception:  # it does not run on four axes, or not here: nothing can be said
        return
    if not same:
        raise ValueError(
            f"{type(norm).__name__}.forward does more than its norm and its child modules do, which"
            " a replacement would lose. Leave it out with exclude="
        )


def normalize(norm: Any, x: Tensor) -> Tensor | None:
    """Compute a norm alone, in evaluation, without what is fused into it.

    None for a formula that is not known here.
    """
    affine = (norm.weight, norm.bias)
    if isinstance(norm, nn.GroupNorm):
        return functional.group_norm(x, norm.num_groups, *affine, norm.eps)
    if isinstance(norm, nn.LayerNorm):
        last = x.movedim(1, -1)
        return functional.layer_norm(last, norm.normalized_shape, *affine, norm.eps).movedim(-1, 1)
    if not isinstance(norm, _NormBase) and not _is_frozen(norm):
        return None
    mean, variance = norm.running_mean, norm.running_var
    if isinstance(norm, _InstanceNorm):
        return functional.instance_norm(x, mean, variance, *affine, mean is None, eps=norm.eps)
    return functional.batch_norm(x, mean, variance, *affine, mean is None, eps=norm.eps)
