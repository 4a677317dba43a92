"""The threshold of `export --wanted-precision`: answers below it are not sure enough to be right that often."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from convline.errors import ConvlineError
from pipeline.metrics import wilson_interval


def find_threshold(confidence: NDArray[np.float32], is_right: NDArray[np.bool_], wanted_precision: float) -> float:
    """The smallest of the confidences such that, of the images with at least that one, a share of `wanted_precision`
    is classified correctly.

    `confidence`, float32 [n], is the probability of each image's predicted class. Raises ConvlineError where no
    threshold reaches that precision.
    """
    thresholds, answered, precision = precision_by_threshold(confidence, is_right)
    reaching = np.flatnonzero(precision >= wanted_precision)
    if not len(reaching):
        best = int(precision.argmax())
        raise ConvlineError(
            f"no threshold makes answers right in {wanted_precision:g} of the cases: on {len(confidence)} validation "
            f"images the best reaches {precision[best]:.4f}, with {answered[best]} of them answered; choose a smaller "
            "--wanted-precision, or train a better network"
        )
    return float(str(thresholds[reaching[-1]]))  # its shortest exact form, as in the tables of serving


def precision_by_threshold(
    confidence: NDArray[np.float32], is_right: NDArray[np.bool_]
) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.float64]]:
    """Every threshold that makes a difference, the largest first; how many images reach it; and the share of these that
    are classified correctly."""
    order = np.argsort(-confidence, kind="stable")
    ordered, hits = confidence[order], np.cumsum(is_right[order])
    # images of the same confidence are answered together; NaN differs from all of them
    last = np.flatnonzero(np.diff(ordered, append=np.float32(np.nan)))
    return ordered[last], last + 1, hits[last] / (last + 1)


def decision_figures(confidence: NDArray[np.float32], is_right: NDArray[np.bool_], threshold: float) -> dict[str, Any]:
    """Precision and coverage of the answers with at least the confidence `threshold`, with their 95% intervals.

    The precision is None where there is no answer.
    """
    is_answered = confidence >= np.float32(threshold)
    count, answered, hits = len(confidence), int(is_answered.sum()), int(is_right[is_answered].sum())
    return {
        "count": count,
        "answered": answered,
        "precision": hits / answered if answered else None,
        "precision_interval": list(wilson_interval(hits, answered)),
        "coverage": answered / count,
        "coverage_interval": list(wilson_interval(answered, count)),
    }
