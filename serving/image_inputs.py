"""The images that the Python API takes, whatever they are: paths, encoded files, images of Pillow, arrays."""

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

Picture = str | os.PathLike[str] | bytes | bytearray | memoryview | Image.Image | NDArray[np.uint8]

TAKEN = (
    "a path (str or Path), an encoded file (bytes), an image of Pillow, or an array of uint8, [height, width] or "
    "[height, width, 1, 3 or 4]"
)


@dataclass(frozen=True)
class Pixels:
    """An image that needs no decoding."""

    image: Image.Image

    def read(self) -> bytes:
        raise ImageError("unsupported", "it is an image, not a file")

    def version(self) -> FileVersion | None:
        return None


def pictures(images: Iterable[Picture]) -> Iterator[InputFile]:
    """Each image as a file is found, called by its path or its place. Raises TypeError for what is none, when it is
    its turn, and at once for a single image.
    """
    if isinstance(images, str | bytes | bytearray | memoryview | os.PathLike | Image.Image):
        raise TypeError(f"a list of images is taken, not one {type(images).__name__}; put it into [ ]")
    if isinstance(images, np.ndarray) and images.ndim != 4:
        raise TypeError(f"a list of images is taken, or an array of 4 dimensions, not {_told(images)}")
    if not isinstance(images, Iterable):
        raise TypeError(f"a list of images is taken, not {type(images).__name__}; each is {TAKEN}")
    return (_picture(image, f"image {place}") for place, image in enumerate(images))


def _picture(image: Any, name: str) -> InputFile:
    if isinstance(image, str | os.PathLike) and isinstance(path := os.fspath(image), str):
        return InputFile(path, OnDisk(path))
    if isinstance(image, bytes | bytearray | memoryview):
        return InputFile(name, InMemory(bytes(image)))
    if isinstance(image, Image.Image):
        return InputFile(name, _loaded(image))
    if isinstance(image, np.ndarray):
        return InputFile(name, _array(image, name))
    raise TypeError(f"{name} is of type {type(image).__name__}; each is {TAKEN}")


def _loaded(image: Image.Image) -> FileLocation:
    """Read here and now: threads that read the same image at once would disturb each other."""
    try:
        image.load()
    # Pillow's readers raise whatever a malformed file makes them stumble over
    except Exception as error:
        told = str(error) or type(error).__name__
        return Rejected(ImageError("truncated" if "truncated" in told else "unreadable", told))
    return Pixels(image)


def _array(array: NDArray[Any], name: str) -> FileLocation:
    grey = array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array
    if array.dtype != np.uint8 or not (grey.ndim == 2 or (grey.ndim == 3 and grey.shape[2] in (3, 4))):
        raise TypeError(f"{name} is {_told(array)}; each is {TAKEN}")
    if not array.size:
        return Rejected(ImageError("empty", "the image has no pixels"))
    return Pixels(Image.fromarray(grey))


def _told(array: NDArray[Any]) -> str:
    return f"an array of {array.dtype} {list(array.shape)}"
