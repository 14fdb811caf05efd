"""One forward pass as a graph of calls, filled by any front end."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import is_lazy

from filterwise import host, norms
from filterwise.filters import is_weight_layer, weight_name

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

__all__ = ["Builder", "Graph", "Node", "is_divisible", "is_leaf", "leaves", "plain_name"]

SPELLINGS = {
    "iadd": "add",
    "radd": "add",
    "imul": "mul",
    "rmul": "mul",
    "multiply": "mul",
}
SAME_VALUES = {"clone", "contiguous"}
WEIGHT_OPERATIONS = {
    "conv1d",
    "conv2d",
    "conv3d",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
    "conv_tbc",
    "linear",
    "bilinear",
}
MATRIX_OPERATIONS = {
    "addmm",
    "baddbmm",
    "bmm",
    "einsum",
    "matmul",
    "mm",
    "multi_head_attention_forward",
    "mv",
}
NORM_OPERATIONS = {"batch_norm", "group_norm", "instance_norm", "layer_norm", "rms_norm"}
NO_FLOW = {
    "data",
    "detach",
    "dim",
    "element_size",
    "empty_like",
    "full_like",
    "get_device",
    "is_floating_point",
    "item",
    "ndimension",
    "nelement",
    "new",
    "new_empty",
    "new_full",
    "new_ones",
    "new_tensor",
    "new_zeros",
    "numel",
    "ones_like",
    "rand_like",
    "randn_like",
    "size",
    "stride",
    "tolist",
    "zeros_like",
}
"""Operations whose result carries no signal of their input, or carries it without a gradient."""


@dataclass(frozen=True)
class Node:
    """One call in a forward pass.

    Attributes:
        operation: Name of the function or of the module's class, in one spelling.
        inputs: Indices of the nodes whose output it takes, each once.
        module: Dotted name of the called module, the first one of a reused module.
        layers: Dotted names of the weight layers that run in this call.
        weight: Whether a weight is applied; true for a function that takes a weight, too.
        norm: Whether the called module is an activation norm.
        normalizes: Whether the call fixes the scale of what passes.
        in_place: Whether the call writes its result over an input.
    """

    operation: str
    inputs: tuple[int, ...] = ()
    module: str | None = None
    layers: tuple[str, ...] = ()
    weight: bool = False
    norm: bool = False
    normalizes: bool = False
    in_place: bool = False

    @property
    def same(self) -> bool:
        """Whether the output has the input's values, unchanged."""
        return self.operation in SAME_VALUES or self.operation == "Identity"


class Graph:
    """Calls in the order in which they ran; an input's index is smaller than its user's."""

    def __init__(self, nodes: Iterable[Node], outputs: Iterable[int]) -> None:
        """Keep the nodes and the indices of those that are outputs of the model."""
        self.nodes = tuple(nodes)
        self.outputs = frozenset(outputs)

    @cached_property
    def users(self) -> tuple[tuple[int, ...], ...]:
        """Indices of the nodes that take each node's output."""
        users: list[list[int]] = [[] for _ in self.nodes]
        for index, node in enumerate(self.nodes):
            for source in node.inputs:
                users[source].append(index)
        return tuple(tuple(found) for found in users)

    @cached_property
    def calls(self) -> dict[str, tuple[int, ...]]:
        """Indices of the calls of each module, and of each weight layer that runs in one."""
        calls: dict[str, list[int]] = {}
        for index, node in enumerate(self.nodes):
            names = dict.fromkeys(node.layers)
            if node.module is not None:
                names[node.module] = None
            for name in names:
                calls.setdefault(name, []).append(index)
        return {name: tuple(found) for name, found in calls.items()}


def is_leaf(module: nn.Module) -> bool:
    """Tell whether a call of this module is one node of the graph.

    Every module without children is, norms (some fuse an activation) and converted layers are, and
    those of torch's own modules that are no containers (attention, layers with a parametrization).
    """
    if next(module.children(), None) is None:
        return True
    containers = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
    torch_own = type(module).__module__.startswith("torch.nn") and not isinstance(
        module, containers
    )
    return torch_own or host.is_converted(module) or norms.normalizes(module)


def leaves(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules whose calls are nodes, in the order of registration, each once.

    The model itself is looked into where it has children, even if it is one of torch's own.
    """
    seen: set[nn.Module] = set()

    def walk(module: nn.Module) -> Iterator[nn.Module]:
        if module in seen:
            return
        seen.add(module)
        if is_leaf(module) and (module is not model or not is_divisible(module)):
            yield module
            return
        for child in module.children():
            yield from walk(child)

    return walk(model)


def is_divisible(module: nn.Module) -> bool:
    """Tell whether a module has children, and is more than one layer with something in it."""
    single = (
        weight_name(module) is not None or host.is_converted(module) or norms.normalizes(module)
    )
    return not single and next(module.children(), None) is not None


def plain_name(operation: str) -> str:
    """Return one spelling for a function, its method, its in-place and its operator form."""
    name = operation.strip("_")
    return SPELLINGS.get(name, name)


class Builder:
    """Collects the nodes of one forward pass.

    Attributes:
        names: The first dotted name of every module.
    """

    def __init__(self, model: nn.Module) -> None:
        """Start an empty graph of a model."""
        self.names = {module: name for name, module in model.named_modules()}
        self.owners = {
            parameter: name
            for module, name in self.names.items()
            for parameter in module.parameters(recurse=False)
            if not is_lazy(parameter) and parameter.dim() >= 2
        }
        self._nodes: list[Node] = []
        self._outputs: list[int] = []

    def input(self) -> int:
        """Add an input of the model."""
        return self._append(Node("input"))

    def call(self, module: nn.Module, inputs: Iterable[int]) -> int:
        """Add the call of a leaf module."""
        prefix = self.names[module]
        # A layer with a parametrization inside is one layer; attention is several.
        parts = [module] if weight_name(module) else module.modules()
        layers = tuple(self.names[part] for part in parts if _is_weight_layer(part))
        norm = norms.is_norm(module)
        node = Node(
            host.base_class(module).__name__,
            tuple(dict.fromkeys(inputs)),
            prefix,
            () if norm else layers,
            bool(layers) and not norm,
            norm,
            norms.normalizes(module),
            any(getattr(part, "inplace", False) is True for part in module.modules()),
        )
        return self._append(node)

    def operate(
        self,
        operation: str,
        inputs: Iterable[int],
        parameters: Iterable[nn.Parameter] = (),
        *,
        foreign: bool = False,
        in_place: bool = False,
    ) -> int | None:
        """Add the call of a function.

        Args:
            operation: The function's name.
            inputs: Nodes whose output it takes.
            parameters: Parameters that it takes.
            foreign: Whether it is none of torch's, so that it may do anything with a parameter.
            in_place: Whether it writes its result over an input.

        Returns:
            Its index; None where its result carries no signal from the model's input.
        """
        name = plain_name(operation)
        inputs = tuple(dict.fromkeys(inputs))
        if name in NO_FLOW or not inputs:
            return None
        layers = tuple(dict.fromkeys(self.owners[p] for p in parameters if p in self.owners))
        weight = name in WEIGHT_OPERATIONS or (
            bool(layers) and (foreign or name in MATRIX_OPERATIONS)
        )
        node = Node(
            name,
            inputs,
            layers=layers if weight else (),
            weight=weight,
            normalizes=name in NORM_OPERATIONS,
            in_place=in_place,
        )
        return self._append(node)

    def output(self, index: int) -> None:
        """Mark a node as an output of the model."""
        self._outputs.append(index)

    def graph(self) -> Graph:
        """Return what was collected."""
        return Graph(self._nodes, self._outputs)

    def _append(self, node: Node) -> int:
        self._nodes.append(node)
        return len(self._nodes) - 1


def _is_weight_layer(module: nn.Module) -> bool:
    return isinstance(module, LazyModuleMixin) or is_weight_layer(module)
