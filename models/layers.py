"""Layers that torch lacks or defines differently: SAME padding, local response normalisation, locally connected."""

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

    The output has ceil(side / stride) values per side; where the number of padding values is odd, the extra one is
    at the right or the bottom (https://www.tensorflow.org/api_docs/python/tf/nn#notes_on_padding_2).
    """
    totals = [max((math.ceil(side / stride) - 1) * stride + kernel_size - side, 0) for side in sides]
    (top, bottom), (left, right) = ((total // 2, total - total // 2) for total in totals)
    return left, right, top, bottom


class SameConv2d(nn.Conv2d):
    """A convolution with TensorFlow's SAME padding, for any kernel size and stride.

    Takes and returns float32 [batch, channels, height, width]. On CPUs, 5x5 convolutions between many channels train
    by Winograd's algorithm, which is much faster (see models/winograd.py).
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> None:
        # an odd kernel at stride 1 needs the same padding on both sides, which nn.Conv2d can add itself
        self._symmetric = kernel_size % 2 == 1 and stride == 1
        super().__init__(in_channels, out_channels, kernel_size, stride, kernel_size // 2 if self._symmetric else 0)
        # with fewer channels, the transforms take as long as the multiplications that they save
        self._suits_winograd = kernel_size == KERNEL and self._symmetric and in_channels * out_channels >= 2048

    def forward(self, x: Tensor) -> Tensor:
        if self._trains_by_winograd(x):
            assert self.bias is not None
            return winograd_conv2d(x, self.weight, self.bias)
        if not self._symmetric:
            x = F.pad(x, same_padding(x.shape[2:], self.kernel_size[0], self.stride[0]))
        return super().forward(x)

    def _trains_by_winograd(self, x: Tensor) -> bool:
        """Whether to use Winograd for `x`. It takes a dozen times the memory of `x`, so large inputs do without."""
        is_plain = not torch.is_autocast_enabled(x.device.type) and not torch.compiler.is_compiling()
        is_possible = x.device.type == "cpu" and is_plain and x.numel() <= 2**23
        return self._suits_winograd and self.training and is_possible


class SameMaxPool2d(nn.Module):
    """A max-pool with TensorFlow's SAME padding, for any kernel size and stride.

    torch's `padding=1` is not the same: on an even side, SAME with kernel 3 and stride 2 pads at the right and bottom
    only.
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
            # padding is needed at the end only: ceil_mode cuts the last window off there, without a padded copy
            return F.max_pool2d(x, self.kernel_size, self.stride, ceil_mode=True)
        # -inf is never the maximum
        return F.max_pool2d(F.pad(x, (left, right, top, bottom), value=-math.inf), self.kernel_size, self.stride)


class LocalResponseNorm(nn.Module):
    """x / (bias + alpha * sum of x² over the channels within `radius`) ** beta, for each channel.

    As TensorFlow's `tf.nn.local_response_normalization` and Krizhevsky et al. 2012 (section 3.3); torch's
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
        """float32 [batch, channels, height, width] from the same shape; float32 also under autocast."""
        if torch.is_autocast_enabled(x.device.type):
            with torch.autocast(x.device.type, enabled=False):
                return self.forward(x.float())
        if x.requires_grad and torch.is_grad_enabled():
            normalized: Tensor = _LocalResponseNormFunction.apply(x, self.band, self.bias, self.beta)
            return normalized
        return x * _power(F.conv2d(x * x, self.band, self.bias), -self.beta)


class _LocalResponseNormFunction(torch.autograd.Function):
    """LocalResponseNorm with its gradient in closed form: g * s^-beta - 2 * beta * x * band(g * x * s^-beta / s), where
    g is the output's gradient and s the scale. autograd's own needs twice the passes over memory; cifar10 trains 5%
    faster with this one."""

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
        # the transposed convolution is the same one, because the band is symmetric
        through_scale = F.conv2d((gradient * y).div_(scale), band * (-2 * ctx.beta)).mul_(x)
        return through_scale.addcmul_(gradient, factor), None, None, None


def _power(x: Tensor, exponent: float) -> Tensor:
    if exponent == -0.75:
        root = x.rsqrt()  # pow() is not vectorised
        return root.sqrt().mul_(root)
    return x.pow(exponent)


class LocallyConnected2d(nn.Module):
    """A convolution with SAME padding, odd kernel and stride 1 whose weights are not shared between positions.

    `weight` is float32 [height * width, patch, out_channels], where a patch is (row, column, in channel) of the kernel;
    `bias` is [out_channels, height, width].
    """

    def __init__(self, in_channels: int, out_channels: int, size: tuple[int, int], kernel_size: int) -> None:
        super().__init__()
        self.size = size
        self.kernel_size = kernel_size
        positions = size[0] * size[1]
        self.weight = nn.Parameter(torch.empty(positions, in_channels * kernel_size**2, out_channels))
        self.bias = nn.Parameter(torch.zeros(out_channels, *size))

    def forward(self, x: Tensor) -> Tensor:
        """float32 [batch, out_channels, height, width] of [batch, in_channels, height, width]."""
        height, width = self.size
        border = self.kernel_size // 2
        # positions come first, so that patches are copied in long runs (in onnxruntime: by slices): 5 times as fast as
        # F.unfold in onnxruntime, twice as fast in training
        x = F.pad(x.permute(2, 3, 0, 1).contiguous(), (0, 0, 0, 0, border, border, border, border))
        shifts = [(row, column) for row in range(self.kernel_size) for column in range(self.kernel_size)]
        patches = torch.cat([x[row : row + height, column : column + width] for row, column in shifts], 3)
        # one matrix product per position: [positions, batch, patch] @ [positions, patch, out]
        y = torch.bmm(patches.flatten(0, 1), self.weight).unflatten(0, self.size)
        return y.permute(2, 3, 0, 1) + self.bias


def initialize(layer: nn.Conv2d | nn.Linear | LocallyConnected2d, std: float, bias: float) -> None:
    """Draw weights as TensorFlow's truncated_normal does (values beyond two standard deviations are redrawn), and set
    all biases to `bias`."""
    nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)
    assert layer.bias is not None
    nn.init.constant_(layer.bias, bias)
