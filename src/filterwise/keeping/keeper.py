"""A layer's keeper: what its next forward computes with, and whether that is kept."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from filterwise.keeping.gathered import GatheringWeight
from filterwise.keeping.kept import KeptWeight, are_shared, can_keep, fill
from filterwise.keeping.nodes import HandOver
from filterwise.keeping.window import Steps, hand_over, watch_steps
from filterwise.kernel.function import is_watched

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from filterwise.keeping.group import HandedOver
    from filterwise.keeping.kept import Computation, Mark
    from filterwise.keeping.window import Mode, Window

__all__ = ["Keeper"]


class Unmoved(NamedTuple):
    """A weight kept in evaluation on the CPU, and the marks of all that it depends on."""

    names: tuple[str, ...]
    marks: tuple[Mark, ...]
    values: Tensor
    written: int
    steps: int


class Keeper:
    """What one layer keeps: in evaluation between forwards, and in a window of `defer`.

    Attributes:
        how: The method, the filters' layout and the kernel.
        names: Names in the layer of the tensors that its effective weight is computed from.
        label: The layer's dotted name, for messages.
        own: The layer's tensors when a window was last entered. Other ones belong to a
            `functional_call` and take the ordinary way.
        gathering: What the window's micro-batches compute with.
        handed_over: The output of its group's node that its forwards use until the window closes.
    """

    def __init__(self, how: Computation, names: tuple[str, ...]) -> None:
        """Keep nothing yet."""
        self.how = how
        self.names = names
        self.label = "a layer"
        self.own: tuple[Tensor, ...] = ()
        self.gathering: GatheringWeight | None = None
        self.handed_over: HandedOver | None = None
        self._window: weakref.ref[Window] | None = None
        self._leaf: Tensor | None = None
        self._unmoved: Unmoved | None = None
        self._resting: tuple[KeptWeight, tuple[object, ...]] | None = None

    def _is_own(self, tensors: Sequence[Tensor]) -> bool:
        own = self.own
        if len(own) != len(tensors):
            return False
        for one, tensor in zip(own, tensors, strict=True):  # noqa: SIM110 (twice as fast)
            if one is not tensor:
                return False
        return True

    @property
    def window(self) -> Window | None:
        """The window of the innermost `defer` that the layer is or was in."""
        return None if self._window is None else self._window()

    def enter(self, window: Window | None) -> None:
        """Be in a window from now on; it holds its layers, so they must not hold it."""
        self._window = None if window is None else weakref.ref(window)

    @property
    def mode(self) -> Mode:
        """What a forward with gradient does: as ever, gather, or hand over."""
        window = None if self._window is None else self._window()
        return "ordinary" if window is None else window.mode

    def belong_to(self, tensors: tuple[Tensor, ...]) -> None:
        """Note which tensors are the layer's own."""
        if not self._is_own(tensors):
            self.own = tensors

    def replace(self, tensors: Sequence[Tensor]) -> None:
        """Note that the layer may have other tensors for good: loaded by assignment, moved."""
        if self.own and not self._is_own(tensors):
            self.own = tuple(tensors)
            if self.gathering is not None:
                self.gathering.spoiled = True

    def forget(self, *, buffers: bool = True) -> None:
        """Drop what is kept for evaluation, and the buffers of a window unless one is open."""
        self._resting = self._unmoved = None
        kept = self.gathering
        if buffers and kept is not None and not kept.is_open and kept.gathered() is None:
            self.gathering = self._leaf = self.handed_over = None

    def release(self) -> None:
        """Hand over what was gathered, before the layer is taken back."""
        if self.gathering is not None:
            hand_over([self.gathering])

    def at_rest(self, tensors: Sequence[Tensor], dtype: torch.dtype | None = None) -> Tensor | None:
        """Return the weight kept in evaluation, computed anew where it is stale.

        None where it must not be kept, since another process may write into what it is made from.
        """
        weight, resting = tensors[0], self._resting
        dtype = dtype or weight.dtype
        # What one stream of a GPU computes another may not read without waiting for it.
        moment = (Steps.count, dtype, _stream(weight.device))
        if resting is not None and resting[1] == moment and resting[0].serves(tensors):
            return resting[0].values
        if are_shared(tensors):
            self._resting = self._unmoved = None
            return None
        watch_steps()
        kept = KeptWeight(self.how, tensors, dtype)
        fill([kept])
        # Put in place whole: another thread may be evaluating the same layer.
        self._resting = (kept, moment)
        made = kept.made
        parameters = made is not None and len(made.marks) == len(self.names)
        if made is not None and parameters and weight.is_cpu and dtype == weight.dtype:
            self._unmoved = Unmoved(
                self.names, made.marks, kept.values, kept.values._version, Steps.count
            )
        return kept.values

    def unmoved(self, parameters: dict[str, Any]) -> Tensor | None:
        """Return the weight kept in evaluation if nothing at all has moved; None: look closer.

        Between the convolutions of a large model all of this is out of the processor's cache, where
        every object that is looked at costs ten times what it costs alone.

        Args:
            parameters: The layer's own.
        """
        known = self._unmoved
        if known is None or self.gathering is not None:
            return None
        names, marks, values, written, steps = known
        for name, (tensor, version, address, strides) in zip(names, marks, strict=True):
            if parameters.get(name) is not tensor or tensor._version != version:
                return None
            if tensor.data_ptr() != address or tensor.stride() != strides:
                return None
        if values._version != written or Steps.count != steps:
            return None
        return None if is_watched() else values

    def without_gradient(self, tensors: Sequence[Tensor]) -> Tensor | None:
        """Return the window's weight for a forward without gradient; None where it has none."""
        kept = self.gathering
        if (kept is None and self.mode == "ordinary") or not self._is_own(tensors) or is_watched():
            return None
        if kept is None or not kept.is_open or not kept.is_unchanged():
            if self.mode == "ordinary" or (kept is not None and kept.gathered() is not None):
                return None
            kept = self._filled()
        elif self.mode != "defer" and torch._C._current_graph_task_id() != -1:
            self._close_with_the_outer_backward(kept)
        return None if kept is None else kept.values.to(tensors[0].dtype)

    def handed(self, parameters: dict[str, Any], buffers: dict[str, Any]) -> Tensor | None:
        """Return the output of the group's node if nothing at all has moved; None: look closer."""
        handed = self.handed_over
        if handed is None or self.mode == "defer" or torch._C._current_graph_task_id() != -1:
            return None
        serves = handed.serves(parameters, buffers) and not is_watched()
        return handed.output if serves else None

    def with_gradient(self, tensors: Sequence[Tensor]) -> Tensor | None:
        """Return what a forward with gradient computes with; None asks for the ordinary way.

        Raises:
            DeferralError: If gradients were gathered on a weight that has changed since.
        """
        kept, mode = self.gathering, self.mode
        repeats = torch._C._current_graph_task_id() != -1
        if (kept is None and mode == "ordinary") or not self._is_own(tensors) or is_watched():
            return None
        if kept is not None and kept.gathered() is not None:
            kept.refuse_if_changed()
            if tensors[0].requires_grad and kept.learns() != kept.learned:
                # A gain thawed since has no part in the sum so far, nor one frozen in what comes.
                hand_over([kept])
        elif kept is None or not kept.is_open or not kept.is_unchanged():
            if mode == "ordinary":
                return self._recomputed(kept, tensors)
            kept = self._filled()
            if kept is None:
                return None
        weight = tensors[0]
        if not weight.requires_grad:
            learns = any(tensor.requires_grad for tensor in tensors)
            return None if learns else kept.values.to(weight.dtype)
        if mode == "defer":
            return self._on_leaf(weight)
        if repeats:
            self._close_with_the_outer_backward(kept)
        else:
            window = kept.window
            group = None if window is None else window.group_of(kept)
            if group is not None and group.hand_over() and self.handed_over is not None:
                return self.handed_over.output
        return HandOver.apply(kept, *tensors)

    def _recomputed(self, kept: GatheringWeight | None, tensors: Sequence[Tensor]) -> Tensor | None:
        """Serve a checkpoint that repeats a forward of a window that has closed meanwhile."""
        if kept is None:
            return None
        if torch._C._current_graph_task_id() == -1:
            kept.retired = True
        if kept.retired or not kept.is_unchanged() or not tensors[0].requires_grad:
            return None
        return HandOver.apply(kept, *tensors)

    def _close_with_the_outer_backward(self, kept: GatheringWeight) -> None:
        """Let a forward that is repeated inside a backward not end the window with its own."""
        window = kept.window
        if window is not None and kept.is_open:
            window.close_after_backward()

    def _filled(self) -> GatheringWeight | None:
        window = self.window
        if window is None:
            return None
        window.fill()
        kept = self.gathering
        return kept if kept is not None and kept.is_open and kept.is_unchanged() else None

    def _on_leaf(self, weight: Tensor) -> Tensor:
        leaf = self._leaf
        assert leaf is not None
        if leaf.dtype != weight.dtype:
            return leaf.to(weight.dtype)
        # Autocast keeps its casts of leaves while it lasts, longer than a window may.
        if torch.is_autocast_enabled(leaf.device.type):
            return leaf.view_as(leaf)
        return leaf

    def prepare(self, window: Window) -> GatheringWeight | None:
        """Return what is to be filled for a window, or None if nothing needs to be."""
        kept, tensors = self.gathering, self.own
        if kept is not None:
            if kept.gathered() is not None or (kept.is_open and kept.serves(tensors)):
                return None
            weight = tensors[0]
            same = kept.values.shape == weight.shape and kept.values.device == weight.device
            if not same or kept.values.dtype != torch.promote_types(weight.dtype, torch.float32):
                kept = self.gathering = self._leaf = None
        if not can_keep(tensors) or are_shared(tensors):
            return None
        if not tensors[0].requires_grad and any(one.requires_grad for one in tensors):
            return None
        if kept is None:
            kept = self.gathering = GatheringWeight(self.how, tensors, self.names)
            self._leaf = kept.make_leaf()
        kept.label = self.label
        kept.take_from(tensors)
        kept.enter(window)
        return kept


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
