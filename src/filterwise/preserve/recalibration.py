"""One pass over a loader in which each layer is brought to the original's mean and deviation.

Batch by batch the original runs, then the converted network, both in evaluation mode. A layer (or
the norm behind it) that is reached compares each output channel, over all batches so far, with the
original's, takes the values that make mean and standard deviation equal, and goes on with them: so
each layer is set after the ones before it. What needs nothing is left as it is, so that what was
exact stays exact.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional

from filterwise import balance, verify
from filterwise.errors import ConversionError
from filterwise.host import state_of
from filterwise.methods.equinorm import EquilibriumNormalization
from filterwise.methods.preserving import wide_dtype
from filterwise.preserve.carry import set_bias, set_factor
from filterwise.preserve.probes import call, standing, watching

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from filterwise.preserve.batches import Batches
    from filterwise.preserve.probes import Seen

__all__ = ["InputMeans", "LayerSite", "NormSite", "Site", "recalibrate"]


class Moments:
    """Mean and variance of each channel over all batches so far, in float64."""

    def __init__(self) -> None:
        """Have seen nothing."""
        self.count = 0
        self.mean = self.square = torch.zeros(())

    def add(self, values: Tensor, axis: int) -> None:
        """Add a batch."""
        wide = values.detach().movedim(axis, 0).flatten(1).to(wide_dtype(values.device))
        count, mean = wide.shape[1], wide.mean(1)
        if not count:
            return
        square = (wide - mean.unsqueeze(1)).square().sum(1)
        total = self.count + count
        gap = mean - self.mean
        self.square = self.square + square + gap.square() * (self.count * count / total)
        self.mean = self.mean + gap * (count / total)
        self.count = total

    @property
    def deviation(self) -> Tensor:
        """Standard deviation, with the number of values in the divisor."""
        return (self.square / max(self.count, 1)).sqrt()


class Site(ABC):
    """A place where the converted network is brought to the original's moments.

    Attributes:
        row: The row of the report that tells.
        original: Name of the original's module that is looked at.
        module: Name of the converted network's module.
        axis: Axis of the channels in both.
        changed: Whether anything was changed at last.
    """

    def __init__(self, row: str, original: str, before: Seen, module: str, axis: int) -> None:
        """Take the places; nothing is looked at yet."""
        self.row, self.original, self.before = row, original, before
        self.module, self.axis = module, axis
        self.wanted, self.found = Moments(), Moments()
        self.changed = False

    def look_before(self, module: nn.Module, x: Tensor, output: Any) -> None:
        """Take the moments of a call in the original."""
        seen = self.before(module, x, output)
        if seen is not None:
            self.wanted.add(seen, self.axis)

    def look_after(self, module: nn.Module, x: Tensor, output: Any) -> bool:
        """Take the moments of a call in the converted network; tell whether it must run again."""
        del module
        if not self.wanted.count:
            return False
        self.found.add(self.bare(x, output), self.axis)
        finite = self.found.mean.isfinite().all() and self.found.square.isfinite().all()
        if not finite:
            raise ConversionError(
                f"the output of {self.module} is not finite on loader, so there is nothing to"
                " match. The model is unchanged."
            )
        self.changed = self.settle(verify.tolerance(x.dtype))
        return self.changed

    def ratio(self, eps: float) -> Tensor:
        """Return wanted over found deviation; 1 for a channel that is constant in either."""
        wanted, found = self.wanted.deviation, self.found.deviation
        lives = (wanted > eps * self.wanted.mean.abs()) & (found > eps * self.found.mean.abs())
        return torch.where(lives, wanted / torch.where(lives, found, 1.0), 1.0)

    def agrees(self, limit: float) -> bool:
        """Tell whether the moments are equal to rounding as they stand."""
        wanted, found = self.wanted, self.found
        scale = wanted.deviation + wanted.mean.abs()
        gap = (wanted.deviation - found.deviation).abs() + (wanted.mean - found.mean).abs()
        return bool((gap <= limit * scale).all())

    @abstractmethod
    def tensors(self) -> list[Tensor]:
        """Return what was there before the conversion and may be written into."""

    @abstractmethod
    def bare(self, x: Tensor, output: Any) -> Tensor:
        """Return what is looked at, as it would be without the site's own values."""

    @abstractmethod
    def settle(self, limit: float) -> bool:
        """Set the site's values from the moments; tell whether they are other than before."""


class LayerSite(Site):
    """A layer that no norm follows any more: its gain, offset and bias are set."""

    def __init__(
        self,
        row: str,
        original: str,
        before: Seen,
        module: str,
        layer: Any,
        factor: Tensor | None,
    ) -> None:
        """Take a layer.

        Args:
            row: Its row.
            original: As `Site`.
            before: As `Site`.
            module: Its name.
            layer: The layer.
            factor: What its effective weight is of the raw one, per filter; None: it has no gain.
        """
        axis = -1 if isinstance(layer, nn.Linear) else 1
        super().__init__(row, original, before, module, axis)
        self.layer, self.factor = layer, factor
        bias = layer._parameters.get("bias")
        self.bias = None if bias is None else bias.detach().to(wide_dtype(bias.device)).clone()
        self.times: Tensor | None = None

    def tensors(self) -> list[Tensor]:
        """Return the bias."""
        return [] if self.bias is None else [self.layer.bias]

    def scale(self) -> Tensor:
        """Return what the effective weight is of the raw one now, per filter."""
        factor = torch.ones(()) if self.factor is None else self.factor
        return factor if self.times is None else factor * self.times

    def bare(self, x: Tensor, output: Any) -> Tensor:
        """Return the output with the bias of the start and the factor of the start."""
        del x
        if self.times is None:
            return output
        view = [1] * output.dim()
        view[self.axis] = -1
        wide = output.to(self.times.dtype)
        if self.bias is None:
            return wide / self.times.view(view)
        bias = self.layer.bias.detach().to(wide.dtype).view(view)
        return (wide - bias) / self.times.view(view) + self.bias.view(view)

    def settle(self, limit: float) -> bool:
        """Set gain and offset by the ratio of deviations, and the bias by what the mean lacks."""
        agrees = self.agrees(limit)
        if agrees and self.times is None:
            return False
        ratio = self.ratio(limit)
        if agrees or self.factor is None:
            ratio = torch.ones_like(ratio)
        if self.factor is not None:
            set_factor(self.layer, self.factor * ratio)
        if self.bias is not None:
            moved = self.wanted.mean - ratio * (self.found.mean - self.bias)
            set_bias(self.layer, self.bias if agrees else moved)
        self.times = ratio
        return not agrees


class NormSite(Site):
    """A norm that stands: its affine is set, of a BatchNorm the running statistics first."""

    def __init__(self, row: str, before: Seen, norm: Any, *, new: bool) -> None:
        """Take a norm of the converted network; `new` if it replaced another."""
        super().__init__(row, row, before, row, 1)
        self.norm: Any = standing(norm)
        self.new = new
        self.batch_norm = isinstance(self.norm, nn.modules.batchnorm._BatchNorm)
        self.start = {
            name: value.detach().clone() for name, value in self.norm.state_dict().items()
        }

    def tensors(self) -> list[Tensor]:
        """Return the affine and the statistics."""
        return list(self.norm.state_dict(keep_vars=True).values())

    def bare(self, x: Tensor, output: Any) -> Tensor:
        """Return the input of a BatchNorm, or the groups' normalized values without affine."""
        del output
        if self.batch_norm:
            return x
        return functional.group_norm(x, self.norm.num_groups, eps=self.norm.eps)

    def settle(self, limit: float) -> bool:
        """Set what the norm has to set."""
        if self.batch_norm and not self.new:
            return self._correct(limit)
        mean, deviation = self.found.mean, self.found.deviation
        if self.batch_norm:
            count = self.found.count
            variance = deviation.square() * (count / max(count - 1, 1))
            self._write("running_mean", mean)
            self._write("running_var", variance)
            self._write("num_batches_tracked", torch.ones(()))
            mean, deviation = 0.0 * mean, deviation * (variance + self.norm.eps).rsqrt()
        weight, bias = self.start.get("weight"), self.start.get("bias")
        if weight is not None:
            wide = weight.to(deviation.dtype)
            lives = (deviation > limit) & (self.wanted.deviation > 0)
            scale = self.wanted.deviation / torch.where(lives, deviation, 1.0)
            scale = torch.where(lives, torch.where(wide < 0, -scale, scale), wide)
            self._write("weight", scale)
            if bias is not None:
                self._write("bias", self.wanted.mean - scale * mean)
        return True

    def _correct(self, limit: float) -> bool:
        """Move running statistics as far as the input's moments have moved."""
        if "running_var" not in self.start:
            return False
        if self.agrees(limit):
            for name in ("running_mean", "running_var"):
                self._write(name, self.start[name])
            return False
        wide = self.found.mean.dtype
        mean, variance = (self.start[name].to(wide) for name in ("running_mean", "running_var"))
        ratio = 1 / self.ratio(limit)
        moved = ((variance + self.norm.eps) * ratio.square() - self.norm.eps).clamp_min(0)
        self._write("running_var", moved)
        self._write("running_mean", self.found.mean - (self.wanted.mean - mean) * ratio)
        return True

    def _write(self, name: str, value: Tensor) -> None:
        own = getattr(self.norm, name)
        with torch.inference_mode(own.is_inference()), torch.no_grad():
            own.copy_(value)


class InputMeans:
    """EquiNorm's statistics: the mean over the batches of what each gives."""

    def __init__(self, name: str, layer: Any) -> None:
        """Take a layer, whose factor is set again when the means are known."""
        self.module, self.layer = name, layer
        self._sum: Tensor | None = None
        self._batches = 0
        self._factor = 1.0

    def look(self, module: nn.Module, x: Tensor, output: Any) -> None:
        """Take the means of one call's input."""
        del module, output
        method = state_of(self.layer).method
        assert isinstance(method, EquilibriumNormalization)
        linear = isinstance(self.layer, nn.Linear)
        x = balance.batched(self.layer, x)
        mean = method.input_mean(x, -1 if linear else 1)
        self._sum = mean if self._sum is None else self._sum + mean
        self._batches += 1
        if method.geometry == "paper" and not linear:
            self._factor = balance.paper_factor(self.layer, x)

    def write(self, factor: Tensor) -> bool:
        """Give the layer its means, and the gain and offset for them; False if it saw no input."""
        if self._sum is None:
            return False
        with torch.no_grad():
            self.layer.input_mean.copy_(self._sum / self._batches)
            self.layer.num_batches_tracked.fill_(self._batches)
            if "geometry_factor" in self.layer._buffers:
                self.layer.geometry_factor.fill_(self._factor)
        set_factor(self.layer, factor)
        return True


def recalibrate(
    original: nn.Module,
    model: nn.Module,
    sites: Sequence[Site],
    inputs: Sequence[InputMeans],
    batches: Batches,
) -> int:
    """Go through a loader once; return the number of its batches.

    Raises:
        ConversionError: If a network does not run on a batch, or an output is not finite.
    """
    before: list[tuple[str, Callable[..., Any]]] = [(s.original, s.look_before) for s in sites]
    after: list[tuple[str, Callable[..., Any]]] = [(one.module, one.look) for one in inputs]
    after += [(site.module, site.look_after) for site in sites]
    count = 0
    for arguments in batches:
        with verify.evaluating(original), watching(original, before):
            call(original, arguments)
        with verify.evaluating(model), watching(model, after):
            call(model, arguments)
        count += 1
    return count
