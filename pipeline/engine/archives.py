"""Readers of official archives. A new format is a function here and a line in READERS."""

from __future__ import annotations

import gzip
import hashlib
import math
import struct
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.download import Official
from pipeline.engine.prepared import Prepared
from serving.errors import ConvlineError
from serving.images import ImageSpec


def read_idx_archives(official: Official, paths: Sequence[Path]) -> Prepared:
    """Train images, train labels, test images, test labels, each a gzipped IDX file."""
    train_images, train_labels, test_images, test_labels = (read_idx(path) for path in paths)
    images = np.concatenate([train_images, test_images])[..., None]
    labels = np.concatenate([train_labels, test_labels]).astype(np.int64)
    if len(images) != len(labels) or len(train_images) != len(train_labels):
        raise ConvlineError(f"{official.name}: images and labels differ in number; fetch the archives again")
    rows = np.arange(len(labels))
    splits = {"train": rows[: len(train_labels)], "test": rows[len(train_labels) :]}
    height, width = images.shape[1:3]
    return Prepared(images, labels, splits, official.classes, ImageSpec(height, width, 1), _source(official))


def read_idx(path: Path) -> NDArray[np.uint8]:
    """A gzipped IDX file of unsigned bytes (the format of http://yann.lecun.com/exdb/mnist/).

    Raises ConvlineError where it is not one.
    """
    try:
        content = gzip.decompress(path.read_bytes())
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ConvlineError(f"{path} is damaged ({error}); delete it and download it again") from error
    if len(content) < 4 or content[:3] != b"\x00\x00\x08":
        raise ConvlineError(f"{path} is no IDX file of unsigned bytes; download it again")
    rank = content[3]
    if len(content) < 4 + 4 * rank:
        raise ConvlineError(f"{path} ends inside its header; download it again")
    shape = struct.unpack_from(f">{rank}I", content, 4)
    start = 4 + 4 * rank
    if len(content) - start != math.prod(shape):
        raise ConvlineError(f"{path} announces {shape} and holds {len(content) - start} bytes; download it again")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def _source(official: Official) -> dict[str, str]:
    """The archives' name and one SHA-256 over all of their published checksums."""
    checksums = "\n".join(f"{name} {checksum}" for name, checksum in official.files.items())
    return {"name": f"{official.name}, official archives", "sha256": hashlib.sha256(checksums.encode()).hexdigest()}


READERS: dict[str, Callable[[Official, Sequence[Path]], Prepared]] = {"idx": read_idx_archives}
