"""Layers that torch lacks, or has in another meaning than the sources."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.winograd import KERNEL, winograd_conv2d


def same_padding(sides: Sequence[int], kernel_size: int, stride: int) -> tuple[int, int, int, int]:
    """TensorFlow's SAME padding as (left, right, top, bottom), for `sides` (height, width).

    The output has ceil(side / stride) values; an odd number of padding values has the extra one at the
    right and the bottom (https://www.tensorflow.org/api_docs/python/tf/nn#notes_on_padding_2).
    """
    totals = [max((math.ceil(side / stride) - 1) * stride + kernel_size - side, 0) for side in sides]
    (top, bottom), (left, right) = ((total // 2, total - total // 2) for total in totals)
    return left, right, top, bottom


class SameConv2d(nn.Conv2d):
    """A convolution with TensorFlow's SAME padding, for any kernel size and stride.

    Takes and returns float32 [batch, channels, height, width]. Where it is much faster, on CPUs, it trains by
    Winograd's algorithm.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> None:
        # an odd kernel at stride 1 is padded alike on both sides, which the convolution does itself
        self._symmetric = kernel_size % 2 == 1 and stride == 1
        super().__init__(in_channels, out_channels, kernel_size, stride, kernel_size // 2 if self._symmetric else 0)
        # below, the maps around the multiplications take as long as those that are saved
        self._suits_winograd = kernel_size == KERNEL and self._symmetric and in_channels * out_channels >= 2048

    def forward(self, x: Tensor) -> Tensor:
        if self._trains_by_winograd(x):
            assert self.bias is not None
            return winograd_conv2d(x, self.weight, self.bias)
        if not self._symmetric:
            x = F.pad(x, same_padding(x.shape[2:], self.kernel_size[0], self.stride[0]))
        return super().forward(x)

    def _trains_by_winograd(self, x: Tensor) -> bool:
        """It takes a dozen times the memory of `x`, so not where that would be gigabytes."""
        is_plain = not torch.is_autocast_enabled(x.device.type) and not torch.compiler.is_compiling()
        is_possible = x.device.type == "cpu" and is_plain and x.numel() <= 2**23
        return self._suits_winograd and self.training and is_possible


class SameMaxPool2d(nn.Module):
    """A max-pool with TensorFlow's SAME padding, for any kernel size and stride.

    `padding=1` of torch is another network: on an even side, 3/2 pads at the right and bottom only.
    """

    def __init__(self, kernel_size: int, stride: int) -> None:
        super().__init__()
        self.kernel_size = kernel_size
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """float32 [batch, channels, ceil(height / stride), ceil(width / stride)]."""
        left, right, top, bottom = same_padding(x.shape[2:], self.kernel_size, self.stride)
        if (left, top) == (right, bottom):
            return F.max_pool2d(x, self.kernel_size, self.stride, (top, left))
        if (left, top) == (0, 0) and self.stride > 1:
            # one value is lacking at the end: the last window ends early, and nothing need be copied
            return F.max_pool2d(x, self.kernel_size, self.stride, ceil_mode=True)
        # what lies outside never wins
        return F.max_pool2d(F.pad(x, (left, right, top, bottom), value=-math.inf), self.kernel_size, self.stride)


class LocalResponseNorm(nn.Module):
    """x / (bias + alpha * sum of x² over the channels within `radius`) ** beta.

    TensorFlow's `tf.nn.local_response_normalization`, and Krizhevsky et al. 2012 (section 3.3); torch's own
    LocalResponseNorm divides alpha by the number of channels.
    """

    def __init__(self, channels: int, radius: int, bias: float, alpha: float, beta: float) -> None:
        super().__init__()
        self.beta = beta
        distance = (torch.arange(channels)[:, None] - torch.arange(channels)).abs()
        self.band: Tensor
        self.bias: Tensor
        # the sum over a window of channels as a 1x1 convolution
        dtype = torch.get_default_dtype()
        self.register_buffer("band", alpha * (distance <= radius).to(dtype)[..., None, None], persistent=False)
        self.register_buffer("bias", torch.full((channels,), bias, dtype=dtype), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """float32 [batch, channels, height, width], as given; in float32 also where autocast is on."""
        if torch.is_autocast_enabled(x.device.type):
            with torch.autocast(x.device.type, enabled=False):
                return self.forward(x.float())
        if x.requires_grad and torch.is_grad_enabled():
            normed: Tensor = _TrainedLocalResponseNorm.apply(x, self.band, self.bias, self.beta)
            return normed
        return x * _power(F.conv2d(x * x, self.band, self.bias), -self.beta)


class _TrainedLocalResponseNorm(torch.autograd.Function):
    """The same with the gradient in closed form, which autograd takes twice the passes over memory for:
    g * s^-beta - 2 * beta * x * band(g * x * s^-beta / s), where s is the scale. cifar10 trains 5% faster by it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, band: Tensor, bias: Tensor, beta: float) -> Tensor:
        scale = F.conv2d(x * x, band, bias)
        factor = _power(scale, -beta)
        y = x * factor
        ctx.save_for_backward(x, band, scale, factor, y)
        ctx.beta = beta
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        x, band, scale, factor, y = ctx.saved_tensors
        # the band is symmetric: it is its own transpose
        through_scale = F.conv2d((gradient * y).div_(scale), band * (-2 * ctx.beta)).mul_(x)
        return through_scale.addcmul_(gradient, factor), None, None, None


def _power(x: Tensor, exponent: float) -> Tensor:
    if exponent == -0.75:
        root = x.rsqrt()  # pow() has no vector instructions
        return root.sqrt().mul_(root)
    return x.pow(exponent)


class LocallyConnected2d(nn.Module):
    """A convolution with SAME padding, odd kernel and stride 1 whose weights are not shared between places.

    `weight` is float32 [height * width, patch, out_channels], a patch being (row, column, in channel) of the
    kernel; `bias` is [out_channels, height, width].
    """

    def __init__(self, in_channels: int, out_channels: int, size: tuple[int, int], kernel_size: int) -> None:
        super().__init__()
        self.size = size
        self.kernel_size = kernel_size
        places = size[0] * size[1]
        self.weight = nn.Parameter(torch.empty(places, in_channels * kernel_size**2, out_channels))
        self.bias = nn.Parameter(torch.zeros(out_channels, *size))

    def forward(self, x: Tensor) -> Tensor:
        """float32 [batch, out_channels, height, width] of [batch, in_channels, height, width]."""
        height, width = self.size
        border = self.kernel_size // 2
        # places first: a patch is copied in runs of whole rows of channels, and in onnxruntime by slices,
        # 5 times as fast as F.unfold there, twice as fast in training
        x = F.pad(x.permute(2, 3, 0, 1).contiguous(), (0, 0, 0, 0, border, border, border, border))
        shifts = [(row, column) for row in range(self.kernel_size) for column in range(self.kernel_size)]
        patches = torch.cat([x[row : row + height, column : column + width] for row, column in shifts], 3)
        # one matrix product a place: [places, batch, patch] @ [places, patch, out]
        y = torch.bmm(patches.flatten(0, 1), self.weight).unflatten(0, self.size)
        return y.permute(2, 3, 0, 1) + self.bias


def initialize(layer: nn.Conv2d | nn.Linear | LocallyConnected2d, std: float, bias: float) -> None:
    """Weights by TensorFlow's truncated_normal (beyond two standard deviations drawn again), constant biases."""
    nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)
    assert layer.bias is not None
    nn.init.constant_(layer.bias, bias)
