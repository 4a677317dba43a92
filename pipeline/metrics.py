"""Metrics over a split: precision @ k, precision and recall of each class, their 95% intervals, confusion counts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.dataset import Split
from pipeline.network import Predict

BATCH_SIZE = 256  # at most
BATCH_PIXELS = 2**21  # at most: larger batches of photographs take gigabytes and are slower
Z = 1.959964  # 95% of a normal distribution are within this many standard deviations

Interval = tuple[float, float]


def wilson_interval(hits: int, count: int) -> Interval:
    """The 95% interval of a share, of which `hits` of `count` were seen; (0, 1) where none was looked at.

    Wilson's score interval (Wilson, Probable Inference, the Law of Succession, and Statistical Inference, 1927).
    """
    if not count:
        return 0.0, 1.0
    share, spread = hits / count, Z**2 / count
    half = Z * math.sqrt(share * (1 - share) / count + spread / (4 * count))
    lowest, highest = ((share + spread / 2 + side * half) / (1 + spread) for side in (-1, 1))
    return max(0.0, lowest), min(1.0, highest)


@dataclass
class Evaluation:
    """Counts over a split. `confusion`, int64 [classes, classes]: rows are true classes, columns predicted ones.
    `ranks`, int64 [classes + 1]: how often the true class had the largest logit, the second largest, …; the last entry
    counts images with NaN."""

    classes: Sequence[str]
    confusion: NDArray[np.int64] = field(init=False)
    ranks: NDArray[np.int64] = field(init=False)
    _hits: list[NDArray[np.bool_]] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        count = len(self.classes)
        self.confusion = np.zeros((count, count), np.int64)
        self.ranks = np.zeros(count + 1, np.int64)

    def add(self, logits: NDArray[np.float32], labels: NDArray[np.int64]) -> None:
        """Count a batch: logits float32 [n, classes], labels int64 [n]."""
        np.add.at(self.confusion, (labels, logits.argmax(1)), 1)
        ranked = ranks(logits, labels)
        np.add.at(self.ranks, ranked, 1)
        self._hits.append(ranked == 0)

    @property
    def count(self) -> int:
        return int(self.ranks.sum())

    @property
    def hits(self) -> NDArray[np.bool_]:
        """Which images are classified correctly, in order, bool [n]."""
        return np.concatenate(self._hits) if self._hits else np.zeros(0, bool)

    def interval_at(self, k: int) -> Interval:
        """The 95% interval of precision @ k."""
        return wilson_interval(int(self.ranks[:k].sum()), self.count)

    def precision_at(self, k: int) -> float:
        """The share of images whose true class is among the k most probable."""
        return float(self.ranks[:k].sum() / self.count)

    def to_dict(self, top_k: int = 1) -> dict[str, Any]:
        true, predicted = self.confusion.sum(1), self.confusion.sum(0)
        hits = self.confusion.diagonal()
        return {
            "count": self.count,
            **{f"precision_at_{k}": self.precision_at(k) for k in range(1, top_k + 1)},
            "classes": {
                name: {
                    "count": int(true[i]),
                    "precision": float(hits[i] / predicted[i]) if predicted[i] else None,
                    "recall": float(hits[i] / true[i]) if true[i] else None,
                }
                for i, name in enumerate(self.classes)
            },
            "intervals": {
                **{f"precision_at_{k}": self.interval_at(k) for k in range(1, top_k + 1)},
                "classes": {
                    name: {
                        "precision": wilson_interval(int(hits[i]), int(predicted[i])),
                        "recall": wilson_interval(int(hits[i]), int(true[i])),
                    }
                    for i, name in enumerate(self.classes)
                },
            },
            "confusion": self.confusion.tolist(),
        }


def ranks(logits: NDArray[np.float32], labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """The rank of each true class among the logits, 0 for the largest, int64 [n].

    Of equal logits the earlier class ranks first, as in argmax: a network whose logits are all equal is no better than
    chance. In a row with a NaN, the rank is the number of classes.
    """
    true_logits = np.take_along_axis(logits, labels[:, None], 1)
    earlier = np.arange(logits.shape[1]) < labels[:, None]
    larger = ((logits > true_logits) | ((logits == true_logits) & earlier)).sum(1)
    return np.where(np.isnan(logits).any(1), logits.shape[1], larger)


def batch_size_for(split: Split) -> int:
    """How many images of a split to evaluate at once, by their size: a power of 2."""
    height, width = split.images.shape[1:3]
    return max(1, min(BATCH_SIZE, 1 << (BATCH_PIXELS // (height * width)).bit_length() - 1))


def evaluate(
    predict: Predict, split: Split, classes: Sequence[str], limit: int | None = None, batch_size: int | None = None
) -> Evaluation:
    """Evaluate `predict` on the first `limit` images of a split, or on all of them. `batch_size`: by default by the
    size of the images."""
    evaluation = Evaluation(classes)
    for images, labels in split.take(limit).batches(batch_size or batch_size_for(split)):
        evaluation.add(predict(images)[1], labels)
    return evaluation
