"""The transparent colour of a PNG, which is told in the file's depth where Pillow compares 8 bits."""

from __future__ import annotations

from io import BytesIO

import numpy as np
from PIL import Image

DEPTH = 24  # where the header states it


def mend_transparency(image: Image.Image, data: bytes) -> None:
    """Correct what `image`, decoded from `data`, holds as its transparent colour."""
    colour = image.info.get("transparency")
    if image.mode == "L" and isinstance(colour, int):
        largest = (1 << data[DEPTH]) - 1
        image.info["transparency"] = (colour & largest) * 255 // largest
    elif image.mode == "RGB" and isinstance(colour, tuple) and data[DEPTH] == 16:
        low = Image.open(BytesIO(data), formats=["PNG"])
        low.tile = [tile._replace(args="RGB;16L") for tile in low.tile]  # the other byte of each sample
        pairs = zip(np.asarray(image).transpose(2, 0, 1), np.asarray(low).transpose(2, 0, 1), colour, strict=True)
        is_clear = np.logical_and.reduce([(high == value >> 8) & (rest == value & 255) for high, rest, value in pairs])
        image.putalpha(Image.fromarray(np.where(is_clear, np.uint8(0), np.uint8(255))))
        del image.info["transparency"]
