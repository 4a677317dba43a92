"""Memory-mapped arrays: read in chunks of bounded size, released from memory when read."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

CHUNK_BYTES = 2**24


def chunks(images: NDArray[np.uint8]) -> Iterator[slice]:
    """Slices that cover the images [n, height, width, channels] in order, of at most 16 MiB or one image each; the
    memory of each is released after it."""
    size = max(1, CHUNK_BYTES // max(1, images[:1].nbytes))
    for start in range(0, len(images), size):
        yield slice(start, start + size)
        release_memory(images)


def release_memory(array: NDArray[Any]) -> None:
    """Drop the pages of a memory map that were read or written: they count as memory of this process. What was written
    goes to the file all the same."""
    base: object = array.base
    if isinstance(base, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):  # which Windows lacks
        base.madvise(mmap.MADV_DONTNEED)
