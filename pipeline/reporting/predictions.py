"""Predictions for every image of a split: mistakes, confused classes, and calibration of the confidence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.calibration import Calibration, ClassCalibration, calibration, calibration_of_classes
from pipeline.dataset import Split
from pipeline.metrics import Evaluation, batch_size_for
from pipeline.network import Predict


@dataclass(frozen=True)
class SplitPredictions:
    """For each image of `split`: `labels` and `predicted` class, int64 [n], and the `confidence` (probability) of the
    predicted class, float32 [n]. `evaluation` counts hits."""

    split: Split
    evaluation: Evaluation
    labels: NDArray[np.int64]
    predicted: NDArray[np.int64]
    confidence: NDArray[np.float32]

    @classmethod
    def compute(
        cls, predict: Predict, split: Split, classes: Sequence[str], batch_size: int | None = None
    ) -> SplitPredictions:
        """`batch_size`: by default by the size of the images."""
        evaluation = Evaluation(classes)
        columns: list[tuple[NDArray[np.generic], ...]] = []
        for images, labels in split.batches(batch_size or batch_size_for(split)):
            probability, logit = predict(images)
            evaluation.add(logit, labels)
            rows = np.arange(len(labels))
            predicted = logit.argmax(1)
            columns.append((labels, predicted, probability[rows, predicted]))
        labels, predicted, confidence = map(np.concatenate, zip(*columns, strict=True))
        return cls(split, evaluation, labels, predicted, confidence)

    def mistakes(self, count: int) -> NDArray[np.int64]:
        """Positions of wrongly classified images, the most confident first."""
        wrong = np.flatnonzero(self.predicted != self.labels)
        return wrong[np.argsort(-self.confidence[wrong], kind="stable")][:count]

    def narrow_hits(self, count: int) -> NDArray[np.int64]:
        """Positions of correctly classified images, the least confident first."""
        right = np.flatnonzero(self.predicted == self.labels)
        return right[np.argsort(self.confidence[right], kind="stable")][:count]

    def confused(self, count: int) -> list[tuple[int, int, int]]:
        """The most frequent mistakes as (true class, predicted class, number of images)."""
        counts = self.evaluation.confusion.copy()
        np.fill_diagonal(counts, 0)
        order = np.argsort(-counts, axis=None, kind="stable")[:count]
        pairs = [(int(i // len(counts)), int(i % len(counts))) for i in order]
        return [(true, predicted, int(counts[true, predicted])) for true, predicted in pairs if counts[true, predicted]]

    def calibration(self) -> Calibration:
        """How far the confidence is from the share of hits."""
        return calibration(self.confidence, self.predicted == self.labels)

    def calibration_of_classes(self) -> list[ClassCalibration]:
        """The same for the answers of each class."""
        is_right = self.predicted == self.labels
        return calibration_of_classes(self.predicted, self.confidence, is_right, len(self.evaluation.classes))
