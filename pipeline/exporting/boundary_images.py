"""Boundary images: blends of two images that lie where a network's prediction changes from one class to another.

Where a softmax is saturated, a wrong bias changes no probability. On the way from an image to another one with a
different prediction, the two most probable classes change places, and there the softmax is not saturated.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pipeline.network import Predict

PAIRS = 32
HALVINGS = 12  # of the way between the two images: 1/4096 of it remains
SEED = 20151109

Images = NDArray[np.uint8]


class BoundaryImages:
    """Collects a few images of every predicted class, whatever the order of the images, and blends pairs of them."""

    def __init__(self, classes: int) -> None:
        self._images_per_class = max(2, 2 * PAIRS // classes)
        self._images: dict[int, list[Images]] = {}  # by predicted class

    def add(self, images: Images, predicted: NDArray[np.int64]) -> None:
        """Images as stored, uint8 [n, height, width, channels], and the class predicted for each, int64 [n]."""
        for label in np.unique(predicted).tolist():
            collected = self._images.setdefault(label, [])
            room = min(self._images_per_class - len(collected), 2 * PAIRS - sum(map(len, self._images.values())))
            collected += [image.copy() for image in images[predicted == label][: max(0, room)]]

    def near_boundary(self, predict: Predict) -> Images:
        """The blends, uint8 [n, height, width, channels]; none where all images have the same prediction.

        The first half has, for each pair, the last blend with the first image's prediction; the second half the next
        blend, which has another prediction.
        """
        pairs = self._pairs()
        if not pairs:
            return np.zeros((0, 1, 1, 1), np.uint8)
        labels = np.array([label for label, _, _ in pairs])
        first, second = (np.stack([pair[index] for pair in pairs]).astype(np.float64) for index in (1, 2))
        # each pixel is rounded up at another share, so that there are as many blends between two images as pixels
        dither = np.random.default_rng(SEED).random(first.shape[1:])
        low = np.zeros((len(pairs), 1, 1, 1))
        high = np.ones_like(low)

        def blend(share: NDArray[np.float64]) -> Images:
            return np.floor(first + (second - first) * share + dither).astype(np.uint8)

        for _ in range(HALVINGS):
            middle = (low + high) / 2
            is_same = (predict(blend(middle))[1].argmax(1) == labels)[:, None, None, None]
            low, high = np.where(is_same, middle, low), np.where(is_same, high, middle)
        return np.concatenate([blend(low), blend(high)])

    def _pairs(self) -> list[tuple[int, Images, Images]]:
        """Predicted class, an image with that prediction, and an image with another prediction."""
        if len(self._images) < 2:
            return []
        longest = max(map(len, self._images.values()))
        by_class = sorted(self._images.items())
        mixed = [(label, images[i]) for i in range(longest) for label, images in by_class if i < len(images)]
        pairs = []
        for index, (label, image) in enumerate(mixed[:PAIRS]):
            others = (*mixed[index + 1 :], *mixed[:index])
            pairs.append((label, image, next(other for other_label, other in others if other_label != label)))
        return pairs
