"""What is compared at a row of the report: one tensor before the conversion and one after it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from filterwise import norms, verify
from filterwise.errors import ConversionError
from filterwise.filters import weight_name

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from filterwise.preserve.batches import Arguments
    from filterwise.preserve.carry import Carry

__all__ = ["Probe", "Seen", "call", "compare_networks", "layer_probe", "norm_probe", "standing"]

Seen = Callable[[nn.Module, "Tensor", Any], "Tensor | None"]
"""What is looked at of a module's call: from the module, its input and its output."""

SAMPLES = 8  # of a batch, whose activations are kept to be compared


@dataclass(frozen=True)
class Probe:
    """A row of the report: where to look in the original, and where in the converted network.

    Attributes:
        row: Name of the row.
        original: Name of a module of the original.
        before: What is looked at there.
        module: Name of a module of the converted network.
        after: What is looked at there.
    """

    row: str
    original: str
    before: Seen
    module: str
    after: Seen


def standing(module: nn.Module) -> nn.Module:
    """Return the norm in what replaced a norm: itself, or the first part of a sequence."""
    return module._modules["norm"] or module if isinstance(module, nn.Sequential) else module


def output_of(module: nn.Module, x: Tensor, output: Any) -> Tensor | None:
    """Look at the output."""
    del module, x
    return output if isinstance(output, torch.Tensor) else None


def input_of(module: nn.Module, x: Tensor, output: Any) -> Tensor:
    """Look at the input."""
    del module, output
    return x


def normalized(module: nn.Module, x: Tensor, output: Any) -> Tensor | None:
    """Look at a norm's values before what is fused into it."""
    found = norms.normalize(standing(module), x)
    return output_of(module, x, output) if found is None else found


def layer_probe(row: str, name: str, carry: Carry | None) -> Probe:
    """Return the probe of a weight layer; `carry` is what it took over."""
    if carry is None:
        return Probe(row, name, output_of, name, output_of)
    axis = -1 if weight_name(carry.layer) and isinstance(carry.layer, nn.Linear) else 1

    def carried(module: nn.Module, x: Tensor, output: Any) -> Tensor:
        del module, x
        return carry.of_output(output, axis)

    return Probe(row, name, carried, name, output_of)


def norm_probe(name: str, *, removed: bool) -> Probe:
    """Return the probe of a norm: what it computes, against its successor or, removed, nothing."""
    return Probe(name, name, normalized, name, input_of if removed else normalized)


def call(model: nn.Module, arguments: Arguments) -> Any:
    """Run a model on a batch of the loader.

    Raises:
        ConversionError: If it raises.
    """
    try:
        if isinstance(arguments, Mapping):
            return model(**arguments)
        return model(*arguments)
    except ConversionError:
        raise
    except Exception as error:
        given = arguments.values() if isinstance(arguments, Mapping) else arguments
        shapes = [tuple(one.shape) for one in verify.floating_tensors(tuple(given))]
        raise ConversionError(
            f"the model does not run on a batch of loader (shapes {shapes}):"
            f" {type(error).__name__}: {error}. The model is unchanged."
        ) from error


@contextmanager
def watching(model: nn.Module, looks: Sequence[tuple[str, Callable[..., Any]]]) -> Iterator[None]:
    """Call functions with (module, input, output) whenever modules are called; first of all hooks.

    Where one returns True the module has changed: it runs again, and goes on with that output.
    """
    with ExitStack() as stack:
        for name, look in looks:

            def hook(module: Any, args: Any, kwargs: Any, output: Any, look: Any = look) -> Any:
                changed = look(module, (*args, *kwargs.values())[0], output)
                return module.forward(*args, **kwargs) if changed else None

            module = model.get_submodule(name)
            handle = module.register_forward_hook(hook, prepend=True, with_kwargs=True)
            stack.callback(handle.remove)
        yield


def compare_networks(
    original: nn.Module, model: nn.Module, probes: Sequence[Probe], arguments: Arguments
) -> tuple[dict[str, float], float]:
    """Run both networks in evaluation mode on one batch and compare them, row by row.

    Returns:
        The largest difference relative to the largest entry, by row, over the first eight samples;
        and that of the networks' outputs.
    """
    kept: dict[str, list[Tensor]] = {}
    figures: dict[str, float] = {}
    calls: dict[str, int] = {}

    def keep(probe: Probe) -> Callable[..., None]:
        def look(module: nn.Module, x: Tensor, output: Any) -> None:
            found = probe.before(module, x, output)
            if found is not None:
                kept.setdefault(probe.row, []).append(found[:SAMPLES].clone())

        return look

    def compare(probe: Probe) -> Callable[..., None]:
        def look(module: nn.Module, x: Tensor, output: Any) -> None:
            found = probe.after(module, x, output)
            place = calls[probe.row] = calls.get(probe.row, -1) + 1
            if found is None or place >= len(kept.get(probe.row, [])):
                return
            gap = verify.relative_difference(kept[probe.row][place], found[:SAMPLES])
            figures[probe.row] = max(gap, figures.get(probe.row, 0.0))

        return look

    with (
        verify.evaluating(original),
        watching(original, [(probe.original, keep(probe)) for probe in probes]),
    ):
        expected = call(original, arguments)
    with (
        verify.evaluating(model),
        watching(model, [(probe.module, compare(probe)) for probe in probes]),
    ):
        return figures, verify.relative_difference(expected, call(model, arguments))
