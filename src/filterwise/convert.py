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
from filterwise.filters import check_module, layout_of
from filterwise.guard import guard, unguard
from filterwise.kernel import check_kernel
from filterwise.preserve import Batches, Preservation
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
    preserve: bool = False,
    loader: Any = None,
    kernel: Kernel = "auto",
) -> Report:
    r"""Convert a model in place: activation norms by the recipe's norm, weights by its method.

    All or nothing: whatever is raised, the model is as it was. No random number is drawn and no raw
    weight is changed. Parameters stay the same objects under the same names, so an optimizer that
    exists still steps them; gains are new parameters. What follows what is found by tracing the
    model symbolically; one that cannot be traced is run once, without gradient or trace, on a small
    input made up from its first convolution, and the report says so.

    **Keeping the function** (``preserve=True``). The model then computes in evaluation mode what it
    did before, exactly where the method allows it. Per filter the gain becomes
    :math:`1/(k f(m_2))`, which undoes the division, and an offset :math:`c\mu` puts the mean back,
    so that the effective weight is the raw one (specification, 7.4). A gain or an offset that the
    method does not have is a buffer, which training does not move, as in mmcv's ConvAWS; a plain
    checkpoint loaded later is given its own. What is exact, to rounding:

    - every layer that gets a method, on every host; EquiNorm too in evaluation (it needs a loader
      for the mean of its inputs, and in training follows the batch's), and Equivariant WS where a
      filter is one cell (of several, the nearest in squares);
    - a BatchNorm that stays, frozen or not;
    - one that is removed behind a convolution (behind a linear layer, with a loader) that gets a
      method and whose output goes nowhere else: its evaluation scale and shift go into gain,
      offset and bias, whatever its mode is.

    What is not: a BatchNorm replaced by a norm of groups, which normalizes each sample by itself.
    Its running mean and variance go into the layer before it and its affine to the new norm, so
    that the two agree as far as samples are alike. Nor a norm removed behind a layer without a
    gain (its scale is lost, its mean kept), before a layer, or behind an addition (lost).

    A loader brings near what is not exact, in one pass in evaluation mode: layer by layer, gain and
    bias of a layer without a norm, or the affine of a new norm, are set so that each channel has
    the original's mean and standard deviation over the batches so far; running statistics of a new
    BatchNorm are taken, those of one behind a layer that changed are moved. What computes the
    original's moments already is left alone.

    Each row says how far it is from exact, as the largest difference of its output relative to the
    output's largest entry. Without a loader this is the layer or norm alone, on normal numbers of a
    fixed seed (for a norm, of its running mean and variance); a layer whose input is not known is
    judged by its weights. With a loader it is the whole network up to that row, on the first eight
    samples of the first batch.

    Args:
        model: Any model that is not wrapped (DDP, FSDP, compile) and not yet converted.
        recipe: ``"gn+ws"``, a `Recipe`, or a method, which removes the activation norms.
        select: Which weight layers, in place of the default: every convolution with a fan-in of 16
            or more that is neither depthwise nor the classifier. A shell pattern on the dotted
            name, a list of them, or a predicate ``(name, module) -> bool``.
        exclude: Which weight layers and norms to leave alone, in the same forms.
        preserve: Keep what the model computes in evaluation mode, as near as it can.
        loader: Batches for `preserve` alone: tensors, tuples or lists whose first item is the
            model's input, or mappings of its arguments. It is gone through once, to its end.
        kernel: Which implementation computes effective weights.

    Returns:
        A row for each weight layer, norm and added parameter; it prints as a table.

    Raises:
        RecipeError: If the recipe cannot be read.
        ConversionError: If anything in the model cannot be converted as asked; if the loader is
            empty, of another form, or given without `preserve`.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.ReLU(),
        ...                       nn.Flatten(), nn.Linear(32 * 36, 10))
        >>> convert_(model, "gn+ws").converted
        ['0']
    """
    recipe = as_recipe(recipe)
    check_kernel(kernel)
    if not isinstance(preserve, bool):
        raise TypeError(f"preserve must be True or False, got {preserve!r}")
    if loader is not None and not preserve:
        raise ConversionError(
            "loader serves preserve=True alone, to match the converted network with the one before;"
            " give both or neither. The model is unchanged."
        )
    check_module(model)
    batches = None if loader is None else Batches(model, loader)
    example = None if batches is None else batches.first
    drawn = draw(model, recipe, select, exclude, preserve=preserve, example=example)
    refused = [row for row in drawn.report if row.action == "refuse"]
    if refused:
        first, more = refused[0], len(refused) - 1
        others = f" {more} more {'is' if more == 1 else 'are'} refused." if more else ""
        raise ConversionError(f"{_where(first)} {first.reason}.{others} The model is unchanged.")
    preservation = Preservation(model, drawn, batches) if preserve else None
    with _all_or_nothing() as undo:
        _apply(model, drawn, recipe, kernel, undo, preserve=preserve)
        report = drawn.report
        if preservation is not None:
            preservation.carry(undo)
            report = preservation.finish(undo)
        _warn(drawn)
    return report


def unconvert_(model: nn.Module) -> Report:
    """Take the weight methods off a model in place; the raw weights stay, bit for bit.

    Gains, offsets and EquiNorm's statistics are taken away, so the function changes. Activation
    norms and added biases stay as the recipe left them. An adopted layer becomes what it was in
    its own library, and computes the same. A model without converted layers comes back unchanged
    with an empty report.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3))
        >>> _ = convert_(model, "bn+ws")
        >>> unconvert_(model)[0].action
        'remove'
    """
    host.refuse_to_take_off(model)
    rows, layers = [], list(host.converted(model))
    for name, module in layers:
        state = host.state_of(module)
        weight = getattr(module, state.parameter)
        origin = state.origin
        reason = "raw weight stays" if origin is None else f"{origin.kind} again, as it was"
        rows.append(
            Row(
                host.weight_label(name, module),
                host.base_class(module).__name__,
                "remove",
                str(state.method),
                reason,
                state.layout.fan_in(weight.shape),
                state.layout.filters(weight.shape),
            )
        )
    converted = sum(host.state_of(module).origin is None for _, module in layers)
    for _, module in layers:
        host.uninstall(module)
    checkpoint.remove_load_hook(model)
    unguard(model)
    notes = [] if layers else ["No layer of this model is converted."]
    if converted:
        notes.append("The layers now compute with their raw weights: the function has changed.")
    if len(layers) > converted:
        notes.append("Adopted layers compute as before, by their own library's code.")
    return Report(rows, notes, "")


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
    *,
    preserve: bool,
) -> None:
    for module in drawn.biases:
        layout = layout_of(module)
        weight: Any = module.weight
        with torch.inference_mode(False), torch.no_grad():
            zeros = weight.new_zeros(layout.filters(weight.shape))
        undo.append(lambda module=module: module._parameters.__setitem__("bias", None))
        module._parameters["bias"] = nn.Parameter(zeros, weight.requires_grad)
    for activation in drawn.in_place:
        undo.append(lambda activation=activation: setattr(activation, "inplace", True))
        activation.inplace = False
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
        host.install(
            module, recipe.method, layer.parameter, str(recipe), kernel, layer.name, preserve
        )
    if drawn.layers:
        undo.append(lambda: checkpoint.remove_load_hook(model))
        checkpoint.add_load_hook(model)
        guard(model, undo)


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
