"""Corrects the transparent colour of PNG (tRNS): the file states it in its own bit depth, Pillow compares 8 bits."""

from __future__ import annotations

from io import BytesIO

import numpy as np
from PIL import Image

BIT_DEPTH = 24  # offset of the byte that states it


def fix_transparency(image: Image.Image, data: bytes) -> None:
    """Correct the transparent colour, or the alpha, of `image`, which was decoded from `data`."""
    colour = image.info.get("transparency")
    if image.mode == "L" and isinstance(colour, int):
        largest = (1 << data[BIT_DEPTH]) - 1
        image.info["transparency"] = (colour & largest) * 255 // largest
    elif image.mode == "RGB" and isinstance(colour, tuple) and data[BIT_DEPTH] == 16:
        # Pillow keeps the high bytes of 16-bit samples: decode again for the low bytes
        low_bytes = Image.open(BytesIO(data), formats=["PNG"])
        low_bytes.tile = [tile._replace(args="RGB;16L") for tile in low_bytes.tile]
        highs, lows = (np.asarray(part).transpose(2, 0, 1) for part in (image, low_bytes))
        bands = zip(highs, lows, colour, strict=True)
        is_clear = np.logical_and.reduce([(high == value >> 8) & (low == value & 255) for high, low, value in bands])
        image.putalpha(Image.fromarray(np.where(is_clear, np.uint8(0), np.uint8(255))))
        del image.info["transparency"]
