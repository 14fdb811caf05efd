"""Nodes of autograd that hand over: a kept weight as a function of raw weight and gain.

Their backward takes the gathered gradient along. The tensors lie on the nodes themselves:
`save_for_backward` would hand out detached copies under checkpointing, and count as saved tensors
there, which a repeated forward must equal.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from filterwise.keeping.gathered import adds_up
from filterwise.keeping.kept import changed, differentiate, pull_back

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from filterwise.keeping.gathered import GatheringWeight
    from filterwise.keeping.kept import Made
    from filterwise.kernel import Call

    Found = tuple[Tensor | None, ...]

__all__ = ["HandOver", "HandOverTogether"]


class HandOver(torch.autograd.Function):
    """One layer's kept weight."""

    @staticmethod
    def forward(ctx: Any, kept: GatheringWeight, *tensors: Tensor) -> Tensor:
        """Return the kept weight in the raw weight's dtype."""
        del tensors
        ctx.kept, ctx.made = kept, kept.made
        ctx.repeated = torch._C._current_graph_task_id() != -1
        return kept.as_output()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Found:
        """Return gradients of what the effective weight was made from."""
        adds = all(node is None or adds_up(node) for node, _ in ctx.next_functions)
        part = _Part(ctx.kept, ctx.made, gradients[0], adds)
        part.refuse_if_stale()
        if adds and not ctx.repeated:
            part.close_after_backward()
        return None, *part.go_back()


class HandOverTogether(torch.autograd.Function):
    """The kept weights of many layers, in one kernel call."""

    @staticmethod
    def forward(
        ctx: Any, many: Sequence[GatheringWeight], call: Call, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        """Return the kept weights in the raw weights' dtypes.

        Args:
            ctx: The node.
            many: The layers' kept weights; no forward is being repeated for a checkpoint.
            call: The kernel's call that fills all of them.
            tensors: What they were made from, layer by layer.
        """
        del tensors
        ctx.set_materialize_grads(False)
        ctx.many, ctx.call = many, call
        ctx.made = [kept.made for kept in many]
        return tuple([kept.as_output() for kept in many])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Found:
        """Return gradients of what the effective weights were made from; None where unused."""
        nodes = [node for node, _ in ctx.next_functions]
        parts: list[_Part] = []
        begin = 0
        for kept, made, gradient in zip(ctx.many, ctx.made, gradients, strict=True):
            end = begin + len(made.tensors)
            if gradient is None:
                kept.goes_alone = True  # next time hooks on its raw weight are not called at all
            else:
                if kept.spoiled or changed(made.marks) is not None:
                    raise kept.refusal()
                adds = all(node is None or adds_up(node) for node in nodes[begin:end])
                parts.append(_Part(kept, made, gradient, adds))
            begin = end
        adding = [part for part in parts if part.adds]
        if adding:
            adding[0].close_after_backward()
        found = _go_back(parts, ctx.call if len(parts) == len(ctx.made) else None)
        done: list[Tensor | None] = [None, None]
        if len(parts) == len(ctx.made):
            for of_layer in found:
                done += of_layer
            return tuple(done)
        rest = iter(found)
        for made, gradient in zip(ctx.made, gradients, strict=True):
            done += [None] * len(made.tensors) if gradient is None else next(rest)
        return tuple(done)


class _Part(NamedTuple):
    """One layer's part in a backward."""

    kept: GatheringWeight
    made: Made
    gradient: Tensor
    adds: bool
    """Whether what comes out is added to the raw weight's gradient, not just asked for."""

    def refuse_if_stale(self) -> None:
        """Refuse a gradient with respect to a weight that is gone.

        Raises:
            DeferralError: If so.
        """
        if self.kept.spoiled or changed(self.made.marks) is not None:
            raise self.kept.refusal()

    def close_after_backward(self) -> None:
        """Let the window close when the backward that is running ends."""
        window = self.kept.window
        if window is not None and self.kept.is_open:
            window.close_after_backward()

    def go_back(self) -> Found:
        """Go back through the normalization, with what was gathered."""
        made, gradient = self.made, self.gradient
        owned = self.kept.take() if self.adds else None
        if not torch.is_grad_enabled():
            if owned is not None:
                gradient = owned.add_(gradient)
            return pull_back([(made, gradient)], in_place=owned is not None)[0]
        found = differentiate(made, gradient)
        if owned is None:
            return found
        with torch.no_grad():
            constant = pull_back([(made, owned)], in_place=True)[0]
        return tuple(
            one if one is None or more is None else one + more
            for one, more in zip(found, constant, strict=True)
        )


def _go_back(parts: Sequence[_Part], call: Call | None) -> list[Found]:
    """Go back through many normalizations.

    Args:
        parts: The layers' parts.
        call: The kernel's call, where they are all of its layers.
    """
    gathered = [part.adds and part.kept.has_gathered for part in parts]
    if call is None or torch.is_grad_enabled() or any(gathered) is not all(gathered):
        return [part.go_back() for part in parts]
    gradients = [part.gradient for part in parts]
    sums: list[Tensor] = []
    if any(gathered):
        for part in parts:
            owned = part.kept.take()
            # What `zero_grad` has dropped since is no part of the sum.
            sums.append(torch.zeros_like(part.kept.values) if owned is None else owned)
        for one, gradient in zip(sums, gradients, strict=True):
            one.add_(gradient)
        gradients = sums
    saved = [part.made.statistics for part in parts]
    found = call.backward(saved, gradients, in_place=bool(sums))
    return [tuple([one for one in of_layer if one is not None]) for of_layer in found]
