"""The filters (weights) of a network's first layer as images."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import nn

SHOWN_FILTERS = 64
SHEET_WIDTH = 640  # pixels, about


def first_filters(network: nn.Module, image_shape: tuple[int, int, int]) -> NDArray[np.float32] | None:
    """float32 [filters, channels, height, width]: the kernels of a convolution, or the weights of a linear layer in the
    shape of the image (channels, height, width); None if the first layer is neither."""
    first = next((layer for layer in network.modules() if isinstance(layer, (nn.Conv2d, nn.Linear))), None)
    if first is None:
        return None
    weight = first.weight.detach().cpu().float().numpy()[:SHOWN_FILTERS]
    if weight.ndim == 2:
        if weight.shape[1] != math.prod(image_shape):
            return None
        weight = weight.reshape(-1, *image_shape)
    return weight


def filter_sheet(weights: NDArray[np.float32]) -> Image.Image:
    """All filters in a grid with transparent gaps, each scaled to its own range; in colour if they have three
    channels."""
    if weights.shape[1] not in (1, 3):
        weights = weights.mean(1, keepdims=True)
    lowest, highest = (reduce(weights, (1, 2, 3), keepdims=True) for reduce in (np.min, np.max))
    scaled = (255 * (weights - lowest) / np.maximum(highest - lowest, 1e-12)).astype(np.uint8).transpose(0, 2, 3, 1)
    count, height, width, channels = scaled.shape
    columns = math.ceil(math.sqrt(count))
    scale = max(1, SHEET_WIDTH // (columns * width))
    gap = max(2, scale)
    step_x, step_y = width * scale + gap, height * scale + gap
    sheet = Image.new("RGBA", (columns * step_x - gap, math.ceil(count / columns) * step_y - gap))
    for number, image in enumerate(scaled):
        tile = Image.fromarray(image[..., 0] if channels == 1 else image)
        enlarged = tile.resize((width * scale, height * scale), Image.Resampling.NEAREST)
        sheet.paste(enlarged, (number % columns * step_x, number // columns * step_y))
    return sheet
