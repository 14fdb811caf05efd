"""How near each layer and norm came, each alone on numbers of a fixed seed.

A layer is run on normal numbers, as `fold` does. A norm is run on what its running statistics say
its input is: normal numbers of that mean and variance, channel by channel.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from filterwise import norms, verify
from filterwise.host import effective_weight, state_of
from filterwise.preserve.probes import standing

if TYPE_CHECKING:
    from torch import Tensor, nn

    from filterwise.preserve.carry import Carry
    from filterwise.preserve.probes import Probe

__all__ = ["Alone"]

SHAPE = (4, 8, 8, 8)  # samples, then as many spatial dimensions as the norm takes
SEED = 2019


class Alone:
    """What the parts of a model compute before it is converted, to be compared afterwards."""

    def __init__(self) -> None:
        """Know nothing yet."""
        self._expected: dict[str, Tensor] = {}
        self._again: dict[str, Callable[[], Tensor]] = {}

    def try_layer(self, probe: Probe, module: nn.Module, parameter: str) -> None:
        """Run a layer that is about to be converted.

        One whose input is not known is judged by its weights: effective against raw.
        """
        x = verify.seeded_input(module)
        try:
            expected = None if x is None else probe.before(module, x, _run(module, x))
        except Exception:  # a forward of somebody's own that takes another input
            expected = None
        if x is not None and expected is not None:
            self._note(probe.row, expected, lambda: _run(module, x))
        else:
            raw = getattr(module, parameter).detach().clone()
            self._note(probe.row, raw, lambda: _effective(module))

    def try_norm(
        self, name: str, norm: nn.Module, new: nn.Module | None, carry: Carry | None
    ) -> None:
        """Run a norm that is about to be removed, or replaced by `new`.

        Nothing is done where a layer takes over all of it: that layer's figure tells.
        """
        if carry is not None and carry.whole and carry.scales:
            return
        for spatial in (2, 1, 3):
            x = _norm_input(norm, spatial)
            try:
                expected = _normalized(norm, x)
            except Exception:  # the norm takes another number of dimensions
                continue
            x = x if carry is None else carry.of_output(x)
            self._note(name, expected, partial(_normalized, new, x))
            return

    def _note(self, row: str, expected: Tensor, again: Callable[[], Tensor]) -> None:
        self._expected[row], self._again[row] = expected, again

    def figures(self) -> dict[str, float]:
        """Run the parts again and return the largest relative difference of each, by row."""
        return {
            row: verify.relative_difference(expected, self._again[row]())
            for row, expected in self._expected.items()
        }


def _run(module: nn.Module, x: Tensor) -> Any:
    """Run a module in evaluation mode, without hooks: they are the user's and may have effects."""
    with verify.evaluating(module):
        return module.forward(x)


def _normalized(norm: nn.Module | None, x: Tensor) -> Tensor:
    """Return what a norm makes of an input, without what is fused into it; x where it is gone."""
    if norm is None:
        return x
    own = standing(norm)
    with verify.evaluating(own):
        found = norms.normalize(own, x)
    return _run(own, x) if found is None else found


def _effective(module: nn.Module) -> Tensor:
    assert state_of(module).parameter
    with verify.evaluating(module):
        return effective_weight(module).clone()


def _norm_input(norm: Any, spatial: int) -> Tensor:
    shape = (SHAPE[0], norms.channels(norm), *SHAPE[1 : 1 + spatial])
    known = [value for value in norm.state_dict().values() if value.is_floating_point()]
    generator = torch.Generator("cpu").manual_seed(SEED)
    x = torch.randn(shape, generator=generator, device="cpu")
    if known:
        x = x.to(known[0].device, known[0].dtype)
    mean, variance = (getattr(norm, name, None) for name in ("running_mean", "running_var"))
    if mean is None or variance is None:
        return x
    view = (1, -1, *[1] * spatial)
    return mean.view(view) + variance.sqrt().view(view) * x
