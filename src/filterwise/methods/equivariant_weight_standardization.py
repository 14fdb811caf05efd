"""Equivariant Weight Standardization by orbit labels."""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from filterwise.errors import FilterwiseWarning
from filterwise.filters import FilterLayout
from filterwise.kernel import Family, standardize
from filterwise.methods import options
from filterwise.methods.method import WeightMethod

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from filterwise.kernel import Kernel

__all__ = ["EquivariantWeightStandardization"]

SMALL_CELL = 16


@dataclass(frozen=True)
class EquivariantWeightStandardization(WeightMethod):
    r"""Standardize the weights of each cell, so that the method commutes with a symmetry.

    .. math:: \hat W_i = \frac{W_i - \mu_{c(i)}}{\sqrt{V_{c(i)}} + \epsilon}

    A cell is all weights of one filter that bear one label (or, with ``shared``, all weights that
    bear it), with the mean and the biased variance over the cell. It commutes with a permutation of
    the weights exactly when that maps cells onto cells. An activation norm must follow.

    Attributes:
        label: Integers that broadcast to the weight, in the host's own axes: a tensor or nested
            lists. It cannot be written in a recipe's text.
        shared: Cells run across filters: for copies of one base filter that agree only roughly.
        eps: Number that keeps the divisor from 0, in the unit of the weights.
        eps_inside: Divide by sqrt(V + eps) instead.

    Raises:
        ValueError: If the labels are not integers, or an option is out of range.

    Source: no paper gives a formula; the definition is filterwise's (specification, 5.4).
    """

    name: ClassVar = "ews"
    title: ClassVar = "Equivariant Weight Standardization"
    source: ClassVar = (
        "filterwise's definition; the idea: encyclopedia article on Weight Standardization"
    )
    formula: ClassVar = "(W - mean_cell) / (std_cell + eps)"
    needs_norm: ClassVar = True
    cells: ClassVar[bool] = True

    label: Any
    shared: bool = False
    eps: float = 1e-5
    eps_inside: bool = False

    def __post_init__(self) -> None:
        """Check the options; labels become nested tuples, so that methods can be compared."""
        object.__setattr__(self, "eps", options.number("eps", self.eps))
        options.flag("shared", self.shared)
        options.flag("eps_inside", self.eps_inside)
        try:
            label = torch.as_tensor(self.label)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"label must be a tensor or nested lists of integers: {error}"
            ) from None
        if label.is_floating_point() or label.is_complex() or label.dtype == torch.bool:
            raise ValueError(f"label must be integers, got {label.dtype}")
        object.__setattr__(self, "label", _nested(label.tolist()))

    def family(self, fan_in: int) -> Family:
        """Return the place in the family of a cell, the same for every size."""
        del fan_in
        return Family(scale="root" if self.eps_inside else "outside", eps=self.eps)

    def refuses(self, shape: Sequence[int], layout: FilterLayout) -> str | None:
        """Return why the cells of a weight of this shape cannot be standardized, or None."""
        reason = super().refuses(shape, layout)
        if reason:
            return reason
        label = torch.tensor(self.label, device="cpu")
        try:
            label.expand(tuple(shape))
        except RuntimeError:
            return (
                f"cannot take labels of shape {tuple(label.shape)}: no broadcast to {tuple(shape)}"
            )
        cells = _cells(self.label, self.shared, tuple(shape), layout, torch.device("cpu"))
        smallest = cells[0].shape[1]
        if smallest == 1:
            return "has a cell of one weight, which has no variance; label it with other weights"
        if smallest < SMALL_CELL:
            warnings.warn(
                f"ews has cells of {smallest} weights: below {SMALL_CELL} statistics are noise",
                FilterwiseWarning,
                stacklevel=3,
            )
        return None

    def effective(
        self,
        weight: Tensor,
        layout: FilterLayout,
        gain: Tensor | None = None,
        offset: Tensor | None = None,
        kernel: Kernel = "auto",
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Compute the effective weight: the family's rows are cells, gathered by their size.

        A gain and an offset, one number per filter, are no part of the formula; layers converted
        with ``preserve=True`` have them.
        """
        flat = weight.contiguous().flatten()
        out = torch.zeros_like(flat)
        shape = tuple(weight.shape)
        for members in _cells(self.label, self.shared, shape, layout, weight.device):
            cells = flat[members]
            family = self.family(cells.shape[1])
            done = standardize(cells, family, FilterLayout(), kernel=kernel)
            out = out.index_copy(0, members.flatten(), done.flatten())
        view, _ = layout.split(out.view(weight.shape))
        if gain is not None:
            view = view * layout.per_filter(gain, view)
        if offset is not None:
            view = view + layout.per_filter(offset, view)
        return torch.empty_like(weight, dtype=dtype).copy_(layout.join(view))


def _nested(values: Any) -> Any:
    return tuple(_nested(value) for value in values) if isinstance(values, list) else values


def _cells(
    label: Any, shared: bool, shape: tuple[int, ...], layout: FilterLayout, device: torch.device
) -> tuple[Tensor, ...]:
    return _cells_kept(label, shared, shape, layout, device)


# What torch.compiler.assume_constant_result marks; the decorator would import the compiler here.
_cells._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


@functools.lru_cache(maxsize=256)
def _cells_kept(
    label: Any, shared: bool, shape: tuple[int, ...], layout: FilterLayout, device: torch.device
) -> tuple[Tensor, ...]:
    """Return, per cell size in rising order, the places of the members: ``(cells, size)``."""
    with torch.inference_mode(False), torch.no_grad(), torch.device("cpu"):
        labels = layout.matrix(torch.tensor(label).expand(shape))
        places = layout.matrix(torch.arange(labels.numel()).view(shape))
        labels = torch.unique(labels, return_inverse=True)[1]
        if not shared:
            rows = torch.arange(labels.shape[0]).unsqueeze(1)
            labels = torch.unique(labels + rows * (labels.max() + 1), return_inverse=True)[1]
        order = torch.argsort(labels.flatten(), stable=True)
        sizes = torch.bincount(labels.flatten())
        starts = sizes.cumsum(0) - sizes
        members = places.flatten()[order]
        found = []
        for size in torch.unique(sizes).tolist():
            chosen = starts[sizes == size].unsqueeze(1) + torch.arange(size)
            found.append(members[chosen])
    return tuple(places.to(device) for places in found)
