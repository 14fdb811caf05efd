"""The runs: what is trained, and which of them the thresholds were chosen on."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Literal

from filterwise.lab.settings import Count, Frozen, Rate

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Group", "Run", "runs"]

Group = Literal["choose", "judge"]

STEP = 64


class Run(Frozen):
    """Everything that decides a run's outcome.

    Attributes:
        data: Name of the data set.
        data_sha256: Digest of its pictures and labels.
        net: Name of the network.
        recipe: What it is converted by.
        branch: Whether branch gains of 1/sqrt(L) are set where a recipe needs them.
        learning_rate: The same in every step.
        micro_batch: Pictures in one forward; an optimizer step has 64.
        weight_decay: On weights.
        momentum: Of SGD.
        epochs: Passes over the pictures.
        seed: Of first weights and order.
    """

    data: str
    data_sha256: str
    net: str
    recipe: str
    branch: bool = True
    learning_rate: Rate
    micro_batch: Count = STEP
    weight_decay: float = 5e-4
    momentum: float = 0.9
    epochs: Count = 8
    seed: int

    @property
    def identity(self) -> str:
        """Sixteen hexadecimal digits of the SHA-256 of the settings."""
        text = json.dumps(self.model_dump(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def title(self) -> str:
        """The settings in a few words, what is usual left out."""
        words = [self.net, self.recipe, f"lr {self.learning_rate:g}"]
        if self.micro_batch != STEP:
            words.append(f"micro-batch {self.micro_batch}")
        if self.weight_decay != 5e-4:
            words.append(f"decay {self.weight_decay:g}")
        if self.momentum != 0.9:
            words.append(f"momentum {self.momentum:g}")
        if not self.branch:
            words.append("no branch gains")
        return ", ".join(words)


NORM_FREE = ("none", "wn", "centered", "wa", "pws", "pws(gamma=none)", "sws")
NORMED = ("bn", "gn", "gn+ws")


def runs(group: Group, data: str, data_sha256: str) -> Iterator[Run]:
    """Yield the runs of a group on one data set."""
    seeds = (0, 1) if group == "choose" else (10, 11)
    for seed in seeds:
        for settings in _choose() if group == "choose" else _judge():
            yield Run(data=data, data_sha256=data_sha256, seed=seed, **settings)


def _choose() -> Iterator[dict]:
    for recipe in NORM_FREE + NORMED:
        for rate in (0.1, 0.3, 1.0):
            yield {"net": "plain", "recipe": recipe, "learning_rate": rate}
    plain = {"net": "plain", "learning_rate": 0.3, "epochs": 20}
    yield {**plain, "recipe": "pws(gamma=none)", "weight_decay": 0.05}
    yield {**plain, "recipe": "pws(gamma=small)", "weight_decay": 0.03}
    yield {**plain, "recipe": "wa", "weight_decay": 0.03, "momentum": 0.0}
    yield {**plain, "recipe": "wa", "learning_rate": 0.1, "weight_decay": 5e-3}
    yield {"net": "plain", "recipe": "ws", "learning_rate": 0.01}
    yield {"net": "plain", "recipe": "equinorm", "learning_rate": 0.1}
    for size in (1, 2):
        one = {"net": "plain", "learning_rate": 0.1, "micro_batch": size, "epochs": 5}
        yield {**one, "recipe": "bn"}
        yield {**one, "recipe": "gn+ws"}
    yield {"net": "residual", "recipe": "wa", "learning_rate": 0.1}
    yield {"net": "residual", "recipe": "wa", "learning_rate": 0.3}
    yield {"net": "residual", "recipe": "wa", "learning_rate": 0.1, "branch": False}


def _judge() -> Iterator[dict]:
    for recipe in (*NORM_FREE, "bn", "gn+ws"):
        for rate in (0.05, 0.2, 0.7):
            yield {"net": "plain12", "recipe": recipe, "learning_rate": rate}
    for recipe in ("none", "wa", "pws"):
        for rate in (0.15, 0.5):
            yield {"net": "plain", "recipe": recipe, "learning_rate": rate}
    plain = {"net": "plain", "learning_rate": 0.2, "epochs": 20}
    yield {**plain, "recipe": "pws(gamma=small)", "weight_decay": 0.04}
    yield {**plain, "recipe": "wa", "learning_rate": 0.4, "weight_decay": 0.03, "momentum": 0.0}
    yield {**plain, "recipe": "pws(gamma=medium)", "weight_decay": 2e-3}
    yield {"net": "plain", "recipe": "centered", "learning_rate": 0.15}
    yield {"net": "plain", "recipe": "ws", "learning_rate": 0.003}
    yield {"net": "plain12", "recipe": "equinorm", "learning_rate": 0.1}
    for size in (1, 2):
        one = {"net": "plain", "learning_rate": 0.05, "micro_batch": size, "epochs": 5}
        yield {**one, "recipe": "bn"}
        yield {**one, "recipe": "gn+ws"}
    yield {"net": "residual", "recipe": "wa", "learning_rate": 0.15}
    yield {"net": "residual", "recipe": "pws", "learning_rate": 0.5}
    yield {"net": "residual", "recipe": "pws", "learning_rate": 0.05, "branch": False}
    yield {"net": "residual", "recipe": "gn+ws", "learning_rate": 0.1}
