"""Layers as other libraries write them, made here from their published formulas.

They have the class, attribute and key names of the originals, so that nothing of mmcv, Composer,
transformers or nfnets-pytorch has to be installed.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def variance(weight: Tensor, *, unbiased: bool) -> Tensor:
    return weight.flatten(1).var(1, correction=int(unbiased)).view(-1, *[1] * (weight.dim() - 1))


def centre(weight: Tensor) -> Tensor:
    return weight - weight.flatten(1).mean(1).view(-1, *[1] * (weight.dim() - 1))


class Convolution(nn.Conv2d):
    """A convolution with a weight of its own making."""

    def effective(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x):
        weight = self.effective(x)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Conv2d(Convolution):
    """The authors' README: the class has the name of torch's own."""

    def effective(self, _x):
        return centre(self.weight) / (variance(self.weight, unbiased=True).sqrt() + 1e-5)


class ConvWS2d(Convolution):
    """mmcv: the same."""

    eps = 1e-5

    def effective(self, _x):
        return centre(self.weight) / (variance(self.weight, unbiased=True).sqrt() + self.eps)


class ConvAWS2d(Convolution):
    """mmcv: gain and offset are buffers of shape (O, 1, 1, 1)."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_buffer("weight_gamma", torch.ones(self.out_channels, 1, 1, 1))
        self.register_buffer("weight_beta", torch.zeros(self.out_channels, 1, 1, 1))

    def effective(self, _x):
        divisor = (variance(self.weight, unbiased=True) + 1e-5).sqrt()
        return self.weight_gamma * centre(self.weight) / divisor + self.weight_beta


class SAConv2d(ConvAWS2d):
    """mmcv's switchable convolution runs two of them: more than a weight."""

    def forward(self, x):
        return super().forward(x) + F.conv2d(
            x, self.effective(x), None, self.stride, self.padding, self.dilation, self.groups
        )


class WeightStandardizer(nn.Module):
    """Composer's parametrization."""

    def forward(self, weight):
        return centre(weight) / (variance(weight, unbiased=False) + 1e-10).sqrt()


class DynamicPad2d(nn.Module):
    """transformers: SAME padding by the input's size."""

    def __init__(self, kernel, stride):
        super().__init__()
        self.kernel, self.stride = kernel, stride

    def forward(self, x):
        sides = []
        for size in reversed(x.shape[-2:]):
            missing = (math.ceil(size / self.stride) - 1) * self.stride + self.kernel - size
            sides += [max(missing, 0) // 2, max(missing, 0) - max(missing, 0) // 2]
        return F.pad(x, sides)


class WeightStandardizedConv2d(Convolution):
    """transformers' BiT: timm's layer, with a child that pads."""

    def __init__(self, *args, eps=1e-6, same=False, **kwargs):
        super().__init__(*args, **kwargs)
        self.eps = eps
        self.pad = DynamicPad2d(self.kernel_size[0], self.stride[0]) if same else None

    def effective(self, _x):
        flat = self.weight.reshape(1, self.out_channels, -1)
        return F.batch_norm(flat, None, None, training=True, momentum=0.0, eps=self.eps).reshape_as(
            self.weight
        )

    def forward(self, x):
        return super().forward(x if self.pad is None else self.pad(x))


class WSConv2d(Convolution):
    """nfnets-pytorch."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.gain = nn.Parameter(torch.ones(self.weight.shape[0]))

    def effective(self, _x):
        n = self.weight[0].numel()
        floor = (n * variance(self.weight, unbiased=True)).clamp_min(1e-4)
        return self.gain.view(-1, 1, 1, 1) * centre(self.weight) / floor.sqrt()


class WSConv1d(nn.Conv1d):
    """nfnets-pytorch, whose fan-in counts the filters too."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.gain = nn.Parameter(torch.ones(self.weight.shape[0]))

    def forward(self, x):
        floor = (self.weight.numel() * variance(self.weight, unbiased=False)).clamp_min(1e-4)
        weight = self.gain.view(-1, 1, 1) * centre(self.weight) / floor.sqrt()
        return F.conv1d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class WSConvTranspose2d(nn.ConvTranspose2d):
    """nfnets-pytorch, which standardizes per input channel."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.gain = nn.Parameter(torch.ones(self.weight.shape[0]))

    def forward(self, x):
        n = self.weight[0].numel()
        floor = (n * variance(self.weight, unbiased=True)).clamp_min(1e-4)
        weight = self.gain.view(-1, 1, 1, 1) * centre(self.weight) / floor.sqrt()
        return F.conv_transpose2d(
            x,
            weight,
            self.bias,
            self.stride,
            self.padding,
            self.output_padding,
            self.groups,
            self.dilation,
        )


class OutsideScaledConv2d(Convolution):
    """nfnets-pytorch's ScaledStdConv2d: eps beside the deviation."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.gain = nn.Parameter(torch.ones(self.out_channels, 1, 1, 1))

    def effective(self, _x):
        deviation = variance(self.weight, unbiased=False).sqrt() + 1e-5
        return self.gain * 1.7 * self.weight[0].numel() ** -0.5 * centre(self.weight) / deviation


class CWNConv2d(Convolution):
    """CenteredWN's PyTorch module: eps beside the norm."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_buffer("WNScale", torch.full((self.out_channels, 1, 1, 1), 1.414))

    def effective(self, _x):
        length = centre(self.weight).flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        return self.WNScale * centre(self.weight) / (length + 1e-5)


class InvertedConv2d(Convolution):
    """The annotated diffusion blog until 2024, and its copies: multiplied, not divided."""

    def effective(self, _x):
        return centre(self.weight) * (variance(self.weight, unbiased=False) + 1e-5).sqrt()


class VarianceConv2d(Convolution):
    """GroupNorm-reproduce: divided by the variance."""

    def effective(self, _x):
        return centre(self.weight) / (variance(self.weight, unbiased=False) + 1e-5)


class DtypeConv2d(Convolution):
    """denoising-diffusion-pytorch and copies: eps by the dtype of the input."""

    def effective(self, x):
        eps = 1e-5 if x.dtype == torch.float32 else 1e-3
        return centre(self.weight) * (variance(self.weight, unbiased=False) + eps).rsqrt()


class FlooredConv2d(Convolution):
    """denoising-diffusion-pytorch after August 2022: eps is a floor of the variance."""

    def effective(self, x):
        floor = 1e-5 if x.dtype == torch.float32 else 1e-3
        return centre(self.weight) / variance(self.weight, unbiased=False).clamp_min(floor).sqrt()


class LowRankConv2d(Convolution):
    """No normalization at all: a weight plus a product."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.down = nn.Parameter(torch.randn(self.weight.shape[0], 2) * 0.1)
        self.up = nn.Parameter(torch.randn(2, self.weight[0].numel()) * 0.1)

    def effective(self, _x):
        return self.weight + (self.down @ self.up).view_as(self.weight)


class EqualizedConv2d(Convolution):
    """Equalized learning rate: a weight times a constant, which is no normalization either."""

    def effective(self, _x):
        return self.weight * 0.3


class PWSConv2d(nn.Module):
    """PWSConv: not a convolution by class; alpha is (O, 1, 1, 1)."""

    def __init__(self, channels, filters, kernel, gamma=1e-5):
        super().__init__()
        self.gamma, self.padding = gamma, kernel // 2
        self.weight = nn.Parameter(torch.randn(filters, channels, kernel, kernel) * 0.1)
        self.alpha = nn.Parameter(torch.ones(filters, 1, 1, 1))
        self.bias = nn.Parameter(torch.zeros(filters))

    def forward(self, x):
        n = self.weight[0].numel()
        divisor = (variance(self.weight, unbiased=False) + self.gamma).sqrt()
        weight = (2 / n) ** 0.5 * self.alpha * centre(self.weight) / divisor
        return F.conv2d(x, weight, self.bias, padding=self.padding)
