"""What a method is: a frozen dataclass of options and a place in the family."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from filterwise.kernel import standardize

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch
    from torch import Tensor

    from filterwise.filters import FilterLayout
    from filterwise.kernel import Family, Kernel

__all__ = ["Method", "MethodInfo", "WeightMethod"]


@dataclass(frozen=True)
class MethodInfo:
    """A row of the table of methods.

    Attributes:
        name: The word in recipes.
        title: The method's full name.
        source: Paper or article, and equation.
        formula: The effective weight, in plain text.
        needs_norm: Whether an activation norm must follow, since the formula fixes no sound scale.
        options: Option name to default value.
    """

    name: str
    title: str
    source: str
    formula: str
    needs_norm: bool
    options: dict[str, Any]


@dataclass(frozen=True)
class Method(ABC):
    """Base of all methods: what recipes, reports and checkpoints read.

    A subclass is a frozen dataclass whose fields are its options. The class attributes below are
    what a user sees of it; the properties are what its laws are chosen by.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    source: ClassVar[str]
    formula: ClassVar[str]
    needs_norm: ClassVar[bool] = False
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Options by the name of whose published formula they are: ``ws(like=timm)``."""
    uses_input: ClassVar[bool] = False
    """Whether the effective weight depends on the layer's input."""
    cells: ClassVar[bool] = False
    """Whether statistics run over labelled cells in place of whole filters."""

    @property
    def centred(self) -> bool:
        """Whether every effective filter has mean zero."""
        return True

    @property
    def shifts(self) -> bool:
        """Whether a number is taken off all weights of a filter, which an offset can put back."""
        return self.centred

    @property
    def scale_free(self) -> bool:
        """Whether the effective weight is the same for W and for a multiple of W, exactly."""
        return False

    @property
    def has_gain(self) -> bool:
        """Whether there is one gain per filter."""
        return False

    @property
    def learns_gain(self) -> bool:
        """Whether the gain is a parameter; an option ``learn_gain`` can make it a buffer."""
        return self.has_gain and getattr(self, "learn_gain", True)

    @property
    def starts_plain(self) -> bool:
        """Whether, at the gain's initial value, the effective weight is the raw weight."""
        return False

    @property
    def has_offset(self) -> bool:
        """Whether there is one learnable offset per filter, added to all its weights."""
        return False

    def refuses(self, shape: Sequence[int], layout: FilterLayout) -> str | None:
        """Return why a weight of this shape cannot take the method, or None."""
        if layout.fan_in(shape) < 2:
            return "has fan-in 1; a filter of one weight has no variance to standardize"
        return None

    def gain_start(self, matrix: Tensor) -> Tensor:
        """Return the gain's initial value for a matrix ``(filters, fan_in)``; ones by default."""
        return matrix.new_ones(matrix.shape[0])

    def all_options(self) -> dict[str, Any]:
        """Return every option by name, in field order."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def options(self) -> dict[str, Any]:
        """Return the options that differ from their defaults, in field order."""
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        return {k: v for k, v in self.all_options().items() if not _same(v, defaults[k])}

    @classmethod
    def info(cls) -> MethodInfo:
        """Return the method's row in the table of methods."""
        options = {
            field.name: None if field.default is dataclasses.MISSING else field.default
            for field in dataclasses.fields(cls)
        }
        return MethodInfo(
            name=cls.name,
            title=cls.title,
            source=cls.source,
            formula=cls.formula,
            needs_norm=cls.needs_norm,
            options=options,
        )

    def __str__(self) -> str:
        """Return the canonical recipe text: the name and every option not at its default."""
        words = [f"{name}={_text(value)}" for name, value in self.options().items()]
        return f"{self.name}({', '.join(words)})" if words else self.name


@dataclass(frozen=True)
class WeightMethod(Method):
    """Base of the methods whose effective weight is a function of the raw weight alone."""

    @abstractmethod
    def family(self, fan_in: int) -> Family:
        """Return the method's place in the family for filters of `fan_in` weights."""

    def effective(
        self,
        weight: Tensor,
        layout: FilterLayout,
        gain: Tensor | None = None,
        offset: Tensor | None = None,
        kernel: Kernel = "auto",
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Compute the effective weight, in the shape, device and strides of the raw weight.

        Args:
            weight: Raw weight.
            layout: Where its filters lie.
            gain: One number per filter; None is 1.
            offset: One number per filter; None is 0.
            kernel: Which implementation computes it.
            dtype: The effective weight's; None is the raw weight's.
        """
        family = self.family(layout.fan_in(weight.shape))
        return standardize(weight, family, layout, gain, offset, kernel=kernel, dtype=dtype)

    @property
    def centred(self) -> bool:
        """Whether every effective filter has mean zero."""
        return self.family(16).centre

    @property
    def scale_free(self) -> bool:
        """Whether the effective weight is the same for W and for a multiple of W, exactly."""
        place = self.family(16)
        return place.scale != "none" and place.eps == 0


def _same(value: object, default: object) -> bool:
    return type(value) is type(default) and bool(value == default)


def _text(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        return f"<{' x '.join(map(str, _shape(value)))} labels>"
    return repr(value) if isinstance(value, float) else str(value)


def _shape(nested: object) -> list[int]:
    return [len(nested), *_shape(nested[0])] if isinstance(nested, tuple) and nested else []
