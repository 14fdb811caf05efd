"""Converting a model in place, all or nothing, and taking it back."""

from __future__ import annotations

import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from filterwise import checkpoint, host
from filterwise.draft import Draft, draw
from filterwise.errors import ConversionError, FilterwiseWarning, NormalizationWarning
from filterwise.filters import layout_of
from filterwise.kernel import check_kernel
from filterwise.recipe import Recipe, as_recipe
from filterwise.report import Report, Row

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from filterwise.kernel import Kernel
    from filterwise.methods.method import Method
    from filterwise.selection import Selector

__all__ = ["convert_", "describe", "plan", "unconvert_"]


def plan(
    model: nn.Module,
    recipe: str | Recipe | Method,
    *,
    select: Selector | None = None,
    exclude: Selector | None = None,
) -> Report:
    """Tell what `convert_` would do, changing nothing.

    What it would refuse is a row ``refuse`` with the reason. Arguments are those of `convert_`.

    Raises:
        RecipeError: If the recipe cannot be read.
        ConversionError: If a pattern of `select` or `exclude` matches nothing.
    """
    return draw(model, as_recipe(recipe), select, exclude).report


def convert_(
    model: nn.Module,
    recipe: str | Recipe | Method,
    *,
    select: Selector | None = None,
    exclude: Selector | None = None,
    kernel: Kernel = "auto",
) -> Report:
    """Convert a model in place: activation norms by the recipe's norm, weights by its method.

    All or nothing: whatever is raised, the model is as it was. No random number is drawn and no raw
    weight is changed. Parameters stay the same objects under the same names, so an optimizer that
    exists still steps them; gains are new parameters. What follows what is found by tracing the
    model symbolically; one that cannot be traced is run once, without gradient or trace, on a small
    input made up from its first convolution, and the report says so.

    Args:
        model: Any model that is not wrapped (DDP, FSDP, compile) and not yet converted.
        recipe: ``"gn+ws"``, a `Recipe`, or a method, which removes the activation norms.
        select: Which weight layers, in place of the default: every convolution with a fan-in of 16
            or more that is neither depthwise nor the classifier. A shell pattern on the dotted
            name, a list of them, or a predicate ``(name, module) -> bool``.
        exclude: Which weight layers and norms to leave alone, in the same forms.
        kernel: Which implementation computes effective weights.

    Returns:
        A row for each weight layer, norm and added parameter; it prints as a table.

    Raises:
        RecipeError: If the recipe cannot be read.
        ConversionError: If anything in the model cannot be converted as asked.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.ReLU(),
        ...                       nn.Flatten(), nn.Linear(32 * 36, 10))
        >>> convert_(model, "gn+ws").converted
        ['0']
    """
    recipe = as_recipe(recipe)
    check_kernel(kernel)
    drawn = draw(model, recipe, select, exclude)
    refused = [row for row in drawn.report if row.action == "refuse"]
    if refused:
        first, more = refused[0], len(refused) - 1
        others = f" {more} more {'is' if more == 1 else 'are'} refused." if more else ""
        raise ConversionError(f"{_where(first)} {first.reason}.{others} The model is unchanged.")
    with _all_or_nothing() as undo:
        _apply(model, drawn, recipe, kernel, undo)
        _warn(drawn)
    return drawn.report


def unconvert_(model: nn.Module) -> Report:
    """Take the weight methods off a model in place; the raw weights stay, bit for bit.

    Gains, offsets and EquiNorm's statistics are taken away, so the function changes. Activation
    norms and added biases stay as the recipe left them. A model without converted layers comes back
    unchanged with an empty report.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3))
        >>> _ = convert_(model, "bn+ws")
        >>> unconvert_(model)[0].action
        'remove'
    """
    host.refuse_to_take_off(model)
    rows = []
    for name, module in list(host.converted(model)):
        state = host.state_of(module)
        weight = getattr(module, state.parameter)
        rows.append(
            Row(
                host.weight_label(name, module),
                host.base_class(module).__name__,
                "remove",
                str(state.method),
                "raw weight stays",
                state.layout.fan_in(weight.shape),
                state.layout.filters(weight.shape),
            )
        )
    for _, module in list(host.converted(model)):
        host.uninstall(module)
    checkpoint.remove_load_hook(model)
    notes = ["The layers now compute with their raw weights: the function has changed."]
    return Report(rows, notes if rows else ["No layer of this model is converted."], "")


def describe(model: nn.Module) -> dict[str, str]:
    """Return the canonical text of each converted layer's method, by the name in reports.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
        >>> _ = convert_(model, "wa(constant=preserving)")
        >>> describe(model)
        {'0': 'wa(constant=preserving)'}
    """
    return {
        host.weight_label(name, module): str(host.state_of(module).method)
        for name, module in host.converted(model)
    }


def _where(row: Row) -> str:
    return f"{row.name} ({row.kind})" if row.name else f"the model ({row.kind})"


@contextmanager
def _all_or_nothing() -> Iterator[list[Callable[[], None]]]:
    """Collect how to undo each step, and undo them in reverse order if anything is raised."""
    undo: list[Callable[[], None]] = []
    try:
        yield undo
    except BaseException:
        for step in reversed(undo):
            step()
        raise


def _apply(
    model: nn.Module,
    drawn: Draft,
    recipe: Recipe,
    kernel: Kernel,
    undo: list[Callable[[], None]],
) -> None:
    for module in drawn.biases:
        layout = layout_of(module)
        weight: Any = module.weight
        with torch.inference_mode(False), torch.no_grad():
            zeros = weight.new_zeros(layout.filters(weight.shape))
        undo.append(lambda module=module: module._parameters.__setitem__("bias", None))
        module._parameters["bias"] = nn.Parameter(zeros, weight.requires_grad)
    exchanged = {id(old): new for old, new in drawn.norms}
    for parent in list(model.modules()) if exchanged else ():
        for name, old in list(parent._modules.items()):
            if id(old) in exchanged:
                undo.append(
                    lambda parent=parent, name=name, old=old: parent._modules.__setitem__(name, old)
                )
                parent._modules[name] = exchanged[id(old)]
    for layer in drawn.layers:
        module = layer.module
        undo.append(lambda module=module: _restore(module))
        assert recipe.method is not None
        host.install(module, recipe.method, layer.parameter, str(recipe), kernel, layer.name)
    if drawn.layers:
        undo.append(lambda: checkpoint.remove_load_hook(model))
        checkpoint.add_load_hook(model)


def _restore(module: nn.Module) -> None:
    if host.is_converted(module):
        had_bias = not host.state_of(module).adds_bias
        host.uninstall(module)
        if not had_bias:
            module._parameters["bias"] = None


def _warn(drawn: Draft) -> None:
    if drawn.unnormalized:
        warnings.warn(drawn.unnormalized, NormalizationWarning, stacklevel=3)
    for note in drawn.demands:
        warnings.warn(note, FilterwiseWarning, stacklevel=3)
