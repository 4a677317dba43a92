"""Writes the images of each split into an array file of its own. Images that are decoded on disk are moved, not copied:
the disk holds a twentieth of them twice at most."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.preparing.decoded_source import DecodedSource, create_array
from pipeline.preparing.mapped_arrays import CHUNK_BYTES, chunks, release_memory

Rows = NDArray[np.int64]


def write_splits(folder: Path, decoded: DecodedSource, rows: Mapping[str, Rows]) -> dict[str, NDArray[np.uint8]]:
    """Write `<split>.images.npy` for each split from its `rows`, ascending, and return the arrays, memory-mapped.

    Of grey images that were decoded as RGB one channel is stored. The file of `decoded` becomes that of the first
    split.
    """
    if decoded.file is None:
        return {split: _copied(_path(folder, split), decoded, split_rows) for split, split_rows in rows.items()}
    channels = decoded.spec.channels
    if channels < decoded.images.shape[-1]:
        _keep_first_channel(decoded.images)
    shape = (*decoded.images.shape[1:3], channels)
    offset = decoded.file.stat().st_size - decoded.images.nbytes  # of the header
    _sort(decoded.file, offset, shape, len(decoded.images), np.concatenate(list(rows.values())))
    first, *others = rows
    end = sum(map(len, rows.values()))
    step = max(1, min(CHUNK_BYTES // int(np.prod(shape)), end // 20))  # images that the disk holds twice
    for split in reversed(others):
        _move_end(decoded.file, _path(folder, split), offset, (end - len(rows[split]), end), shape, step)
        end -= len(rows[split])
    os.truncate(decoded.file, offset + end * int(np.prod(shape)))
    _write_header(decoded.file, offset, (end, *shape))
    decoded.file.rename(_path(folder, first))
    return {split: np.lib.format.open_memmap(_path(folder, split), mode="r") for split in rows}


def _path(folder: Path, split: str) -> Path:
    return folder / f"{split}.images.npy"


def _copied(path: Path, decoded: DecodedSource, rows: Rows) -> NDArray[np.uint8]:
    """A new file with the rows of images that are in memory."""
    images = create_array(path, (len(rows), *decoded.images.shape[1:3], decoded.spec.channels))
    for chunk in chunks(images):
        images[chunk] = decoded.images[rows[chunk], ..., : decoded.spec.channels]
    return images


def _keep_first_channel(images: NDArray[np.uint8]) -> None:
    """Move the first channels of all images to the beginning of their memory."""
    values = images.reshape(-1)
    size = int(np.prod(images.shape[1:3]))
    for chunk in chunks(images):
        grey = images[chunk, ..., 0].reshape(-1).copy()
        values[chunk.start * size : chunk.start * size + len(grey)] = grey


def _sort(file: Path, offset: int, shape: tuple[int, ...], count: int, wanted: Rows) -> None:
    """Bring the images at the rows `wanted` to the beginning of the array, in this order, each moved once."""
    images = np.memmap(file, np.uint8, "r+", offset, (count, *shape))
    left_over = np.setdiff1d(np.arange(count), wanted, assume_unique=True)
    source_of = np.concatenate([wanted, left_over])  # a permutation
    is_done = source_of == np.arange(count)
    moved, at_once = 0, max(1, CHUNK_BYTES // int(np.prod(shape)))
    for start in np.flatnonzero(~is_done).tolist():
        if is_done[start]:
            continue
        displaced = images[start].copy()
        row = start
        while (source := int(source_of[row])) != start:  # once around the cycle
            images[row] = images[source]
            is_done[row] = True
            row = source
            moved += 1
            if moved % at_once == 0:
                release_memory(images)
        images[row] = displaced
        is_done[row] = True
    images.flush()


def _move_end(file: Path, target: Path, offset: int, span: tuple[int, int], shape: tuple[int, ...], step: int) -> None:
    """Move the images of the rows `span`, the last ones of `file`, to a new file, `step` at a time from the end."""
    begin, end = span
    size = int(np.prod(shape))
    with file.open("r+b") as source, target.open("w+b") as moved:
        np.lib.format.write_array_header_1_0(moved, _header((end - begin, *shape)))
        start_of_data = moved.tell()
        while end > begin:
            first = max(begin, end - step)
            source.seek(offset + first * size)
            data = source.read((end - first) * size)
            moved.seek(start_of_data + (first - begin) * size)
            moved.write(data)
            moved.flush()
            source.truncate(offset + first * size)
            end = first


def _write_header(file: Path, offset: int, shape: tuple[int, ...]) -> None:
    """Replace the header of a .npy file, which ends at `offset`. NumPy pads headers so that the number of rows may grow
    to 21 digits, so the new one is as long."""
    with file.open("r+b") as opened:
        np.lib.format.write_array_header_1_0(opened, _header(shape))
        assert opened.tell() == offset


def _header(shape: tuple[int, ...]) -> dict[str, object]:
    return {"descr": "|u1", "fortran_order": False, "shape": shape}
