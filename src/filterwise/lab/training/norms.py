"""Activation norms that no recipe's word names: statistics of a part, other groups, switchable."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn
from torch.nn import functional

from filterwise.lab.errors import UsageError
from filterwise.norms import channels, is_norm

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from filterwise.lab.training.settings import NormSettings

__all__ = ["InterleavedGroupNorm", "PartialBatchNorm2d", "SwitchableNorm2d", "change_norms"]


class PartialBatchNorm2d(nn.BatchNorm2d):
    r"""Batch normalization with the statistics of the first part of a batch.

    .. math:: y = \gamma\,\frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} + \beta

    with mean and (biased) variance of each channel over the first ceil(fraction * N) samples,
    through which the gradient passes, and over which the running statistics are taken, too.

    Attributes:
        fraction: Above 0, and 1 at most.
    """

    fraction: float = 1.0

    def forward(self, input: Tensor) -> Tensor:
        """Normalize ``(N, C, H, W)``."""
        if not self.training:
            return super().forward(input)
        part = _precise(input[: math.ceil(self.fraction * len(input))])
        count = part.numel() // part.shape[1]
        if count < 2:
            # In torch's words, by which a run that cannot be trained is known.
            raise ValueError(
                f"Expected more than 1 value per channel when training, got {[*part.shape]}"
            )
        variance, mean = torch.var_mean(part, (0, 2, 3), correction=0)
        with torch.no_grad():
            rate = self.momentum if self.momentum is not None else 0.1
            self.running_mean.lerp_(mean.detach(), rate)  # type: ignore[union-attr]
            unbiased = variance.detach() * (count / (count - 1))
            self.running_var.lerp_(unbiased, rate)  # type: ignore[union-attr]
            self.num_batches_tracked.add_(1)  # type: ignore[union-attr]
        return _affine(self, (input - _wide(mean)) * _wide((variance + self.eps).rsqrt())).to(
            input.dtype
        )

    def extra_repr(self) -> str:
        """Return what torch's has, and the fraction."""
        return f"{super().extra_repr()}, fraction={self.fraction}"


class InterleavedGroupNorm(nn.GroupNorm):
    """Group normalization in whose g groups channel c is in group c mod g."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalize ``(N, C, H, W)``."""
        size, wide = input.shape[2:], (len(input), -1, self.num_groups, *input.shape[2:])
        grouped = input.view(wide).transpose(1, 2).reshape(len(input), -1, *size)
        grouped = functional.group_norm(grouped, self.num_groups, None, None, self.eps)
        narrow = (len(input), self.num_groups, -1, *size)
        return _affine(self, grouped.view(narrow).transpose(1, 2).reshape(input.shape))


class SwitchableNorm2d(nn.Module):
    r"""Switchable Normalization: means and variances of three norms, mixed by learned shares.

    .. math:: y = \gamma\,\frac{x - \sum_k p_k \mu_k}
        {\sqrt{\sum_k q_k \sigma_k^2 + \epsilon}} + \beta

    with k over instance, layer and batch normalization, :math:`p` and :math:`q` softmaxes of three
    learned numbers each, which start equal. In evaluation the batch's mean and variance are running
    ones.

    Source: Luo et al., *Differentiable Learning-to-Normalize via Switchable Normalization*, arXiv
    1806.10779, equations 3 to 5.
    """

    FEWEST: ClassVar = 2

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, num_features: int, eps: float = 1e-5, momentum: float = 0.1) -> None:
        """Make a norm of so many channels; momentum is the weight of a new batch."""
        super().__init__()
        self.num_features, self.eps, self.momentum = num_features, eps, momentum
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))
        self.mean_shares = nn.Parameter(torch.zeros(3))
        self.variance_shares = nn.Parameter(torch.zeros(3))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))

    def forward(self, input: Tensor) -> Tensor:
        """Normalize ``(N, C, H, W)``."""
        x = _precise(input)
        if x[0, 0].numel() < self.FEWEST:
            # Instance normalization divides by nothing there.
            raise ValueError(
                f"Expected more than 1 value per channel when training, got {[*input.shape]}"
            )
        variance, mean = torch.var_mean(x, (2, 3), correction=0, keepdim=True)
        square = variance + mean.square()
        layer_mean = mean.mean(1, keepdim=True)
        layer_variance = square.mean(1, keepdim=True) - layer_mean.square()
        if self.training:
            batch_mean = mean.mean(0, keepdim=True)
            batch_variance = square.mean(0, keepdim=True) - batch_mean.square()
            with torch.no_grad():
                self.running_mean.lerp_(batch_mean.flatten(), self.momentum)
                self.running_var.lerp_(batch_variance.flatten(), self.momentum)
        else:
            batch_mean, batch_variance = _wide(self.running_mean), _wide(self.running_var)
        p, q = self.mean_shares.softmax(0), self.variance_shares.softmax(0)
        mixed_mean = p[0] * mean + p[1] * layer_mean + p[2] * batch_mean
        mixed = q[0] * variance + q[1] * layer_variance + q[2] * batch_variance
        return _affine(self, (x - mixed_mean) * (mixed + self.eps).rsqrt()).to(input.dtype)

    def extra_repr(self) -> str:
        """Return channels and constants."""
        return f"{self.num_features}, eps={self.eps}, momentum={self.momentum}"


def _precise(x: Tensor) -> Tensor:
    """Return numbers of which sums can be taken: in float32 or wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _wide(values: Tensor) -> Tensor:
    return values.view(1, -1, 1, 1)


def _affine(norm: Any, x: Tensor) -> Tensor:
    if norm.weight is not None:
        x = x * _wide(norm.weight)
    return x if norm.bias is None else x + _wide(norm.bias)


def change_norms(model: nn.Module, settings: NormSettings) -> nn.Module:
    """Change the activation norms of a converted model, but for those that are its own.

    Returns:
        The model: itself, or what it is wrapped in.

    Raises:
        UsageError: If there is no norm that the settings could be about.
    """
    if settings == type(settings)():
        return model
    found = [*_norms(model)]
    batch = [norm for *_, norm in found if isinstance(norm, nn.BatchNorm2d)]
    group = [norm for *_, norm in found if isinstance(norm, nn.GroupNorm)]
    _refuse_without(found, "norms", "activation norm")
    if settings.fraction < 1:
        _refuse_without(batch, "norms.fraction", "batch norm")
    if settings.kind == "synchronized":
        _refuse_without(batch, "norms.kind: synchronized", "batch norm")
    if settings.interleaved:
        _refuse_without(group, "norms.interleaved", "group norm")
    for owner, name, norm in found:
        new: Any = SwitchableNorm2d(channels(norm)) if settings.kind == "switchable" else norm
        _change(new, settings)
        setattr(owner, name, new.train(norm.training))
    if settings.kind == "synchronized":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return model


def _refuse_without(norms: list[Any], what: str, kind: str) -> None:
    if not norms:
        raise UsageError(
            f"model.{what}: the converted network has no {kind} that it could be about."
        )


def _norms(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    own = set(getattr(model, "own_norms", ()))
    for path, owner in [*model.named_modules()]:
        for name, child in [*owner.named_children()]:
            dotted = f"{path}.{name}" if path else name
            if is_norm(child) and dotted not in own:
                yield owner, name, child


def _change(norm: Any, settings: NormSettings) -> None:
    kinds: dict[type, type] = {nn.BatchNorm2d: PartialBatchNorm2d} if settings.fraction < 1 else {}
    if settings.interleaved:
        kinds[nn.GroupNorm] = InterleavedGroupNorm
    norm.__class__ = kinds.get(type(norm), type(norm))
    if settings.fraction < 1:
        norm.fraction = settings.fraction
    if settings.momentum is not None and hasattr(norm, "momentum"):
        norm.momentum = settings.momentum
    if settings.eps is not None:
        norm.eps = settings.eps
    if not settings.scale:
        norm.register_parameter("weight", None)
