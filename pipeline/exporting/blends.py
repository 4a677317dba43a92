"""Blends of two training images of different classes, which stand in for validation images where none are held out.

A network answers right and sure on the images that it was trained on, whatever int8 does to it. Blends lie between
classes, as images do that it has not seen and finds hard.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from pipeline.dataset import Split
from pipeline.exporting.parity_result import NamedBatch
from serving.batch_size import SERVING_BATCH

SEED = 20151109


def blended_batches(split: Split, count: int) -> Iterator[NamedBatch]:
    """`count` blends in batches of the size that serving uses, without labels; the same ones every time.

    The first image of a blend is a random one of the split, the second a random one of the other classes, and the
    second's share is drawn from U(0, 1).
    """
    draws = np.random.default_rng(SEED)
    by_class = np.argsort(split.labels[split.rows], kind="stable")
    labels = split.labels[split.rows][by_class]
    for start in range(0, count, SERVING_BATCH):
        size = min(SERVING_BATCH, count - start)
        first = draws.integers(len(labels), size=size)
        begin, end = (np.searchsorted(labels, labels[first], side) for side in ("left", "right"))
        # counted from the end of the first image's class on, and around
        second = (end + draws.integers(len(labels) - (end - begin))) % len(labels)
        one, other = (_read(split, by_class[chosen]) for chosen in (first, second))
        share = draws.random((size, 1, 1, 1), np.float32)
        images = np.rint(one + share * (other - one)).astype(np.uint8)
        yield NamedBatch([f"blend {start + i}" for i in range(size)], images)


def _read(split: Split, places: NDArray[np.int64]) -> NDArray[np.float32]:
    """The images at some places of a split, 0 to 255, [n, height, width, channels]."""
    images = split.images[split.rows[places]].astype(np.float32)
    split.release_memory()
    return images
