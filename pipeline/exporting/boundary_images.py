"""Images near the decision boundary: blends of two images to which a network gives different answers.

Where a softmax is saturated, a wrong bias changes no probability. Between two such images there is a place where the
two most probable classes change places, and nothing is saturated there.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pipeline.network import Predict

PAIRS = 32
HALVINGS = 12  # of the way from one image to the other: 1/4096 of it is left
SEED = 20151109

Images = NDArray[np.uint8]


class BoundaryImages:
    """Chooses the pairs among the images that are taken in: a few of every answer, whatever their order is."""

    def __init__(self, classes: int) -> None:
        self._each = max(2, 2 * PAIRS // classes)
        self._kept: dict[int, list[Images]] = {}

    def take(self, images: Images, answers: NDArray[np.int64]) -> None:
        """Images as stored, uint8 [n, height, width, channels], and the most probable class of each, int64 [n]."""
        for answer in np.unique(answers).tolist():
            kept = self._kept.setdefault(answer, [])
            room = min(self._each - len(kept), 2 * PAIRS - sum(map(len, self._kept.values())))
            kept += [image.copy() for image in images[answers == answer][: max(0, room)]]

    def near_boundary(self, predict: Predict) -> Images:
        """By pair the last blend that gets the first image's answer, and the first that gets another one: uint8 [n,
        height, width, channels], two a pair; none where all images get one answer."""
        pairs = self._pairs()
        if not pairs:
            return np.zeros((0, 1, 1, 1), np.uint8)
        answers = np.array([answer for answer, _, _ in pairs])
        begin, end = (np.stack([pair[place] for pair in pairs]).astype(np.float64) for place in (1, 2))
        # pixels take their steps at different places: between two blends lie as many as there are pixels
        dither = np.random.default_rng(SEED).random(begin.shape[1:])
        low = np.zeros((len(pairs), 1, 1, 1))
        high = np.ones_like(low)

        def blend(share: NDArray[np.float64]) -> Images:
            return np.floor(begin + (end - begin) * share + dither).astype(np.uint8)

        for _ in range(HALVINGS):
            middle = (low + high) / 2
            is_same = (predict(blend(middle))[1].argmax(1) == answers)[:, None, None, None]
            low, high = np.where(is_same, middle, low), np.where(is_same, high, middle)
        return np.concatenate([blend(low), blend(high)])

    def _pairs(self) -> list[tuple[int, Images, Images]]:
        """An answer, an image that gets it, and one that gets another."""
        most = max(map(len, self._kept.values()), default=0)
        mixed = [(answer, kept[i]) for i in range(most) for answer, kept in sorted(self._kept.items()) if i < len(kept)]
        if len(self._kept) < 2:
            return []
        pairs = []
        for place, (answer, image) in enumerate(mixed[:PAIRS]):
            others = (*mixed[place + 1 :], *mixed[:place])
            pairs.append((answer, image, next(other for name, other in others if name != answer)))
        return pairs
