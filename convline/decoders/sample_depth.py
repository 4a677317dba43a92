"""Samples of any depth become 8 bits, and alpha of either kind stands on white."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops


def to_8_bits(bits: int) -> NDArray[np.uint8]:
    """What each sample of so many bits becomes: 0 stays 0, the largest becomes 255."""
    levels = np.arange(1 << bits)
    return np.rint(levels * 255 / (len(levels) - 1)).astype(np.uint8)


def with_alpha(image: Image.Image, alpha: NDArray[np.uint8], *, is_associated: bool) -> Image.Image:
    """`image`, of mode L or RGB, with its alpha; where colours were multiplied by it (associated), on white."""
    if is_associated:
        rest = Image.fromarray(255 - alpha)
        return Image.merge(image.mode, [ImageChops.add(band, rest) for band in image.split()])
    image.putalpha(Image.fromarray(alpha))
    return image
