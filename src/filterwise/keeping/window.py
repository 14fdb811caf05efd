"""The window of one optimizer step: which layers gather, and when they hand over.

A window opens with the first forward inside `defer`. It closes at the end of the first backward
outside, or on leaving ``defer(model, enabled=False)``: what no layer has picked up by then is
handed over, through autograd, so that hooks on the raw parameters fire.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from filterwise.errors import DeferralError
from filterwise.keeping.group import grouped
from filterwise.keeping.kept import fill, pull_back

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable

    from torch import Tensor

    from filterwise.keeping.gathered import GatheringWeight
    from filterwise.keeping.group import Group
    from filterwise.keeping.keeper import Keeper

__all__ = [
    "Entry",
    "Mode",
    "Steps",
    "Window",
    "hand_over",
    "refuse_unfinished",
    "watch_steps",
]

Mode = Literal["ordinary", "defer", "hand over"]
Entry = tuple[Mode, list[tuple["Keeper", "Window | None"]]]
"""What leaving a window puts back: its mode, and the layers that were in another one."""


class Window:
    """The micro-batches of one optimizer step of one model.

    Attributes:
        opened: All windows that are open.
        filled: Those whose effective weights no step has made stale since they were computed.
        members: The layers of the model that take part.
        mode: What a forward with gradient of a layer that is in it does.
        generation: Grows whenever the window closes; a kept weight of another one has served.
        at_end: What is to be done once when the window closes.
    """

    opened: ClassVar[weakref.WeakSet[Window]] = weakref.WeakSet()
    filled: ClassVar[weakref.WeakSet[Window]] = weakref.WeakSet()

    def __init__(self) -> None:
        """Start closed, without members."""
        self.members: list[Keeper] = []
        self.mode: Mode = "ordinary"
        self.generation = 0
        self.at_end: list[Callable[[], object]] = []
        self._gathering: dict[GatheringWeight, None] = {}
        self._groups: list[Group] = []
        self._alone: list[Keeper] = []
        self._group_of: dict[GatheringWeight, Group] = {}
        self._task: int | None = None
        self._has_all = False

    def take(self, members: list[Keeper]) -> None:
        """Have these layers as members from now on."""
        if list(map(id, members)) != list(map(id, self.members)):
            self.members, self._has_all = members, False
            self._groups, self._alone, self._group_of = [], [], {}

    def enter(self, mode: Mode) -> Entry:
        """Take the layers in, from other windows where they are in one, and set the mode."""
        elsewhere: list[tuple[Keeper, Window | None]] = []
        for keeper in () if self._has_all else self.members:
            former = keeper.window
            if former is not self:
                keeper.enter(self)
            if former is not None and former is not self:
                former._has_all = False
                if former.mode != "ordinary":
                    elsewhere.append((keeper, former))
        before, self.mode, self._has_all = self.mode, mode, True
        return before, elsewhere

    def leave(self, entry: Entry) -> None:
        """Put back what `enter` found."""
        self.mode, elsewhere = entry
        for keeper, former in elsewhere:
            keeper.enter(former)
            self._has_all = False

    def fill(self) -> None:
        """Compute the effective weights of all members that need it, in one call."""
        Window.opened.add(self)
        Window.filled.add(self)
        opens = all(group.generation != self.generation for group in self._groups)
        if self._groups and opens and all(group.stands(self) for group in self._groups):
            for group in self._groups:
                group.fill(self)
            self._fill_one_by_one(self._alone)
            return
        self._fill_one_by_one(self.members)
        self._groups = grouped(self.members, self)
        self._group_of = {kept: group for group in self._groups for kept in group.members}
        self._alone = [one for one in self.members if one.gathering not in self._group_of]

    def _fill_one_by_one(self, keepers: Iterable[Keeper]) -> None:
        stale = [keeper.prepare(self) for keeper in keepers if keeper.window is self]
        fill([kept for kept in stale if kept is not None])

    def group_of(self, kept: GatheringWeight) -> Group | None:
        """Return the group that a kept weight is handed over with; None if it goes alone."""
        return self._group_of.get(kept)

    def join(self, kept: GatheringWeight) -> None:
        """Take in a layer that has begun to gather."""
        Window.opened.add(self)
        self._gathering[kept] = None

    @property
    def gathering(self) -> tuple[GatheringWeight, ...]:
        """What has gathered a gradient that was not handed over or dropped."""
        # Backward passes come from behind; told in the order of the model.
        return tuple(kept for kept in reversed(self._gathering) if kept.gathered() is not None)

    def end_if_dropped(self) -> None:
        """Start anew if `zero_grad` has dropped all that was gathered."""
        for kept in self._gathering:
            if kept.gathered() is not None:
                return
        if self._gathering:
            self.end()

    def end(self) -> tuple[GatheringWeight, ...]:
        """End the window; return what has gathered and is the caller's to hand over or drop."""
        left, self._gathering = self.gathering, {}
        self.generation += 1
        Window.opened.discard(self)
        for group in self._groups:
            group.take_back()
        at_end, self.at_end = self.at_end, []
        for done in at_end:
            done()
        return left

    def close(self, others: Iterable[GatheringWeight] = ()) -> None:
        """End the window and hand over what no backward has picked up.

        Args:
            others: What gathered in other windows and is to be handed over as well.
        """
        self._task = None
        hand_over(dict.fromkeys((*self.end(), *others)))

    def close_after_backward(self) -> None:
        """Close when the backward that is running ends."""
        task = torch._C._current_graph_task_id()
        if task != self._task:
            self._task = task
            engine: Any = torch.autograd.Variable._execution_engine  # pyright: ignore[reportAttributeAccessIssue]
            engine.queue_callback(self.close)


def hand_over(left: Iterable[GatheringWeight]) -> None:
    """Bring gathered gradients to the raw parameters without another backward's help.

    Raises:
        DeferralError: If a weight is not what it was; nothing is handed over then.
    """
    left = [kept for kept in left if kept.gathered() is not None]
    if not left:
        return
    for kept in left:
        try:
            kept.refuse_if_changed()
        except DeferralError:
            for other in left:
                other.drop()
            raise
    with torch.inference_mode(False), torch.no_grad():
        work = [
            (kept.made, gathered)
            for kept in left
            if kept.made is not None and (gathered := kept.take()) is not None
        ]
        found = pull_back(work, in_place=True)
        leaves: list[Tensor] = []
        gradients: list[Tensor] = []
        for kept, of_layer in zip(left, found, strict=True):
            for tensor, gradient, learned in zip(kept.tensors, of_layer, kept.learned, strict=True):
                if gradient is None or not learned:
                    continue
                if tensor.requires_grad:
                    leaves.append(tensor)
                    gradients.append(gradient)
                else:  # frozen since; what it gathered is its own still
                    tensor.grad = gradient if tensor.grad is None else tensor.grad.add_(gradient)
        if leaves:
            torch.autograd.backward(leaves, gradients)


class Steps:
    """How many steps any torch optimizer has made: fused ones move no version counter."""

    count = 0
    watched = False


def watch_steps() -> None:
    """Count the steps of every torch optimizer from now on, and guard sums against them."""
    if not Steps.watched:
        Steps.watched = True
        register_optimizer_step_pre_hook(_before_step)
        register_optimizer_step_post_hook(_after_step)


def _owned(optimizer: torch.optim.Optimizer) -> set[int]:
    return {id(p) for group in optimizer.param_groups for p in group["params"]}


def _before_step(
    optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Guard a step, or the end of its closure: that may be the backward that hands over."""
    if len(args) > 1 and callable(args[1]):
        return (args[0], _guarded(optimizer, args[1]), *args[2:]), kwargs
    if callable(kwargs.get("closure")):
        return args, {**kwargs, "closure": _guarded(optimizer, kwargs["closure"])}
    _refuse_unfinished_step(optimizer)
    return None


def _guarded(optimizer: torch.optim.Optimizer, closure: Callable[[], Any]) -> Callable[[], Any]:
    def run() -> Any:
        loss = closure()
        _refuse_unfinished_step(optimizer)
        return loss

    return run


def _refuse_unfinished_step(optimizer: torch.optim.Optimizer) -> None:
    if Window.opened:
        refuse_unfinished(_owned(optimizer), "an optimizer step")


def refuse_unfinished(owned: Collection[int], what: str) -> None:
    """Refuse what needs whole gradients while some of them are still gathered.

    Args:
        owned: Ids of the parameters that it concerns.
        what: What it is, for the message.

    Raises:
        DeferralError: If a window that gathers for one of them is open.
    """
    for window in list(Window.opened):
        for kept in window.gathering:
            if any(id(tensor) in owned for tensor in kept.tensors):
                raise DeferralError(
                    f"{what} while {kept.label} holds the gathered gradient of"
                    f" {kept.backwards} micro-batches: every micro-batch since the last step was"
                    " deferred. Run the last one outside defer(model), or close the window with"
                    " `with defer(model, enabled=False): pass` before clipping (under DDP only the"
                    " former is reduced over processes). No parameter has moved."
                )


def _after_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    Steps.count += 1
    if not Window.filled:
        return
    owned = _owned(optimizer)
    for window in list(Window.filled):
        fresh = False
        for kept in {keeper.gathering: None for keeper in window.members}:
            if kept is None or kept.spoiled:
                continue
            if any(id(tensor) in owned for tensor in kept.tensors):
                kept.spoiled = True
            else:
                fresh = True
        if not fresh:
            Window.filled.discard(window)
