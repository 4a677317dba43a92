"""Arrange images in labelled rows of one image: contact sheets and grids."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from convline.html import elide_middle

SMALLEST_TILE = 48  # pixels
MARGIN = 4
LABEL_WIDTH = 110

# from images [n, height, width, channels] to images as a network sees them
View = Callable[[NDArray[np.uint8]], NDArray[np.uint8]]


class NetworkViews(NamedTuple):
    """`seen`: images as a network sees them in evaluation. `augmented`: as it sees them at several steps of training,
    [n, steps, height, width, channels]; None where its recipe does not augment."""

    seen: View
    augmented: View | None


def to_pil(image: NDArray[np.uint8]) -> Image.Image:
    """A Pillow image of uint8 [height, width, 1 or 3]."""
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def grid(rows: Sequence[tuple[str, Sequence[Image.Image]]]) -> Image.Image:
    """One image of all rows, each with its label at the left; small images are enlarged."""
    every_image = [image for _, images in rows for image in images]
    width, height = (max(image.size[axis] for image in every_image) for axis in (0, 1))
    scale = max(1, -(-SMALLEST_TILE // max(height, width)))
    tile_width, tile_height = width * scale + MARGIN, height * scale + MARGIN
    is_labelled = any(label for label, _ in rows)
    first_column = LABEL_WIDTH if is_labelled else MARGIN
    font = _font() if is_labelled else None
    columns = max(len(images) for _, images in rows)
    sheet = Image.new("RGB", (first_column + columns * tile_width, len(rows) * tile_height), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (label, images) in enumerate(rows):
        top = number * tile_height
        draw.text((MARGIN, top + tile_height // 2 - 6), elide_middle(label, 16), fill="black", font=font)
        for column, image in enumerate(images):
            enlarged = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
            sheet.paste(enlarged, (first_column + column * tile_width, top + MARGIN // 2))
    return sheet


def _font() -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which supports more scripts than Pillow's own font."""
    import matplotlib

    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf", 11)
