"""Groups: layers that are filled and handed over together, so that Python is paid once for many.

A group is one kernel call and one node of autograd. It is no larger than DDP's buckets: one node
over all layers would hold every gradient back until the end of the backward pass.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.nn.parallel import DistributedDataParallel

from filterwise.keeping.kept import same_version
from filterwise.keeping.nodes import HandOverTogether
from filterwise.kernel import Call

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor

    from filterwise.keeping.gathered import GatheringWeight
    from filterwise.keeping.keeper import Keeper
    from filterwise.keeping.kept import Made
    from filterwise.keeping.window import Window

__all__ = ["Group", "HandedOver", "grouped"]

LIMIT = 25 << 20
"""Bytes of effective weights in a group: the size of DDP's buckets."""


class HandedOver(NamedTuple):
    """A layer's effective weight as an output of its group's node."""

    kept: GatheringWeight
    made: Made
    written: int
    """The version of the kept weight's values."""
    learned: tuple[bool, ...]
    output: Tensor

    def serves(self, home: dict[str, Any], buffers: dict[str, Any]) -> bool:
        """Tell whether it still is what a layer with these parameters is to compute with."""
        kept, made, written, learned, _ = self
        if kept.made is not made or kept.spoiled or kept.values._version != written:
            return False
        rows = zip(kept.names, made.marks, learned, strict=True)
        for name, (tensor, version, address, strides), learns in rows:
            if home.get(name) is not tensor and buffers.get(name) is not tensor:
                return False
            if tensor._version != version or tensor.data_ptr() != address:
                return False
            if tensor.stride() != strides or tensor.requires_grad is not learns:
                return False
        return True


class Group:
    """Layers of one window with one kernel and device, in the model's order.

    Attributes:
        generation: The window's generation that it was filled for.
        members: The layers' kept weights.
    """

    def __init__(self, keepers: Sequence[Keeper], window: Window) -> None:
        """Write the kernel's call down; the keepers' weights are filled already."""
        self.generation = window.generation
        self._keepers = tuple(keepers)
        self.members = tuple(kept for keeper in keepers if (kept := keeper.gathering) is not None)
        self._own = tuple(keeper.own for keeper in keepers)
        self._places = [
            (tensor, tensor.data_ptr(), tensor.stride(), tensor.requires_grad)
            for kept in self.members
            for tensor in kept.tensors
        ]
        self._call = Call(
            [kept.layer for kept in self.members if kept.layer is not None],
            [kept.values for kept in self.members],
            self.members[0].how.kernel,
        )
        self._learned = [kept.learns() for kept in self.members]
        self._is_given_up = self._is_fresh = False

    def stands(self, window: Window) -> bool:
        """Tell whether it can be filled again: everything is where it was, nothing is gathered."""
        for keeper, kept, own in zip(self._keepers, self.members, self._own, strict=True):
            if keeper.gathering is not kept or keeper.own is not own:
                return False
            if kept.has_gathered or kept.goes_alone or keeper.window is not window:
                return False
        for tensor, address, strides, learned in self._places:
            if tensor.data_ptr() != address or tensor.stride() != strides:
                return False
            if tensor.requires_grad is not learned:
                return False
        return True

    def fill(self, window: Window) -> None:
        """Compute all effective weights anew, for a window that opens."""
        with torch.inference_mode(False), torch.no_grad(), same_version(self.members):
            saved = self._call.forward()
        for kept, statistics in zip(self.members, saved, strict=True):
            kept.enter(window)
            kept.seal_again(statistics)
        self.generation, self._is_given_up, self._is_fresh = window.generation, False, True

    def hand_over(self) -> bool:
        """Make the node, and give every keeper its output; False if layers must go one by one.

        They must where somebody waits for gradients of the raw weights: autograd calls hooks of a
        layer that the forward does not use with None, where no node of its own leads to it.
        """
        if self._is_given_up or _finds_unused():
            return False
        if self._are_hooked() or not self._is_ready():
            self._is_given_up = True
            return False
        outputs = HandOverTogether.apply(
            self.members, self._call, *[place[0] for place in self._places]
        )
        rows = zip(self._keepers, self.members, self._learned, outputs, strict=True)
        for keeper, kept, learned, output in rows:
            made = kept.made
            assert made is not None
            keeper.handed_over = HandedOver(kept, made, kept.values._version, learned, output)
        return True

    def _are_hooked(self) -> bool:
        """Tell whether anybody waits for gradients of what the weights are made from."""
        for tensor, _, _, _ in self._places:
            if tensor._backward_hooks or tensor._post_accumulate_grad_hooks:
                return any(kept.is_hooked for kept in self.members)
        return False

    def _is_ready(self) -> bool:
        """Tell whether all layers can be handed over as they are."""
        if self._is_fresh:  # filled a moment ago, by the forward that asks for it
            self._is_fresh = False
            return True
        for kept, learned in zip(self.members, self._learned, strict=True):
            if not kept.is_open or not kept.is_unchanged() or kept.learns() != learned:
                return False
            if kept.gathered() is not None:
                kept.refuse_if_changed()
                if kept.learned != learned:
                    return False
        return True

    def take_back(self) -> None:
        """Drop the outputs: the window has closed."""
        for keeper in self._keepers:
            keeper.handed_over = None


def _finds_unused() -> bool:
    """Tell whether DDP looks for parameters that the running forward has not used.

    It goes along the graph, where a group's node would lead to all parameters of the group.
    """
    wrapper = DistributedDataParallel._get_active_ddp_module()
    return wrapper is not None and (wrapper.find_unused_parameters or wrapper.static_graph)


def grouped(keepers: Iterable[Keeper], window: Window) -> list[Group]:
    """Return groups of those layers that can be in one."""
    chosen = [keeper for keeper in keepers if _can_be_grouped(keeper, window)]
    uses: dict[int, int] = {}
    for keeper in chosen:
        for tensor in keeper.own:
            uses[id(tensor)] = uses.get(id(tensor), 0) + 1
    bins: dict[Any, list[tuple[list[Keeper], int]]] = {}
    for keeper in chosen:
        kept = keeper.gathering
        if kept is None or any(uses[id(tensor)] > 1 for tensor in keeper.own):
            continue  # layers tied to one raw weight hand over to it one by one
        size = kept.values.numel() * kept.values.element_size()
        alike = bins.setdefault((kept.how.kernel, kept.values.device), [([], 0)])
        members, full = alike[-1]
        if members and full + size > LIMIT:
            alike.append(([keeper], size))
        else:
            members.append(keeper)
            alike[-1] = members, full + size
    return [Group(members, window) for alike in bins.values() for members, _ in alike if members]


def _can_be_grouped(keeper: Keeper, window: Window) -> bool:
    kept = keeper.gathering
    return (
        keeper.window is window
        and kept is not None
        and kept.layer is not None
        and not kept.goes_alone
        and kept.is_open
        and kept.tensors[0].requires_grad
        and kept.is_unchanged()
    )
