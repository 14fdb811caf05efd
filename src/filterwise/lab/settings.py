"""Every number that decides what is trained, in one place and checked."""

from __future__ import annotations

import hashlib
import json
import os
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from filterwise.lab.errors import UsageError
from filterwise.recipe import Recipe

__all__ = [
    "DEFAULT_OUT",
    "PANELS",
    "RECIPES",
    "CompareSettings",
    "Frozen",
    "Panel",
    "RunSettings",
    "checked",
    "needs_branch_gains",
]

RECIPES = ("none", "bn", "gn", "gn+ws", "wa")
"""Recipes that are compared when none are named."""

DEFAULT_OUT = "runs/compare"

Initialization = Literal["default", "branch"]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]


class Frozen(BaseModel):
    """Settings: read-only, and a key that they do not have is refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Panel(Frozen):
    """One table: the same network, learning rate and micro-batch under every recipe.

    Attributes:
        net: Name of the network.
        learning_rate: At the first step; it falls to zero along a cosine.
        micro_batch: Pictures in one forward and backward pass; an optimizer step gathers the
            gradients of as many passes as its pictures need.
    """

    net: str
    learning_rate: Rate
    micro_batch: Count

    @property
    def title(self) -> str:
        """The panel's name in tables and figures."""
        return (
            f"{self.net} net, learning rate {self.learning_rate:g}, micro-batch {self.micro_batch}"
        )


PANELS = (
    Panel(net="plain", learning_rate=0.1, micro_batch=64),
    Panel(net="plain", learning_rate=0.3, micro_batch=64),
    Panel(net="plain", learning_rate=0.1, micro_batch=1),
    Panel(net="residual", learning_rate=0.1, micro_batch=64),
)
"""Panels that are trained when neither network, learning rate nor micro-batch is named."""


class RunSettings(Frozen):
    """Everything that decides the outcome of one training run; its hash is the run's identity.

    Attributes:
        data: Name of the data set, or the absolute path of a class-folder tree.
        data_sha256: Digest of pictures and labels, so that changed data is another run.
        recipe: Canonical text.
        initialization: ``branch``: gains of 1/sqrt(L) at the end of L residual branches.
        step_size: Pictures in one optimizer step.
        weight_decay: On weights; gains, biases and norm parameters have none.
        device: Kind of device, without a number.
    """

    data: str
    data_sha256: str
    net: str
    recipe: str
    initialization: Initialization
    learning_rate: Rate
    micro_batch: Count
    seed: int
    epochs: Count
    step_size: Count = 64
    momentum: float = 0.9
    weight_decay: float = 5e-4
    schedule: Literal["cosine"] = "cosine"
    device: str = "cpu"
    deterministic: bool = False

    @property
    def identity(self) -> str:
        """Sixteen hexadecimal digits of the SHA-256 of the settings."""
        text = json.dumps(self.model_dump(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def panel(self) -> Panel:
        """The table that the run belongs to."""
        return Panel(net=self.net, learning_rate=self.learning_rate, micro_batch=self.micro_batch)


class CompareSettings(Frozen):
    """What one ``filterwise compare`` is asked to do.

    Attributes:
        recipes: Recipes to compare; kept in their canonical text.
        nets: Networks; with learning rates or micro-batches given, all combinations are trained.
        seeds: Number of seeds; they are 0, 1, ...
        data: ``digits``, the name of a torchvision set, or a folder.
        root: Where torchvision's sets lie on disk.
        size: Side in pixels that the pictures of a class-folder tree are brought to.
        processes: Runs trained at the same time, each with one thread.
    """

    recipes: Annotated[tuple[str, ...], Field(min_length=1)] = RECIPES
    nets: tuple[str, ...] | None = None
    learning_rates: tuple[Rate, ...] | None = None
    micro_batches: tuple[Count, ...] | None = None
    seeds: Annotated[int, Field(ge=1, le=1000)] = 3
    epochs: Annotated[int, Field(ge=1, le=10_000)] = 6
    data: str = "digits"
    root: str = "data"
    size: Annotated[int, Field(ge=8, le=1024)] = 32
    download: bool = False
    out: str = DEFAULT_OUT
    device: str = "cpu"
    deterministic: bool = False
    quick: bool = False
    processes: Annotated[int, Field(ge=1, le=256)] = Field(default_factory=lambda: min(cores(), 8))

    @field_validator("recipes")
    @classmethod
    def _canonical(cls, recipes: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(str(Recipe.parse(text)) for text in recipes))

    @field_validator("nets", "learning_rates", "micro_batches")
    @classmethod
    def _once(cls, values: tuple[Any, ...] | None) -> tuple[Any, ...] | None:
        return values if values is None else tuple(dict.fromkeys(values))

    @property
    def chooses_defaults(self) -> bool:
        """Whether neither network, learning rate nor micro-batch was named."""
        return self.nets is None and self.learning_rates is None and self.micro_batches is None

    def panels(self) -> tuple[Panel, ...]:
        """Return the tables to train, the four of `PANELS` if nothing else was asked for."""
        if self.chooses_defaults:
            # The deep net takes as long as two others together: --quick leaves it out.
            return PANELS[:-1] if self.quick else PANELS
        return tuple(
            Panel(net=net, learning_rate=rate, micro_batch=micro_batch)
            for net in self.nets or ("plain",)
            for rate in self.learning_rates or (0.1,)
            for micro_batch in self.micro_batches or (64,)
        )


def needs_branch_gains(net: str, recipe: str) -> bool:
    """Tell whether a run starts with gains of 1/sqrt(L) on its residual branches.

    A deep residual net without activation norms neither trains with branch gains of 1 nor with
    weights that have no fixed scale; where a norm follows, it would undo the gain.
    """
    parsed = Recipe.parse(recipe)
    return (
        net == "residual"
        and parsed.norm == "none"
        and parsed.method is not None
        and parsed.method.has_gain
    )


def cores() -> int:
    """Return how many processor cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


OPTION = {
    "nets": "--net",
    "learning_rates": "--lr",
    "micro_batches": "--micro-batch",
}


def checked(values: dict[str, Any]) -> CompareSettings:
    """Return the settings that values from a command line mean.

    Raises:
        UsageError: If one of them is out of range, naming the option.
        RecipeError: If a recipe cannot be read.
    """
    # Parsed here as well, since pydantic would wrap a recipe's error in its own words.
    for text in values.get("recipes") or ():
        Recipe.parse(text)
    try:
        return CompareSettings(**values)
    except ValidationError as error:
        first = error.errors()[0]
        field = str(first["loc"][0])
        option = OPTION.get(field, f"--{field.replace('_', '-')}")
        words = first["msg"][0].lower() + first["msg"][1:]
        raise UsageError(f"{option}: {first['input']!r} will not do: {words}.") from None
