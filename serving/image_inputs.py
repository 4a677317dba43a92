"""The images that `Classifier.classify` takes: paths, encoded files, Pillow images and NumPy arrays."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from convline.errors import ImageError
from convline.inputs.input_file import FileLocation, FileVersion, InMemory, InputFile, OnDisk, Rejected

ImageInput = str | os.PathLike[str] | bytes | bytearray | memoryview | Image.Image | NDArray[np.uint8]

EXPECTED = (
    "a path (str or Path), an encoded file (bytes), a Pillow image, or a uint8 array, [height, width] or "
    "[height, width, 1, 3 or 4]"
)


@dataclass(frozen=True)
class DecodedImage:
    """The location of an `InputFile` whose image is decoded already."""

    image: Image.Image

    def read(self) -> bytes:
        raise ImageError("unsupported", "this is a decoded image, not a file")

    def version(self) -> FileVersion | None:
        return None


def as_input_files(images: Iterable[ImageInput]) -> Iterator[InputFile]:
    """Each image as an `InputFile`, named by its path or its index.

    Raises TypeError for anything that is not a list of images: at once if it is a single image, else when the wrong
    member of the list is reached.
    """
    if isinstance(images, str | bytes | bytearray | memoryview | os.PathLike | Image.Image):
        raise TypeError(f"expected a list of images, not one {type(images).__name__}; put it into [ ]")
    if isinstance(images, np.ndarray) and images.ndim != 4:
        raise TypeError(f"expected a list of images, or an array of 4 dimensions, not {_description(images)}")
    if not isinstance(images, Iterable):
        raise TypeError(f"expected a list of images, not {type(images).__name__}; each image is {EXPECTED}")
    return (_as_input_file(image, f"image {index}") for index, image in enumerate(images))


def _as_input_file(image: Any, name: str) -> InputFile:
    if isinstance(image, str | os.PathLike) and isinstance(path := os.fspath(image), str):
        return InputFile(path, OnDisk(path))
    if isinstance(image, bytes | bytearray | memoryview):
        return InputFile(name, InMemory(bytes(image)))
    if isinstance(image, Image.Image):
        return InputFile(name, _from_pillow(image))
    if isinstance(image, np.ndarray):
        return InputFile(name, _from_array(image, name))
    raise TypeError(f"{name} is of type {type(image).__name__}; each image is {EXPECTED}")


def _from_pillow(image: Image.Image) -> FileLocation:
    """Load the image at once: Pillow's images may not be loaded by several threads at the same time."""
    try:
        image.load()
    # Pillow's readers raise many kinds of exceptions for malformed files
    except Exception as error:
        message = str(error) or type(error).__name__
        return Rejected(ImageError("truncated" if "truncated" in message else "unreadable", message))
    return DecodedImage(image)


def _from_array(array: NDArray[Any], name: str) -> FileLocation:
    pixels = array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array
    if array.dtype != np.uint8 or not (pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] in (3, 4))):
        raise TypeError(f"{name} is {_description(array)}; each image is {EXPECTED}")
    if not array.size:
        return Rejected(ImageError("empty", "the image has no pixels"))
    return DecodedImage(Image.fromarray(pixels))


def _description(array: NDArray[Any]) -> str:
    return f"an array of {array.dtype} {list(array.shape)}"
