"""Changes of brightness, contrast and colour of a whole batch, each image with its own parameters.

Images are [batch, height, width, channels], uint8 or float from 0 to 255; results are float.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.device import copy_to_device
from pipeline.recipe_sections import ColorJitter

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)


def adjust_brightness(images: Tensor, delta: Tensor) -> Tensor:
    """x + `delta` [batch], not clipped: TensorFlow's `tf.image.adjust_brightness` on floats."""
    return images + delta.to(torch.get_default_dtype())[:, None, None, None]


def adjust_contrast(images: Tensor, factor: Tensor) -> Tensor:
    """(x - mean) * `factor` [batch] + mean, with the mean of each channel of each image, not clipped: TensorFlow's
    `tf.image.adjust_contrast`."""
    images = images.to(torch.get_default_dtype())
    mean = images.mean((1, 2), keepdim=True)
    factor = factor.to(torch.get_default_dtype())[:, None, None, None]
    return torch.addcmul(mean * (1 - factor), images, factor)


def grey(images: Tensor) -> Tensor:
    """The brightness of each pixel, [batch, height, width, 1]: that of ITU-R 601, as torchvision's `rgb_to_grayscale`.
    A grey image is its own."""
    if images.shape[-1] == 1:
        return images.to(torch.get_default_dtype())
    red, green, blue = images.unbind(-1)
    return (0.2989 * red).add_(green, alpha=0.587).add_(blue, alpha=0.114)[..., None]


def blend(images: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    """`factor` * images + (1 - `factor`) * other, clipped to 0 to 255, of float images. `factor` [batch, 1, 1, 1] is
    not below 0; `other` may be one value for an image, or one for a pixel.

    torchvision's `adjust_brightness` with black as the other image, `adjust_contrast` with the mean of the grey image,
    `adjust_saturation` with the grey image.
    """
    return torch.lerp(other, images, factor).clamp_(0, 255)


def turn_hue(images: Tensor, turn: Tensor) -> Tensor:
    """RGB images whose hue is turned by `turn` [batch], where 1 is once around the colour wheel: torchvision's
    `adjust_hue`, through HSV."""
    red, green, blue = images.unbind(-1)
    value = torch.maximum(torch.maximum(red, green), blue)
    chroma = value - torch.minimum(torch.minimum(red, green), blue)
    divisor = torch.where(chroma == 0, 1, chroma)
    from_green, from_blue = torch.add(blue - red, divisor, alpha=2), torch.add(red - green, divisor, alpha=4)
    hue = torch.where(value == red, green - blue, torch.where(value == green, from_green, from_blue)).div_(divisor)
    hue += 6 * turn[:, None, None]  # in sixths of the wheel
    channels = []
    for sector in (5, 3, 1):
        place = hue + sector
        place.sub_((place / 6).floor_(), alpha=6)  # remainder_ takes three times as long
        # a channel is below the value by chroma * min(place, 4 - place), cut off at 0 and 1 (Wikipedia, "HSL and HSV")
        below = place.sub_(2).abs_().neg_().add_(2).clamp_(0, 1).mul_(chroma)
        channels.append(value - below)
    return torch.stack(channels, 1).clamp_(0, 255).permute(0, 2, 3, 1)


class JitterDraws(NamedTuple):
    """Random numbers of ColorJitter. `order`, int64 [operations, batch]: which operation is the first, the second, …
    `amounts`, float64 [4, batch]: the factors of brightness, contrast and saturation, and the turn of the hue."""

    order: NDArray[np.int64]
    amounts: NDArray[np.float64]

    def share(self, share: slice) -> JitterDraws:
        return JitterDraws(self.order[:, share], self.amounts[:, share])


def draw_jitter(rng: np.random.Generator, count: int, settings: ColorJitter) -> JitterDraws:
    """Factors from U(max(0, 1 - value), 1 + value), turns from U(-hue, hue), and the order of the operations that
    `settings` turn on, each order equally likely: torchvision's ColorJitter."""
    values = np.array([settings.brightness, settings.contrast, settings.saturation, settings.hue])
    uniform, rank = rng.random((2, 4, count))
    lowest = np.where(np.arange(4) == HUE, -values, np.maximum(0, 1 - values))[:, None]
    highest = np.where(np.arange(4) == HUE, values, 1 + values)[:, None]
    is_on = np.flatnonzero(values)
    return JitterDraws(is_on[rank[is_on].argsort(0)], lowest + uniform * (highest - lowest))


def color_jitter(images: Tensor, draws: JitterDraws) -> Tensor:
    """torchvision's ColorJitter, on floats, with each image's operations in its own order.

    Saturation and hue leave grey images as they are.
    """
    is_grey = images.shape[-1] == 1
    # channel after channel: each operation then reads and writes whole planes
    images = images.to(torch.get_default_dtype()).permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    for operation in draws.order:
        images = _blend_each(images, operation, draws.amounts)
        turned = np.flatnonzero(operation == HUE)
        if len(turned) and not is_grey:
            turns = torch.from_numpy(draws.amounts[HUE, turned])
            index = copy_to_device(torch.from_numpy(turned), images.device)
            turn = copy_to_device(turns, images.device).to(images.dtype)
            images.index_copy_(0, index, turn_hue(images.index_select(0, index), turn))
    return images


def _blend_each(images: Tensor, operation: NDArray[np.int64], amounts: NDArray[np.float64]) -> Tensor:
    """Images with the brightness, contrast or saturation changed, whichever `operation` [batch] says for each."""
    is_blended = operation != HUE
    if images.shape[-1] == 1:
        is_blended &= operation != SATURATION
    factors = np.where(is_blended, np.take_along_axis(amounts, operation[None], 0)[0], 1)
    coefficients = np.stack([factors, operation == CONTRAST, operation == SATURATION])
    factor, of_mean, of_grey = copy_to_device(torch.from_numpy(coefficients), images.device).to(images.dtype)[
        ..., None, None, None
    ]
    if np.isin(operation, (CONTRAST, SATURATION)).any():
        brightness = grey(images)
        return blend(images, of_mean * brightness.mean((1, 2), keepdim=True) + of_grey * brightness, factor)
    return blend(images, torch.zeros_like(factor), factor)
