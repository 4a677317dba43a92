"""Winograd's algorithm against the plain convolution."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from models.layers import SameConv2d
from models.winograd import winograd_conv2d

SIDES = [(12, 12), (14, 14), (13, 9), (4, 7), (1, 3), (5, 28)]


def arguments(height: int, width: int, dtype: torch.dtype) -> list[Tensor]:
    draw = torch.Generator().manual_seed(height * 100 + width)
    shapes = ((3, 5, height, width), (7, 5, 5, 5), (7,))
    return [torch.randn(shape, generator=draw, dtype=dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize(("height", "width"), SIDES)
@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-13), (torch.float32, 3e-5)])
def test_values_and_gradients_are_those_of_the_plain_convolution(
    height: int, width: int, dtype: torch.dtype, error: float
) -> None:
    inputs = arguments(height, width, dtype)
    exact_inputs = [value.detach().double().requires_grad_() for value in inputs]
    images, weight, bias = exact_inputs
    result, exact = winograd_conv2d(*inputs), F.conv2d(images, weight, bias, padding=2)
    assert result.dtype == dtype
    assert result.is_contiguous(memory_format=torch.channels_last)
    gradient = torch.randn(exact.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gradients = torch.autograd.grad(result, inputs, gradient.to(dtype))
    exact_gradients = torch.autograd.grad(exact, exact_inputs, gradient)
    for value, true in zip((result, *gradients), (exact, *exact_gradients), strict=True):
        assert (value - true).abs().max() <= error * true.abs().max()


def test_a_large_layer_trains_by_winograds_algorithm_and_predicts_by_the_plain_convolution() -> None:
    torch.manual_seed(0)
    layer, x = SameConv2d(64, 64, 5), torch.randn(2, 64, 12, 12)
    assert layer.bias is not None
    plain = F.conv2d(x, layer.weight, layer.bias, padding=2)
    assert torch.equal(layer.eval()(x), plain)
    trained = layer.train()(x)
    assert torch.equal(trained, winograd_conv2d(x, layer.weight, layer.bias))
    assert not torch.equal(trained, plain)
    for other in (SameConv2d(64, 64, 3), SameConv2d(64, 64, 5, stride=2), SameConv2d(3, 64, 5)):
        images = torch.randn(2, other.in_channels, 12, 12)
        assert torch.equal(other.train()(images), other.eval()(images))


def test_large_inputs_use_the_plain_convolution_to_save_memory() -> None:
    layer = SameConv2d(64, 32, 5)
    x = torch.randn(1, 64, 363, 364)  # 34 MB
    with torch.no_grad():
        assert torch.equal(layer.train()(x), layer.eval()(x))


def test_training_works_after_a_first_use_in_inference_mode() -> None:
    inputs = arguments(23, 27, torch.float32)  # sizes that no other test uses, because the matrices are cached
    with torch.inference_mode():
        winograd_conv2d(*inputs)
    winograd_conv2d(*inputs).sum().backward()
    assert inputs[1].grad is not None
