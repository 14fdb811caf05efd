"""Residual branches: the weight layers between a split and the addition that joins it again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from filterwise.graph.nodes import Graph

__all__ = ["Branch", "find_branches"]

ROOT = -1
SHORT = 3
"""Weight layers up to which a branch beside a projection is one without looking at names."""


@dataclass(frozen=True)
class Branch:
    """A residual branch.

    Attributes:
        layers: Dotted names of its weight layers in forward order. A projection on the shortcut
            is not among them, nor are gates that the branch is multiplied by, nor layers of a
            branch inside this one.
    """

    layers: tuple[str, ...]


@dataclass(frozen=True)
class _Side:
    """What leads from a split to one side of an addition."""

    nodes: frozenset[int]
    layers: tuple[str, ...]
    is_open: bool
    """Whether a way without a weight leads through it: a shortcut, pooled or padded maybe."""


def find_branches(graph: Graph) -> list[Branch]:
    """Return the residual branches of a forward pass, in forward order."""
    dominators = _dominators(graph)
    found: list[tuple[int, frozenset[int], tuple[str, ...]]] = []
    for index, node in enumerate(graph.nodes):
        if node.operation != "add" or len(node.inputs) != 2:
            continue
        sides = [_side(graph, dominators, dominators[index], start) for start in node.inputs]
        side = _residual(sides, graph)
        if side is not None:
            found.append((index, side.nodes, side.layers))
    # A layer belongs to the innermost branch around it.
    taken: set[str] = set()
    branches: dict[int, Branch] = {}
    for index, _, layers in sorted(found, key=lambda item: len(item[1])):
        own = tuple(layer for layer in layers if layer not in taken)
        taken.update(own)
        if own:
            branches[index] = Branch(own)
    return [branches[index] for index in sorted(branches)]


def _dominators(graph: Graph) -> list[int]:
    """Return, for each node, the last node that every way to it passes (Cooper et al. 2001)."""
    nearest: list[int] = []
    for node in graph.nodes:
        meeting = node.inputs[0] if node.inputs else ROOT
        for other in node.inputs[1:]:
            one = other
            while one != meeting:
                if one > meeting:
                    one = nearest[one]
                else:
                    meeting = nearest[meeting]
        nearest.append(meeting)
    return nearest


def _side(graph: Graph, dominators: list[int], split: int, start: int) -> _Side:
    nodes = _back(graph, split, start)
    main = _back(graph, split, start, dominators)
    layers = [name for index in sorted(main) for name in graph.nodes[index].layers]
    free = {index for index in nodes if not graph.nodes[index].weight}
    is_open = start == split or any(
        source == split
        for index in _back(graph, split, start, within=free)
        for source in (graph.nodes[index].inputs or (ROOT,))
    )
    return _Side(frozenset(nodes), tuple(dict.fromkeys(layers)), is_open)


def _back(
    graph: Graph,
    split: int,
    start: int,
    dominators: list[int] | None = None,
    within: set[int] | None = None,
) -> set[int]:
    """Return the nodes from which `start` is reached, it included, as far back as the split.

    With dominators given, a product of a signal and a gate made from that signal is passed on the
    signal's side alone.
    """
    found: set[int] = set()
    waiting = [start]
    while waiting:
        index = waiting.pop()
        if index == split or index in found or (within is not None and index not in within):
            continue
        found.add(index)
        inputs = graph.nodes[index].inputs
        if dominators is not None and graph.nodes[index].operation == "mul":
            signal = dominators[index]
            inputs = (signal,) if signal in inputs else inputs
        waiting.extend(inputs)
    return found


def _residual(sides: list[_Side], graph: Graph) -> _Side | None:
    """Return the side that is a residual branch, if the addition closes one."""
    short, long = sorted(sides, key=lambda side: (not side.is_open, len(side.layers)))
    if short.is_open:
        return long if long.layers and not long.is_open else None
    if len(short.layers) != 1 or len(long.layers) < 2:
        return None
    # A projection, unless it is a lateral connection around a part of the network.
    additions = sum(graph.nodes[index].operation == "add" for index in long.nodes)
    is_short = additions == 0 and len(long.layers) <= SHORT
    return long if is_short or _share_a_block(short, long, graph) else None


def _share_a_block(short: _Side, long: _Side, graph: Graph) -> bool:
    """Tell whether the module that holds both sides holds no other weight layer."""
    nodes = [graph.nodes[index] for index in short.nodes | long.nodes]
    inside = {name for node in nodes for name in node.layers}
    parts = [name.split(".")[:-1] for name in inside]
    block: list[str] = []
    for words in zip(*parts, strict=False):
        if len(set(words)) > 1:
            break
        block.append(words[0])
    every = {name for node in graph.nodes for name in node.layers}
    return all(name in inside for name in every if name.split(".")[: len(block)] == block)
