"""Calibration: how far probabilities are from the share of right answers, in all and for the answers of each class, and
the temperature that brings them closer.

Source: Guo et al., On Calibration of Modern Neural Networks (2017), arXiv:1706.04599.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convline.errors import ConvlineError
from pipeline.metrics import Interval, wilson_interval

BINS = 15  # of equal width, as in the paper
RESAMPLINGS = 1000
SEED = 20170619
LEAST_TEMPERATURE, LARGEST_TEMPERATURE = 1e-3, 1e4
ABOUT_VERDICTS = (
    "Answers of a class claim their mean probability; they claim too much or too little where it lies outside the 95% "
    "interval of how often they are right. About one class in twenty does so by chance."
)


@dataclass(frozen=True)
class Calibration:
    """For each bin of confidence its mean, the share of hits and the number of images; and the expected calibration
    error: the mean difference between the first two, each bin weighted by its number of images."""

    confidence: NDArray[np.float64]
    hits: NDArray[np.float64]
    counts: NDArray[np.int64]
    error: float


def calibration(confidence: NDArray[np.float32], is_right: NDArray[np.bool_]) -> Calibration:
    """`confidence`, float32 [n]: the probability of each image's predicted class; `is_right`, bool [n].

    Images whose confidence is not finite are left out.
    """
    is_finite = np.isfinite(confidence)
    confidence, is_right = confidence[is_finite], is_right[is_finite]
    bins = _bins(confidence)
    counts = np.bincount(bins, minlength=BINS)
    sums = (np.bincount(bins, values, BINS) for values in (confidence, is_right))
    mean_confidence, hits = (total / np.maximum(1, counts) for total in sums)
    error = float((counts * np.abs(mean_confidence - hits)).sum() / max(1, counts.sum()))
    return Calibration(mean_confidence, hits, counts, error)


def _bins(confidence: NDArray[np.float32]) -> NDArray[np.int64]:
    """The bin of each image; bin i holds confidences above i / BINS, up to and including (i + 1) / BINS."""
    return np.clip(np.ceil(confidence.astype(np.float64) * BINS) - 1, 0, BINS - 1).astype(np.int64)


@dataclass(frozen=True)
class ClassCalibration:
    """Of the answers of one class: their number, how many are right, and their mean probability, which is None where
    there are no answers: what they claim."""

    answers: int
    hits: int
    mean_probability: float | None

    @property
    def precision(self) -> float | None:
        return self.hits / self.answers if self.answers else None

    @property
    def precision_interval(self) -> Interval:
        """The 95% interval of the precision."""
        return wilson_interval(self.hits, self.answers)

    @property
    def verdict(self) -> str:
        """Whether the mean probability lies within the interval of the precision: "within the interval", "claims too
        much" or "claims too little"; empty where there are no answers."""
        if self.mean_probability is None:
            return ""
        lowest, highest = self.precision_interval
        if lowest <= self.mean_probability <= highest:
            return "within the interval"
        return "claims too much" if self.mean_probability > highest else "claims too little"


def calibration_of_classes(
    predicted: NDArray[np.int64], confidence: NDArray[np.float32], is_right: NDArray[np.bool_], classes: int
) -> list[ClassCalibration]:
    """For each class, in order, the calibration of the answers of that class.

    `predicted`, int64 [n]: the most probable class of each image; `confidence`, float32 [n]: its probability;
    `is_right`, bool [n]. Images whose confidence is not finite are left out.
    """
    is_finite = np.isfinite(confidence)
    predicted, confidence, is_right = predicted[is_finite], confidence[is_finite], is_right[is_finite]
    answers = np.bincount(predicted, minlength=classes).tolist()
    hits = np.bincount(predicted[is_right], minlength=classes).tolist()
    sums = np.bincount(predicted, confidence, classes).tolist()
    return [
        ClassCalibration(count, right, total / count if count else None)
        for count, right, total in zip(answers, hits, sums, strict=True)
    ]


def error_interval(confidence: NDArray[np.float32], is_right: NDArray[np.bool_]) -> Interval:
    """The 95% interval of the expected calibration error, by bootstrap over the images; the same one every time.

    Noise makes the error of any sample too large, and that of a resampled sample once more. So the resampled errors
    are shifted until their mean is the error of the sample.
    """
    bins, gaps = _bins(confidence), confidence.astype(np.float64) - is_right
    draws, count = np.random.default_rng(SEED), len(gaps)
    errors = np.empty(RESAMPLINGS)
    for i in range(RESAMPLINGS):
        drawn = draws.integers(count, size=count)
        errors[i] = np.abs(np.bincount(bins[drawn], gaps[drawn], BINS)).sum() / count
    errors += np.abs(np.bincount(bins, gaps, BINS)).sum() / count - errors.mean()
    lowest, highest = np.quantile(errors, (0.025, 0.975))
    return max(0.0, float(lowest)), min(1.0, float(highest))


def error_metadata(confidence: NDArray[np.float32], is_right: NDArray[np.bool_]) -> dict[str, Any]:
    """The expected calibration error and its 95% interval."""
    return {
        "error": calibration(confidence, is_right).error,
        "interval": list(error_interval(confidence, is_right)),
    }


def fit_temperature(logits: NDArray[np.float32], labels: NDArray[np.int64]) -> float:
    """The temperature T whose probabilities, softmax(logits / T), make the labels most likely; a float32 number.

    `logits` float32 [n, classes], `labels` int64 [n]. The negative log-likelihood is convex in 1 / T, so its only
    minimum is where its slope is 0. Raises ConvlineError where there is none: where all images are classified
    correctly, or no better than by chance.
    """
    from scipy.optimize import brentq

    if not np.isfinite(logits).all():
        raise ConvlineError("the network gives logits that are not finite on validation: no temperature fits them")
    shifted = logits.astype(np.float64) - logits.max(1, keepdims=True)
    true = np.take_along_axis(shifted, labels[:, None], 1)[:, 0]

    def slope(inverse: float) -> float:
        weights = np.exp(inverse * shifted)
        return float(((weights * shifted).sum(1) / weights.sum(1) - true).mean())

    least, largest = 1 / LARGEST_TEMPERATURE, 1 / LEAST_TEMPERATURE
    advice = "leave out --calibrate"
    if slope(largest) <= 0:
        raise ConvlineError(
            f"all {len(labels)} validation images are classified correctly, so no temperature fits them best: hold out "
            f"more of them by data.validation in the recipe, or {advice}"
        )
    if slope(least) >= 0:
        raise ConvlineError(f"the network is no better than chance on validation: train it further, or {advice}")
    return float(str(np.float32(1 / brentq(slope, least, largest, xtol=1e-12, rtol=1e-10))))
