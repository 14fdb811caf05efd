"""What follows what: the questions that conversion, folding and initialization ask of a model."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from filterwise.graph.branches import Branch, find_branches
from filterwise.graph.made_up import made_up_inputs
from filterwise.graph.nodes import Builder, Graph, leaves
from filterwise.graph.observed import observe
from filterwise.graph.symbolic import trace_symbols
from filterwise.graph.writers import writers

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from torch import nn

    from filterwise.graph.nodes import Node

__all__ = ["Flow", "How", "trace"]

How = Literal["traced", "ran", "registration order"]
"""How a graph was found, from the best way to the last."""


def trace(model: nn.Module, example_input: Any = None, *, make_up: bool = False) -> Flow:
    """Find what follows what in a model, by the best way that serves.

    First symbolic tracing, in the other mode too where this one leaves layers out (heads that only
    training uses); else one run with the example input, without gradient; else the order of
    registration, which is a guess. The model, its buffers, mode and hooks, and all random states
    are left as they were.

    Args:
        model: Any model. Weight layers inside a module that is called as one (attention) are
            known by that call.
        example_input: An input; a tuple holds positional arguments, a mapping named ones.
        make_up: Without an example input, run a model that cannot be traced with one made up from
            its first convolution, if it takes it.

    Cost: a fraction of a second, or one forward pass.
    """
    given = None
    if example_input is not None:
        given = len(example_input) if isinstance(example_input, tuple) else 1
    try:
        graph = trace_symbols(model, given)
        return Flow(model, graph, "traced", "", _other_mode(model, graph, given))
    except Exception as error:  # the model's own code runs: anything may be raised
        why = f"symbolic tracing failed ({_first_line(error)})"
    if example_input is None:
        for made_up, words in made_up_inputs(model) if make_up else ():
            with contextlib.suppress(Exception):
                return Flow(model, observe(model, made_up), "ran", why, example=words)
        why += " and no example input was given"
        return Flow(model, _registered(model), "registration order", why)
    try:
        return Flow(model, observe(model, example_input), "ran", why)
    except Exception as error:
        why += f" and the run with the example input failed ({_first_line(error)})"
        return Flow(model, _registered(model), "registration order", why)


class Flow:
    """What follows what in a model.

    Names are dotted; a reused module goes by its first name.

    Attributes:
        how: Which way served: "traced", "ran" or "registration order".
    """

    how: How

    def __init__(
        self,
        model: nn.Module,
        graph: Graph,
        how: How,
        why: str,
        other: Graph | None = None,
        example: str = "the example input",
    ) -> None:
        """Keep a graph.

        Args:
            model: The model it was made from; it is not kept.
            graph: One forward pass.
            how: Which way served.
            why: Why no better way did.
            other: A forward pass in the other mode, for what this one does not use.
            example: What it was run with, in words.
        """
        self.how = how
        self._graph = graph
        self._why = why
        self._example = example
        self._registered = graph if how == "registration order" else _registered(model)
        layers = dict.fromkeys(name for node in self._registered.nodes for name in node.layers)
        self._other = other
        seen = graph.calls if other is None else {**graph.calls, **other.calls}
        self._unseen = [name for name in layers if name not in seen]

    @property
    def sentence(self) -> str:
        """How the graph was found and why not better, for a report's notes."""
        ways = {
            "traced": "What follows what was found by symbolic tracing",
            "ran": f"What follows what was seen in one run with {self._example}",
            "registration order": "What follows what was guessed from the order of registration",
        }
        text = f"{ways[self.how]}{f', since {self._why}' if self._why else ''}."
        if self._unseen:
            shown = ", ".join(self._unseen[:3]) + (", ..." if len(self._unseen) > 3 else "")
            number = len(self._unseen)
            text += (
                f" {number} layer{' was' if number == 1 else 's were'} not used in it and judged by"
                f" the order of registration: {shown}."
            )
        return text

    def producers(self, norm: str) -> tuple[str, ...] | None:
        """Return the weight layers whose output goes straight into a norm.

        Empty where something else does (a concatenation, an activation); None where it is not
        known, since the norm was not used.
        """
        graph = self._graph
        if norm not in graph.calls and self._other is not None:
            graph = self._other
        if norm not in graph.calls:
            return None
        found: dict[str, None] = {}
        for call in graph.calls[norm]:
            for source in graph.nodes[call].inputs:
                while graph.nodes[source].same and graph.nodes[source].inputs:
                    source = graph.nodes[source].inputs[0]
                node = graph.nodes[source]
                if node.weight and len(node.layers) == 1:
                    found[node.layers[0]] = None
        return tuple(found)

    def sole_norm(self, layer: str) -> str | None:
        """Return the norm that alone takes a layer's output, directly, else None.

        Both must be called once. By registration order this is never known.
        """
        graph = self._graph
        calls = graph.calls.get(layer, ())
        if self.how == "registration order" or len(calls) != 1:
            return None
        if graph.nodes[calls[0]].layers != (layer,):
            return None
        index = calls[0]
        while index not in graph.outputs and len(graph.users[index]) == 1:
            index = graph.users[index][0]
            node = graph.nodes[index]
            if node.norm and node.module is not None:
                alone = len(graph.calls[node.module]) == 1 and len(node.inputs) == 1
                return node.module if alone else None
            if not node.same:
                return None
        return None

    def is_last(self, layer: str) -> bool:
        """Tell a classifier or predictor.

        That is a layer that no other weight layer follows on any way to an output, and whose output
        no norm takes. Of several layers in one call only the last can be.
        """
        graph, calls = self._around(layer)
        if any(graph.nodes[call].layers[-1:] != (layer,) for call in calls):
            return False
        follows = {after for call in calls for after in _after(graph, call)}
        return bool(calls) and not any(
            graph.nodes[index].normalizes
            or (graph.nodes[index].weight and graph.nodes[index].layers != (layer,))
            for index in follows
        )

    def normalized(self, layer: str, removed: Collection[str] = ()) -> bool:
        """Tell whether on every way forward a norm stands before the next weight or an output.

        Args:
            layer: Name of a weight layer.
            removed: Names of norms to count as not there.
        """
        graph, calls = self._around(layer)
        settled: set[int] = set()
        waiting = list(calls)
        while waiting:
            index = waiting.pop()
            if index in graph.outputs or not graph.users[index]:
                return False
            for user in graph.users[index]:
                node = graph.nodes[user]
                if node.weight:
                    return False
                stops = node.normalizes and node.module not in removed
                if not stops and user not in settled:
                    settled.add(user)
                    waiting.append(user)
        return bool(calls)

    def writers(self, norm: str, removed: Collection[str]) -> list[Node] | None:
        """Return the calls that would write over a norm's input if the norm made no new tensor.

        Empty where nobody else needs the input as it was.

        Args:
            norm: Name of the norm that is removed.
            removed: Names of all norms that are.

        Returns:
            Calls that work in place; None where it is not known which follow.
        """
        if self.how == "registration order":
            return None
        found = [
            writers(graph, norm, removed)
            for graph in (self._graph, self._other)
            if graph is not None and norm in graph.calls
        ]
        return [node for nodes in found for node in nodes] if found else None

    def branches(self) -> list[Branch]:
        """Return the residual branches, in forward order; none by registration order."""
        return list(self._branches)

    @cached_property
    def _branches(self) -> list[Branch]:
        return [] if self.how == "registration order" else find_branches(self._graph)

    def _around(self, layer: str) -> tuple[Graph, tuple[int, ...]]:
        """Return a graph that knows the layer, and its calls there.

        A part that was not used (an auxiliary head in evaluation) is judged by registration order
        within itself; its last layer has no one behind it.
        """
        calls = self._graph.calls.get(layer, ())
        if calls:
            return self._graph, calls
        if self._other is not None and layer in self._other.calls:
            return self._other, self._other.calls[layer]
        graph = self._part(layer)
        return graph, graph.calls.get(layer, ())

    def _part(self, layer: str) -> Graph:
        """Return the registration order of the largest module around a layer that was not used."""
        words = layer.split(".")
        for length in range(len(words)):
            part = ".".join(words[:length])
            if not any(_is_inside(name, part) for name in self._graph.calls):
                nodes = [
                    node
                    for node in self._registered.nodes
                    if node.module is not None and _is_inside(node.module, part)
                ]
                return _chain(nodes)
        return self._registered


def _other_mode(model: nn.Module, graph: Graph, given: int | None) -> Graph | None:
    """Trace in the other mode too, if this one leaves a layer or norm out."""
    if all(name in graph.calls for node in _registered(model).nodes for name in node.layers):
        return None
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = not modes[0][1]
        return trace_symbols(model, given)
    except Exception:  # the model's own code runs; this mode need not trace
        return None
    finally:
        for module, mode in modes:
            module.training = mode


def _registered(model: nn.Module) -> Graph:
    """Return every leaf module in the order of registration, each feeding the next."""
    builder = Builder(model)
    for module in leaves(model):
        builder.call(module, ())
    return _chain(builder.graph().nodes)


def _chain(nodes: Iterable[Node]) -> Graph:
    linked = [
        replace(node, inputs=(index - 1,) if index else ()) for index, node in enumerate(nodes)
    ]
    return Graph(linked, [len(linked) - 1] if linked else [])


def _after(graph: Graph, start: int) -> set[int]:
    """Return the nodes that a node's output reaches."""
    found: set[int] = set()
    waiting = [start]
    while waiting:
        for user in graph.users[waiting.pop()]:
            if user not in found:
                found.add(user)
                waiting.append(user)
    return found


def _first_line(error: Exception) -> str:
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _is_inside(name: str, part: str) -> bool:
    return not part or name == part or name.startswith(f"{part}.")
