"""What every image source gives to `preprocess`: decoded images with labels, splits, classes and rejects."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from convline.images import ImageSpec

ZEROS = 2**24  # bytes written at once


@dataclass(frozen=True)
class DecodedSource:
    """`images` uint8 [n, height, width, channels] (memory-mapped where large) and `labels` int64 [n] of all splits;
    `rows`: indices of each split's images, int64 ("train", and "test" and "validation" where the source has them);
    `spec`: as the images are to be stored (`images` may have three equal channels where it says one); `source`: name
    and SHA-256; `paths`: of each image in the source, empty where it has none; `groups`: the name of each image's
    group, "" for none, empty where no image has one; `file`: where `images` lie on disk, if they do; `sizes`: by row,
    the (height, width) of each image in the source, empty where that is not known; `location`: the folder or archive
    that the paths are in."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    rows: dict[str, NDArray[np.int64]]
    classes: list[str]
    spec: ImageSpec
    source: dict[str, str]
    rejects: list[dict[str, str]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    groups: list[str] = field(default_factory=list)
    file: Path | None = None
    sizes: Mapping[int, tuple[int, int]] = field(default_factory=dict)
    location: Path | None = None


def create_array(path: Path, shape: tuple[int, ...], dtype: type = np.uint8) -> NDArray[Any]:
    """A new .npy file of zeros, memory-mapped. Raises OSError if the disk is too full for it."""
    array: NDArray[Any] = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
    # without reserved blocks, a write to the map of a full disk kills the process (SIGBUS)
    with path.open("r+b") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
        else:  # macOS, Windows
            _write_zeros(file, path.stat().st_size - array.nbytes, array.nbytes)
    return array


def _write_zeros(file: IO[bytes], start: int, size: int) -> None:
    file.seek(start)
    for written in range(0, size, ZEROS):
        file.write(bytes(min(ZEROS, size - written)))
