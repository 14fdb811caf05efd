"""The graph by symbolic tracing: the forward's code runs on symbols, no tensor is computed."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from torch import fx, nn

from filterwise.graph.nodes import Builder, Graph, is_divisible, is_leaf
from filterwise.graph.untouched import untouched

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["trace_symbols"]

IN_PLACE_OPERATORS = {"iadd", "iand", "imatmul", "imul", "ior", "ipow", "isub", "itruediv"}
TENSOR_ATTRIBUTES = {"H", "T", "imag", "mH", "mT", "real"}


class _Tracer(fx.Tracer):
    """Takes every module without children as a leaf, wherever its class comes from.

    torch's own rule looks into classes outside `torch.nn`, whose code (SAME padding) often depends
    on sizes and cannot be traced.
    """

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        del module_qualified_name
        return is_leaf(m)


def trace_symbols(model: nn.Module, given: int | None = None) -> Graph:
    """Trace a model symbolically.

    Args:
        model: The model; it is left as it was.
        given: Number of positional arguments that its caller passes; None for those without a
            default. All others take their defaults.

    Raises:
        Exception: Whatever the model's code raises on symbols.
    """
    builder = Builder(model)
    if not is_divisible(model):  # tracing always looks into the root
        builder.output(builder.call(model, [builder.input()]))
        return builder.graph()
    with untouched(model):
        traced = _Tracer().trace(model, _defaults(model.forward, given))
        _read(traced, model, builder)
    return builder.graph()


def _defaults(forward: Callable[..., Any], given: int | None) -> dict[str, Any]:
    """Return the arguments that keep their defaults.

    A symbol in place of a None would take the other side of every ``if mask is not None``.
    """
    values = {}
    for place, (name, parameter) in enumerate(inspect.signature(forward).parameters.items()):
        passed = given is not None and place < given
        if not passed and isinstance(parameter.default, (type(None), bool, int, float, str)):
            values[name] = parameter.default
    return values


def _read(traced: fx.Graph, model: nn.Module, builder: Builder) -> None:
    """Copy torch.fx's graph; nodes that carry no signal have no place."""
    places: dict[fx.Node, int | None] = {}
    for node in traced.nodes:
        if node.op == "output":
            for source in node.all_input_nodes:
                if (place := places[source]) is not None:
                    builder.output(place)
            continue
        sources = [places[source] for source in node.all_input_nodes]
        inputs = [place for place in sources if place is not None]
        if node.op == "placeholder":
            places[node] = builder.input()
        elif node.op == "get_attr":
            places[node] = None
        elif node.op == "call_module":
            places[node] = builder.call(model.get_submodule(str(node.target)), inputs)
        else:
            parameters = [_parameter(model, source) for source in node.all_input_nodes]
            known = [parameter for parameter in parameters if parameter is not None]
            places[node] = builder.operate(
                _operation(node),
                inputs,
                known,
                foreign=_is_foreign(node),
                in_place=_is_in_place(node),
            )


def _operation(node: fx.Node) -> str:
    if isinstance(node.target, str):
        return node.target
    name = getattr(node.target, "__name__", type(node.target).__name__)
    if name != "getattr":
        return name
    # Sizes, dtypes and devices are no signal.
    return "attribute" if node.args[1] in TENSOR_ATTRIBUTES else "size"


def _is_in_place(node: fx.Node) -> bool:
    """Tell ``x.add_(y)``, ``x += y`` and ``relu(x, inplace=True)``."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if name.endswith("_") and not name.endswith("__"):
        return True
    if getattr(node.target, "__module__", "") == "_operator":
        return name in IN_PLACE_OPERATORS
    try:
        given = inspect.signature(node.target).bind(*node.args, **node.kwargs)  # pyright: ignore[reportArgumentType]
    except (TypeError, ValueError):  # a method's name, or a function without a signature
        return node.kwargs.get("inplace") is True
    return given.arguments.get("inplace") is True


def _is_foreign(node: fx.Node) -> bool:
    """Tell a function that a library asked not to be looked into (`torch.fx.wrap`)."""
    home = getattr(node.target, "__module__", None) or "torch"
    return callable(node.target) and home.partition(".")[0] not in (
        "torch",
        "_operator",
        "builtins",
    )


def _parameter(model: nn.Module, node: fx.Node) -> nn.Parameter | None:
    """Return the parameter that a node reads, if it reads one."""
    if node.op != "get_attr":
        return None
    owner, _, name = str(node.target).rpartition(".")
    return model.get_submodule(owner)._parameters.get(name)
