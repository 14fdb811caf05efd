"""Every host of a weight, and the host table written out as a loop over output channels.

`rows` does not use filterwise: it is section 0 of the specification, one filter after the other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CHANNELS = 8
FILTERS = 12


class Bilinear(nn.Module):
    """A layer of somebody's own: its weight has another name, and two axes of inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(FILTERS, 4, CHANNELS))
        self.shift = nn.Parameter(torch.zeros(FILTERS))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("oij,bij->bo", self.kernel, x) + self.shift


@dataclass(frozen=True)
class Host:
    """A kind of layer.

    Attributes:
        id: As in ``ConvTranspose2d[g=2]``.
        make: Builds the layer, float32.
        input_shape: Shape of a batch that it takes.
        parameter: Name of its raw weight.
        selector: Pattern that selects it in a model whose first module it is.
    """

    id: str
    make: Callable[[], Any]
    input_shape: tuple[int, ...]
    parameter: str = "weight"
    selector: str = "0"

    @property
    def transposed(self) -> bool:
        """Whether the weight's axis 0 is the input."""
        return "Transpose" in self.id

    def rows(self, layer: nn.Module, weight: Tensor) -> Tensor:
        """Return the filter matrix, output channel by output channel."""
        return torch.stack([weight[place].reshape(-1) for place in self.places(layer, weight)])

    def back(self, layer: nn.Module, matrix: Tensor, like: Tensor) -> Tensor:
        """Return the weight in its own shape from the filter matrix."""
        out = torch.empty(like.shape, dtype=matrix.dtype)
        for row, place in zip(matrix, self.places(layer, like), strict=True):
            out[place] = row.view(out[place].shape)
        return out

    def places(self, layer: nn.Module, weight: Tensor) -> list[Any]:
        """Return where the filter of each output channel lies in the weight."""
        if not self.transposed:
            return list(range(weight.shape[0]))
        groups, inputs, outputs = layer.groups, weight.shape[0], weight.shape[1]
        share = inputs // groups
        return [
            (slice(q * share, (q + 1) * share), j) for q in range(groups) for j in range(outputs)
        ]

    def plain(self, layer: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
        """Return what a plain layer with this weight answers, by torch's functions."""
        if isinstance(layer, Bilinear):
            return torch.einsum("oij,bij->bo", weight, x) + layer.shift
        if isinstance(layer, nn.Linear):
            return F.linear(x, weight, layer.bias)
        dims = len(layer.kernel_size)
        if self.transposed:
            convolve = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[dims - 1]
            return convolve(
                x,
                weight,
                layer.bias,
                layer.stride,
                layer.padding,
                layer.output_padding,
                layer.groups,
                layer.dilation,
            )
        convolve = (F.conv1d, F.conv2d, F.conv3d)[dims - 1]
        padding = layer.padding
        if layer.padding_mode != "zeros":
            amounts = [p for p in reversed(layer.padding) for _ in range(2)]
            x, padding = F.pad(x, amounts, mode=layer.padding_mode), 0
        return convolve(x, weight, layer.bias, layer.stride, padding, layer.dilation, layer.groups)


def _convolution(
    cls: type, kernel: tuple[int, ...], size: int, groups: int, **options: Any
) -> Host:
    dims = len(kernel)
    name = cls.__name__ if groups == 1 else f"{cls.__name__}[g={groups}]"
    return Host(
        name,
        lambda: cls(CHANNELS, FILTERS, kernel, groups=groups, **options),
        (2, CHANNELS, *[size] * dims),
    )


def _hosts() -> list[Host]:
    found = []
    for groups in (1, 2, 4):
        found += [
            _convolution(
                nn.Conv1d, (9,), 20, groups, dilation=2, padding=2, padding_mode="reflect"
            ),
            _convolution(
                nn.Conv2d, (3, 3), 6, groups, stride=2, padding=1, padding_mode="circular"
            ),
            _convolution(nn.Conv3d, (2, 2, 3), 4, groups, padding=1, padding_mode="replicate"),
            _convolution(nn.ConvTranspose1d, (9,), 6, groups, stride=2, output_padding=1),
            _convolution(nn.ConvTranspose2d, (3, 3), 4, groups, stride=2, padding=1),
            _convolution(nn.ConvTranspose3d, (2, 2, 3), 3, groups, dilation=2, bias=False),
        ]
    found.append(Host("Linear", lambda: nn.Linear(24, FILTERS), (2, 3, 24)))
    found.append(Host("named", Bilinear, (2, 4, CHANNELS), "kernel", "0.kernel"))
    return sorted(found, key=lambda host: host.id)


HOSTS = _hosts()
