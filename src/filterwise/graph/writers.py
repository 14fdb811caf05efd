"""What writes over the input of a norm that is removed.

A norm makes a new tensor, and whatever follows it may work in place. Without the norm it would work
on the norm's own input, which a shortcut may still read, or autograd.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Collection

    from torch import nn

    from filterwise.graph.flow import Flow
    from filterwise.graph.nodes import Graph, Node

__all__ = ["out_of_place", "writers"]

NEW_TENSORS = {"add", "cat", "clone", "concat", "concatenate", "stack", "sub"}
"""Operations whose result is new, and not needed for their own gradient."""

HANDING_ON = {
    "chunk",
    "expand",
    "flatten",
    "getitem",
    "movedim",
    "narrow",
    "permute",
    "reshape",
    "select",
    "split",
    "squeeze",
    "swapaxes",
    "transpose",
    "unbind",
    "unflatten",
    "unsqueeze",
    "view",
    "view_as",
}
"""Operations, in small letters, whose result may share its memory with their input."""


def out_of_place(
    model: nn.Module, flow: Flow, norm: str, removed: Collection[str]
) -> tuple[list[Any], str]:
    """Find the activations that must not work in place once a norm is removed.

    Args:
        model: The model.
        flow: What follows what in it.
        norm: Name of the norm.
        removed: Names of all norms that are removed.

    Returns:
        Modules whose ``inplace`` is to be switched off (all of the model, where it is not known
        what follows the norm), and what to say of it.

    Raises:
        ValueError: If a function works in place, which cannot be switched off.
    """
    found = flow.writers(norm, removed)
    if found is None:
        return [module for module in model.modules() if _works_in_place(module)], ""
    names = [node.module for node in found if node.module is not None]
    if len(names) < len(found):
        operation = next(node.operation for node in found if node.module is None)
        raise ValueError(
            f"cannot be removed: others read its input, which {operation} in the model's code would"
            f' then write over; leave it out with exclude="{norm}"'
        )
    parts = [part for name in names for part in model.get_submodule(name).modules()]
    activations = [part for part in parts if _works_in_place(part)]
    if not activations:
        return [], ""
    shown = ["its activation" if name == norm else name for name in dict.fromkeys(names)]
    return activations, f"others read its input, so {', '.join(shown)} works in place no longer"


def _works_in_place(module: nn.Module) -> bool:
    return getattr(module, "inplace", False) is True


def writers(graph: Graph, norm: str, removed: Collection[str]) -> list[Node]:
    """Return the calls that would write over a norm's input, and must not.

    Args:
        graph: A forward pass.
        norm: Name of the norm that is removed.
        removed: Names of all norms that are.
    """
    found: dict[Node, None] = {}
    for call in graph.calls[norm]:
        if _is_free(graph, call, removed):
            continue
        if graph.nodes[call].in_place:
            found[graph.nodes[call]] = None  # an activation that is fused into the norm
            continue
        waiting, seen = [call], {call}
        while waiting:
            for user in graph.users[waiting.pop()]:
                node = graph.nodes[user]
                if node.in_place:
                    found[node] = None
                if user not in seen and _hands_on(node, removed):
                    seen.add(user)
                    waiting.append(user)
    return list(found)


def _is_free(graph: Graph, call: int, removed: Collection[str]) -> bool:
    """Tell whether the input of a norm is a new tensor that the norm alone reads."""
    source = call
    while True:
        if len(graph.nodes[source].inputs) != 1:
            return False
        source = graph.nodes[source].inputs[0]
        node = graph.nodes[source]
        if source in graph.outputs or len(graph.users[source]) != 1:
            return False
        if node.weight or node.operation in NEW_TENSORS:
            return not node.in_place
        if not node.same and node.module not in removed:
            return False


def _hands_on(node: Node, removed: Collection[str]) -> bool:
    name = node.operation.lower()
    return (
        node.same
        or name in HANDING_ON
        or name.startswith(("dropout", "droppath", "drop_path"))
        or node.module in removed
    )
