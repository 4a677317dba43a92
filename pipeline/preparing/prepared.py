"""What every source of images gives to `preprocess`, whatever it was."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convline.images import ImageSpec

CHUNK = 4096  # images moved at once


@dataclass(frozen=True)
class Prepared:
    """`images` uint8 [n, height, width, channels] (memory-mapped where large), `labels` int64 [n];
    `rows` of each split ("train", and "test" where the source has one); `source` names and checksums it."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    rows: dict[str, NDArray[np.int64]]
    classes: list[str]
    spec: ImageSpec
    source: dict[str, str]
    rejects: list[dict[str, str]] = field(default_factory=list)


def create_array(path: Path, shape: tuple[int, ...], dtype: type = np.uint8) -> NDArray[Any]:
    """A new .npy file, mapped. Raises OSError where the disk is too full for all of it."""
    array: NDArray[Any] = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
    with path.open("r+b") as file:
        # else a full disk is found by a write to the map, which kills the process (SIGBUS)
        os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return array
