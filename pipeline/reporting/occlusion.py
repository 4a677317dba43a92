"""Where a network looked: how much its answer depends on each part of an image, by covering that part.

Zeiler and Fergus, "Visualizing and Understanding Convolutional Networks", 2014 (arXiv:1311.2901), section 4.2. It asks
nothing of the network, so it works for every one.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.network import Predict
from pipeline.reporting.image_grid import to_pil

PLACES = 8  # of the cover, along each side
COVER = 4  # the cover's sides are this part of the image's
SIDE = 160  # pixels of a shown map, at least

Pixels = NDArray[np.uint8]


def occlusion_map(predict: Predict, image: Pixels, label: int) -> NDArray[np.float32]:
    """By how much the probability of class `label` falls where a rectangle is covered with the image's mean colour: for
    each pixel the mean over the rectangles that cover it, float32 [height, width], negative where it rises. `image`:
    uint8 [height, width, channels]."""
    tops, height = _places(image.shape[0])
    lefts, width = _places(image.shape[1])
    covers = [(slice(top, top + height), slice(left, left + width)) for top in tops for left in lefts]
    images = np.repeat(image[None], 1 + len(covers), 0)  # the first one stays as it is
    for covered, cover in zip(images[1:], covers, strict=True):
        covered[cover] = np.rint(image.mean((0, 1)))
    probability = predict(images)[0][:, label]
    total, count = np.zeros(image.shape[:2], np.float32), np.zeros(image.shape[:2], np.float32)
    for cover, fall in zip(covers, probability[0] - probability[1:], strict=True):
        total[cover] += fall
        count[cover] += 1
    return total / count


def _places(side: int) -> tuple[NDArray[np.int64], int]:
    """Where the cover begins along a side, evenly from end to end and without gaps, and its length."""
    length = max(1, -(-side // COVER))
    return np.unique(np.linspace(0, side - length, PLACES).round().astype(np.int64)), length


def overlay(image: Pixels, fall: NDArray[np.float32]) -> Image.Image:
    """The image in grey, brighter and warmer where the probability falls most."""
    import matplotlib

    height, width = image.shape[:2]
    scale = max(1, -(-SIDE // max(height, width)))
    size = (width * scale, height * scale)
    grey = np.asarray(to_pil(image).convert("L").resize(size, Image.Resampling.NEAREST), np.float32)[..., None]
    heat = np.clip(fall, 0, None) / max(float(fall.max()), 1e-6)
    smooth = np.asarray(Image.fromarray(heat.astype(np.float32)).resize(size, Image.Resampling.BICUBIC)).clip(0, 1)
    colours = 255 * matplotlib.colormaps["inferno"](smooth)[..., :3]
    return Image.fromarray((0.5 * grey + 0.5 * colours).astype(np.uint8))
