"""OpenMMLab: a converted model, its parameter groups and deferral, named in a config.

Importing this registers all of it with mmengine, which mmdet, mmseg and mmpretrain build from::

    custom_imports = dict(imports=["filterwise.integrations.mmengine"])
    model = dict(type="Converted", recipe="gn+ws", exclude=["neck.*"], model=dict(type=...))
    optim_wrapper = dict(
        type="DeferringOptimWrapper", constructor="ParamGroups", accumulative_counts=8,
        optimizer=dict(type="SGD", lr=0.02, momentum=0.9, weight_decay=1e-4))
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from mmengine.optim import (  # pyright: ignore[reportMissingImports]  # an extra of its own
    AmpOptimWrapper,
    OptimWrapper,
)
from mmengine.registry import (  # pyright: ignore[reportMissingImports]
    MODELS,
    OPTIM_WRAPPER_CONSTRUCTORS,
    OPTIM_WRAPPERS,
    OPTIMIZERS,
)

from filterwise.convert import convert_
from filterwise.defer import defer
from filterwise.optim import param_groups

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor, nn

__all__ = ["DeferringAmpOptimWrapper", "DeferringOptimWrapper", "ParamGroups", "converted"]


@MODELS.register_module(name="Converted")
def converted(model: dict[str, Any], recipe: str, **options: Any) -> nn.Module:
    """Build a model from its config, and convert it.

    Args:
        model: Config of any registered model.
        recipe: As for `convert_`.
        options: Its other arguments: select, exclude.
    """
    built = MODELS.build(model)
    convert_(built, recipe, **options)
    return built


class _Deferring:
    """Keeps deferral open from a micro-batch's forward to the end of its backward."""

    _open: ExitStack | None = None

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """Enter `defer`, which `backward` leaves, since mmengine runs it outside of this."""
        wrapper: Any = self
        stack = ExitStack()
        stack.enter_context(defer(model, enabled=not wrapper.should_sync()))
        try:
            with super().optim_context(model):  # pyright: ignore[reportAttributeAccessIssue]
                yield
        except BaseException:
            stack.close()
            raise
        self._open = stack

    def backward(self, loss: Tensor, **options: Any) -> None:
        """Run the backward, and leave `defer`."""
        try:
            super().backward(loss, **options)  # pyright: ignore[reportAttributeAccessIssue]
        finally:
            if self._open is not None:
                self._open.close()
                self._open = None


@OPTIM_WRAPPERS.register_module()
class DeferringOptimWrapper(_Deferring, OptimWrapper):
    """mmengine's wrapper, with the normalization once an optimizer step.

    It follows ``accumulative_counts``.
    """


@OPTIM_WRAPPERS.register_module()
class DeferringAmpOptimWrapper(_Deferring, AmpOptimWrapper):
    """The same with autocast and a scaled loss."""


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class ParamGroups:
    """Builds the optimizer of a config on `param_groups`: gains and norms without decay."""

    def __init__(
        self, optim_wrapper_cfg: dict[str, Any], paramwise_cfg: dict[str, Any] | None = None
    ) -> None:
        """Keep the config."""
        if paramwise_cfg:
            raise ValueError(f"ParamGroups decides by role; paramwise_cfg is {paramwise_cfg!r}")
        self.config = dict(optim_wrapper_cfg)

    def __call__(self, model: nn.Module) -> OptimWrapper:
        """Build the wrapper around its optimizer."""
        config = {"type": "OptimWrapper", **self.config}
        optimizer = dict(config.pop("optimizer"))
        decay = optimizer.pop("weight_decay", 0.0)
        inner: Any = model.module if hasattr(model, "module") else model
        optimizer["params"] = param_groups(inner, decay)
        return OPTIM_WRAPPERS.build({**config, "optimizer": OPTIMIZERS.build(optimizer)})
