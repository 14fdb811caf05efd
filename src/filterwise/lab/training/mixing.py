"""Mixtures of pairs: mixup, and manifold mixup through hooks on modules."""

from __future__ import annotations

from contextlib import contextmanager
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from filterwise.lab.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

    from filterwise.lab.training.settings import Mixing

__all__ = ["Mixer"]

INPUT = "input"
STAGES = ("layer1", "layer2"), ("stages.0", "stages.1")
"""What the first two stages are called in torchvision's and timm's ResNets."""


class Mixer:
    """Mixes the samples of a micro-batch with those of the same one in another order.

    What it draws comes from torch's global generator on the CPU, which the engine seeds before each
    step.

    Attributes:
        places: Where it may mix: ``input``, and dotted names of modules.
    """

    def __init__(self, model: nn.Module, settings: Mixing) -> None:
        """Put a hook on each module behind which it may mix.

        Raises:
            UsageError: If there is no such module.
        """
        self._alpha = settings.alpha
        self.places = (INPUT,)
        if settings.kind == "manifold":
            self.places = settings.places or (INPUT, *_first_stages(model))
        modules = dict(model.named_modules())
        self._here = dict.fromkeys(self.places, False)
        # Tensors, so that a compiled model is compiled once for each place and not for each draw.
        self._share, self._other = torch.ones(()), torch.zeros(0, dtype=torch.long)
        for place in self.places:
            if place != INPUT:
                if place not in modules:
                    raise _unknown(place, list(modules))
                modules[place].register_forward_hook(self._hook(place))

    def loss(
        self,
        forward: Callable[..., Any],
        pictures: Tensor,
        labels: Tensor,
        loss: Callable[..., Any],
    ) -> Tensor:
        """Return a loss on a mixture: that for the labels, and that for the others' labels, mixed.

        Args:
            forward: From pictures to answers.
            pictures: A micro-batch.
            labels: Its labels.
            loss: From answers and labels to a number.
        """
        place = self.places[int(torch.randint(len(self.places), ()))]
        share = torch.distributions.Beta(self._alpha, self._alpha).sample()
        other = torch.randperm(len(labels))
        self._share = share.to(pictures.device, pictures.dtype)
        self._other = other.to(pictures.device)
        if place == INPUT:
            pictures = self._mixed(pictures)
        with self._mixing(place):
            answers = forward(pictures)
        mixed = loss(answers, labels) * self._share
        return mixed + loss(answers, labels[self._other]) * (1 - self._share)

    @contextmanager
    def _mixing(self, place: str) -> Iterator[None]:
        self._here[place] = True
        try:
            yield
        finally:
            self._here[place] = False

    def _hook(self, place: str) -> Callable[..., Tensor | None]:
        def mix(module: nn.Module, inputs: Any, output: Tensor) -> Tensor | None:
            del module, inputs
            return self._mixed(output) if self._here[place] else None

        return mix

    def _mixed(self, x: Tensor) -> Tensor:
        share = self._share.to(x.dtype)
        return share * x + (1 - share) * x[self._other]


def _first_stages(model: nn.Module) -> tuple[str, ...]:
    own = getattr(model, "stages", ())
    named = (tuple(own[:2]),) if isinstance(own, tuple) else ()
    modules = dict(model.named_modules())
    for names in (*named, *STAGES):
        if len(names) == 2 and all(name in modules for name in names):
            return names
    raise UsageError(
        f"mixing.places: {type(model).__name__} does not say which of its modules are its stages."
        f" Name modules behind which to mix: {', '.join(dict(model.named_children()))}."
    )


def _unknown(place: str, modules: list[str]) -> UsageError:
    nearest = get_close_matches(place, [INPUT, *modules], n=3)
    hint = f" Nearest: {', '.join(nearest)}." if nearest else ""
    return UsageError(f"mixing.places: the network has no module {place!r}.{hint}")
