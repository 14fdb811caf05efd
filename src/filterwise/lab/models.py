"""Models by name: torchvision's, timm's, or a factory in somebody's own module."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
import traceback
import warnings
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from torch import nn

from filterwise.lab.architectures import ARCHITECTURES
from filterwise.lab.errors import LabError, UsageError, reason

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["find_model", "named_model", "picture_shape"]

LAB_PICTURES = (3, 32, 32)
"""What the lab's own networks are shown where nothing else is said."""


def find_model(name: str, classes: int | None = None) -> tuple[nn.Module, str]:
    """Find a model by the name that ``filterwise inspect`` takes.

    Args:
        name: A model of torchvision or, where that has none, of timm; one of the lab's own; or
            ``package.module:factory``, a function or class that is called without arguments. The
            current folder is searched for modules.
        classes: Size of the classifier; None for the architecture's own.

    Returns:
        The model with random weights, and where it was found.

    Raises:
        UsageError: If there is no such model, module or factory, naming the nearest.
        LabError: If it cannot be built.
    """
    options: dict[str, Any] = {} if classes is None else {"num_classes": classes}
    if ":" in name:
        if options:
            raise UsageError(
                "a factory is called without arguments, so --classes has no say in it."
            )
        return _from_factory(name), f"{name}(), as its factory made it"
    if name in _torchvision_names():
        return _of_torchvision(name, **options), "torchvision"
    if name in _timm_names():
        import timm

        return _built(name, lambda: timm.create_model(name, pretrained=False, **options)), "timm"
    if name in ARCHITECTURES:
        channels, *_ = LAB_PICTURES
        return ARCHITECTURES[name](channels, classes or 10), "filterwise's lab"
    raise _unknown(name, "Own models are named as package.module:factory.", tuple(ARCHITECTURES))


def picture_shape(name: str) -> tuple[int, ...] | None:
    """Return channels, height and width that a named model's published weights take, if known."""
    if ":" in name:
        return None
    if name in _torchvision_names():
        from torchvision import models

        try:
            weights = models.get_model_weights(name)
            return (3, *(int(weights["DEFAULT"].transforms().crop_size[0]),) * 2)
        except (AttributeError, KeyError, TypeError, ValueError):  # detectors, segmenters, videos
            return None
    if name in ARCHITECTURES:
        return LAB_PICTURES
    import timm

    config = timm.get_pretrained_cfg(name)
    return None if config is None else tuple(config.input_size)


def named_model(name: str, channels: int, classes: int) -> nn.Module:
    """Build a torchvision or timm model for pictures of `channels` channels and some classes.

    Torchvision's take three channels: grey pictures are repeated.

    Raises:
        UsageError: If neither library has it, naming the nearest.
        LabError: If it cannot be built.
    """
    if name in _torchvision_names():
        model = _of_torchvision(name, num_classes=classes)
        return model if channels == 3 else _Repeated(model)
    if name in _timm_names():
        import timm

        return _built(
            name,
            lambda: timm.create_model(
                name, pretrained=False, in_chans=channels, num_classes=classes
            ),
        )
    own = ", ".join(ARCHITECTURES)
    raise _unknown(name, f"The lab's own: {own}.", tuple(ARCHITECTURES), option="--net: ")


class _Repeated(nn.Module):
    """A model for three channels that is shown one, three times."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pictures: Tensor) -> Tensor:
        return self.model(pictures.expand(-1, 3, -1, -1))


def _of_torchvision(name: str, **options: Any) -> nn.Module:
    from torchvision import models

    builder = models.get_model_builder(name)
    options["weights"] = None
    if "weights_backbone" in inspect.signature(builder).parameters:
        # Detection and segmentation models would fetch their backbone's weights.
        options["weights_backbone"] = None
    return _built(name, lambda: builder(**options))


def _built(name: str, make: Any) -> nn.Module:
    try:
        with warnings.catch_warnings():
            # Libraries warn of their own initialization here; nothing of it concerns the reader.
            warnings.simplefilter("ignore")
            return make()
    except (RuntimeError, TypeError, ValueError, OSError) as error:
        raise LabError(f"{name} cannot be built: {reason(error)}.") from None


def _torchvision_names() -> list[str]:
    try:
        from torchvision import models
    except (ImportError, RuntimeError) as error:
        raise LabError(
            f"torchvision cannot be imported: {reason(error)}. It must fit the torch that is"
            " installed; reinstall both together."
        ) from None
    return models.list_models()


def _timm_names() -> list[str]:
    import timm

    return timm.list_models()


def _unknown(name: str, more: str, others: tuple[str, ...] = (), option: str = "") -> UsageError:
    known = [*others, *_torchvision_names(), *_timm_names()]
    nearest = list(dict.fromkeys(get_close_matches(name.lower(), known, n=3)))
    hint = f"Nearest: {', '.join(nearest)}." if nearest else "timm.list_models() lists many."
    return UsageError(f"{option}neither torchvision nor timm has a model {name!r}. {hint} {more}")


def _from_factory(name: str) -> nn.Module:
    module_name, _, factory_name = name.partition(":")
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and (module_name == error.name or module_name.startswith(error.name + ".")):
            raise UsageError(
                f"there is no module {error.name} in the environment or in {here}."
            ) from None
        raise LabError(f"{module_name} imports {error.name}, which is not installed.") from None
    except Exception as error:
        raise LabError(
            f"{module_name} cannot be imported: {type(error).__name__} {_place(error)}:"
            f" {reason(error)}."
        ) from None
    found: Any = module
    for part in factory_name.split("."):
        if not hasattr(found, part):
            public = [word for word in dir(found) if not word.startswith("_")]
            nearest = get_close_matches(part, public, n=3)
            hint = f" Nearest: {', '.join(nearest)}." if nearest else ""
            raise UsageError(f"{module_name} has no {factory_name}.{hint}")
        found = getattr(found, part)
    return _called(name, found)


def _place(error: BaseException) -> str:
    """Return file and line where an error in somebody's own code was raised."""
    if isinstance(error, SyntaxError):
        return f"at {error.filename}:{error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    return f"at {frames[-1].filename}:{frames[-1].lineno}"


def _called(name: str, factory: Any) -> nn.Module:
    if isinstance(factory, nn.Module):
        return factory
    if not callable(factory):
        raise UsageError(
            f"{name} is a {type(factory).__name__}, not a function that makes a model."
        )
    try:
        model = factory()
    except Exception as error:
        raise LabError(
            f"{name}() failed: {type(error).__name__} {_place(error)}: {reason(error)}. It is"
            " called without arguments."
        ) from None
    if not isinstance(model, nn.Module):
        raise UsageError(f"{name}() gave a {type(model).__name__}, not a torch.nn.Module.")
    return model
