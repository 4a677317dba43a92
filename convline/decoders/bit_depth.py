"""Bit depths and alpha: scales samples of 1 to 16 bits to 8, and handles straight and premultiplied alpha."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops


def to_8_bits(bits: int) -> NDArray[np.uint8]:
    """A lookup table from samples of `bits` bits to 8 bits: 0 stays 0, the largest becomes 255."""
    levels = np.arange(1 << bits)
    return np.rint(levels * 255 / (len(levels) - 1)).astype(np.uint8)


def with_alpha(image: Image.Image, alpha: NDArray[np.uint8], *, is_premultiplied: bool) -> Image.Image:
    """Add an alpha channel to `image` (mode L or RGB); if the colours are premultiplied, composite it on white."""
    if is_premultiplied:
        white = Image.fromarray(255 - alpha)
        return Image.merge(image.mode, [ImageChops.add(band, white) for band in image.split()])
    image.putalpha(Image.fromarray(alpha))
    return image
