"""What an adopted layer was: taking another library's form off a layer, and putting it on again.

Parameters stay the same objects, so an optimizer that exists still steps them. A layer whose class
standardizes keeps their names too; one with torch's ``weight_norm`` or a parametrization gets the
names ``weight`` and ``gain``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.weight_norm import WeightNorm

if TYPE_CHECKING:
    from collections.abc import Mapping

    from filterwise.identify import Subject

__all__ = ["take_off"]

WEIGHT_NORM_KEYS = {
    "weight_v": "weight",
    "weight_g": "gain",
    "parametrizations.weight.original1": "weight",
    "parametrizations.weight.original0": "gain",
}


@dataclass(frozen=True)
class OfClass:
    """A layer whose class standardized its weight."""

    cls: type[nn.Module]
    keys: Mapping[str, str] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """Name of the class it had."""
        return self.cls.__name__

    def restore(self, module: nn.Module) -> None:
        """Give the class back."""
        module.__class__ = self.cls


@dataclass(frozen=True)
class OfParametrization:
    """A layer with one parametrization of torch on its weight, such as Composer's."""

    parametrization: nn.Module
    kind: str
    keys: Mapping[str, str] = field(
        default_factory=lambda: {"parametrizations.weight.original": "weight"}
    )

    def restore(self, module: nn.Module) -> None:
        """Register the parametrization again."""
        raw = module._parameters["weight"]
        parametrize.register_parametrization(module, "weight", self.parametrization, unsafe=True)
        _originals(module)["original"] = raw


@dataclass(frozen=True)
class OfWeightNorm:
    """A layer with torch's ``weight_norm``, as a parametrization or as the old hook."""

    axis: int
    hooked: bool
    kind: str
    keys: Mapping[str, str] = field(default_factory=lambda: dict(WEIGHT_NORM_KEYS))

    def restore(self, module: nn.Module) -> None:
        """Put weight_norm on again, with the layer's own two parameters."""
        v, g = module._parameters["weight"], module._parameters.pop("gain")
        if not self.hooked:
            parametrizations.weight_norm(module, "weight", self.axis)
            _originals(module).update(original0=g, original1=v)
            return
        del module._parameters["weight"]
        module._parameters.update(weight_g=g, weight_v=v)
        hook = WeightNorm("weight", self.axis)
        module.weight = hook.compute_weight(module)
        module.register_forward_pre_hook(hook)


Origin = OfClass | OfParametrization | OfWeightNorm


def _originals(module: Any) -> dict[str, nn.Parameter | None]:
    return module.parametrizations.weight._parameters


def take_off(module: Any, subject: Subject, plain: type[nn.Module]) -> Origin:
    """Give a layer its plain class, with its raw weight as ``weight``; return what it was.

    Args:
        module: A layer of another library.
        subject: How it computes its weight.
        plain: The class that uses the weight as it is.
    """
    cls = type(module)
    if subject.form == "class":
        module.__class__ = plain
        return OfClass(cls)
    if subject.form == "hook":
        parameters = module._parameters
        for key, hook in list(module._forward_pre_hooks.items()):
            if hook is subject.hook:
                del module._forward_pre_hooks[key]
        module.__dict__.pop("weight", None)
        parameters["weight"] = parameters.pop("weight_v")
        parameters["gain"] = parameters.pop("weight_g")
        return OfWeightNorm(subject.hook.dim, hooked=True, kind=cls.__name__)
    chain, originals = module.parametrizations.weight, _originals(module)
    del module._modules["parametrizations"]
    module.__class__ = plain
    if subject.axis is None:
        module._parameters["weight"] = originals["original"]
        return OfParametrization(chain[0], cls.__name__)
    # The hook is a closure, so a layer that still had it could not be pickled.
    for key, hook in list(module._load_state_dict_pre_hooks.items()):
        if getattr(getattr(hook, "hook", hook), "__name__", "") == "_weight_norm_compat_hook":
            del module._load_state_dict_pre_hooks[key]
    module._parameters["weight"] = originals["original1"]
    module._parameters["gain"] = originals["original0"]
    return OfWeightNorm(chain[0].dim, hooked=False, kind=cls.__name__)
