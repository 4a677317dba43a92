"""Thumbnails of a dataset's images from the files of its source, which have more pixels than the dataset stores."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, suppress

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from convline.errors import ConvlineError, ImageError
from convline.images import ImageSpec, decode
from convline.inputs.input_file import InputFile
from convline.inputs.listing import files_at
from convline.time_limit import SECONDS
from pipeline.dataset import Dataset, Split
from pipeline.preparing.parallel_decoding import FileForRow, map_in_processes
from pipeline.preparing.source_location import read_location
from pipeline.reporting.image_grid import to_pil

SIDE = 160  # pixels, at most
FILES_PER_TASK = 4

Thumbnails = dict[int, Image.Image]  # by position in a split


def source_thumbnails(dataset: Dataset, split: Split, paths: dict[int, str], time_limit: float = SECONDS) -> Thumbnails:
    """The whole images at `paths` (by position in `split`) of the dataset's source, fitted into SIDE x SIDE pixels.

    Only images whose file is still there and gives, decoded as the dataset was, the stored pixels. A file that crashes
    its decoder, or takes more than `time_limit` seconds, is left out, too. Empty where the stored images are as large.
    """
    location, spec = read_location(dataset.folder), dataset.spec
    thumbnails: Thumbnails = {}
    if location is None or not paths or min(split.images.shape[1:3]) >= SIDE:
        return thumbnails

    def make(files: list[InputFile]) -> Thumbnails:
        made = {}
        for file in files:
            assert isinstance(file, FileForRow)
            with suppress(ImageError):
                data = file.read()
                if np.array_equal(decode(data, spec), split.images[split.rows[file.row]]):
                    made[file.row] = _fitted(decode(data, ImageSpec(None, None, spec.channels)))
        return made

    positions = {path: position for position, path in paths.items()}

    def files() -> Iterator[FileForRow]:
        for file in files_at(location, positions):
            yield FileForRow(file.path, file.location, row=positions[file.path])

    # a source that is gone, changed or damaged is no error of the report
    with (
        suppress(ConvlineError),
        closing(map_in_processes(make, files(), len(paths), FILES_PER_TASK, time_limit)) as results,
    ):
        for result in results:
            thumbnails |= result
            if len(thumbnails) == len(paths):
                break
    return thumbnails


def _fitted(pixels: NDArray[np.uint8]) -> Image.Image:
    image = to_pil(pixels)
    image.thumbnail((SIDE, SIDE))
    return image
