"""Finds near duplicates: images that show the same picture, recompressed, resized or slightly changed.

Candidates are images whose perceptual hashes (pHash: the signs of low frequencies; Zauner, Implementation and
Benchmarking of Perceptual Image Hash Functions, 2010) differ in few bits. They are found by an index, not by comparing
all pairs. Of these, pairs count whose thumbnails are nearly equal.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.preparing.mapped_arrays import chunks

HASHED_SIDE, FREQUENCIES = 32, 8
BANDS, BAND_BITS = 4, 16
MAX_BITS = 7  # with one bit of a band flipped in turn, four bands find every pair that differs in up to 7 bits
THUMBNAIL_SIDE = 8
# of the thumbnails, root mean square, in 0 to 255. 400 images of CIFAR-10 (32 px, JPEG) that were compressed again at
# quality 50 to 90, or enlarged or reduced to 24 to 64 px and back: 1.3 in the median, 5.3 at most, in up to 6 bits
MAX_DIFFERENCE = 5.0
BLANK_STD = 3.0  # of the grey values: images below this show nothing, and their hashes mean nothing
CANDIDATES = 2**22  # compared at once
LARGEST_BUCKET = 1000  # images with the same bits in a band that are compared with each image

Images = NDArray[np.uint8]


class Descriptions(NamedTuple):
    """`hashes` uint64 [n], `thumbnails` uint8 [n, values], and whether each image is blank, bool [n]."""

    hashes: NDArray[np.uint64]
    thumbnails: Images
    is_blank: NDArray[np.bool_]


def describe(*arrays: Images) -> Descriptions:
    """The descriptions of the images of some arrays, uint8 [n, height, width, channels], one array after the other.
    They are read in chunks."""
    described = [_describe(images) for images in arrays]
    return Descriptions(*(np.concatenate(parts) for parts in zip(*described, strict=True)))


def _describe(images: Images) -> Descriptions:
    from scipy.fft import dctn

    height, width, channels = images.shape[1:]
    down, across = area_weights(height, HASHED_SIDE), area_weights(width, HASHED_SIDE)
    small_down, small_across = area_weights(height, THUMBNAIL_SIDE), area_weights(width, THUMBNAIL_SIDE)
    hashes = np.empty(len(images), np.uint64)
    thumbnails = np.empty((len(images), THUMBNAIL_SIDE**2 * channels), np.uint8)
    is_blank = np.empty(len(images), bool)
    for chunk in chunks(images):
        planes = np.moveaxis(images[chunk], -1, 1).astype(np.float32)  # [n, channels, height, width]
        grey = planes.mean(1)
        is_blank[chunk] = grey.std((1, 2)) < BLANK_STD
        thumbnails[chunk] = np.rint(small_down @ planes @ small_across.T).reshape(len(planes), -1)
        low = dctn(down @ grey @ across.T, axes=(1, 2))[:, :FREQUENCIES, :FREQUENCIES].reshape(len(grey), -1)
        low[:, 0] = -np.inf  # the mean says nothing about the picture
        bits = low > np.median(low[:, 1:], 1, keepdims=True)
        hashes[chunk] = np.packbits(bits, 1).view(np.uint64)[:, 0]
    return Descriptions(hashes, thumbnails, is_blank)


def area_weights(size: int, target: int) -> NDArray[np.float32]:
    """The matrix [target, size] that resizes by averaging: each output value is the mean of the part that it covers."""
    edges = np.arange(target + 1) * (size / target)
    pixels = np.arange(size)
    overlap = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    return (overlap.clip(min=0) * (target / size)).astype(np.float32)


def near_pairs(descriptions: Descriptions) -> NDArray[np.int64]:
    """The pairs of near duplicates, int64 [pairs, 2], ascending. Blank images have none."""
    rows = np.flatnonzero(~descriptions.is_blank)
    hashes, thumbnails = descriptions.hashes[rows], descriptions.thumbnails[rows]
    found = [np.zeros((0, 2), np.int64)]
    for one, other in _candidates(hashes):
        is_close = np.bitwise_count(hashes[one] ^ hashes[other]) <= MAX_BITS
        one, other = one[is_close], other[is_close]
        difference = thumbnails[one].astype(np.float32) - thumbnails[other]
        is_near = (difference**2).mean(1) <= MAX_DIFFERENCE**2
        found.append(np.stack([one[is_near], other[is_near]], 1))
    return rows[np.unique(np.concatenate(found), axis=0)]


def _candidates(hashes: NDArray[np.uint64]) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Pairs of images, the first before the second, that differ in at most one bit of a band."""
    flips = np.array([0, *(1 << bit for bit in range(BAND_BITS))], np.uint64)
    for band in range(BANDS):
        keys = (hashes >> np.uint64(BAND_BITS * band)) & np.uint64(2**BAND_BITS - 1)
        order = np.argsort(keys, kind="stable")
        ordered = keys[order]
        for flip in flips:
            begin = np.searchsorted(ordered, keys ^ flip, "left")
            count = np.minimum(np.searchsorted(ordered, keys ^ flip, "right") - begin, LARGEST_BUCKET)
            ends = np.cumsum(count)  # of the candidates of each image
            cuts = np.searchsorted(ends, np.arange(CANDIDATES, count.sum(), CANDIDATES))
            for rows in np.split(np.arange(len(hashes)), cuts):
                one = np.repeat(rows, count[rows])
                starts = np.cumsum(count[rows]) - count[rows]
                within = np.arange(len(one)) - np.repeat(starts, count[rows])
                other = order[np.repeat(begin[rows], count[rows]) + within]
                is_ordered = one < other
                yield one[is_ordered], other[is_ordered]
