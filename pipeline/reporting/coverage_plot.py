"""Coverage and precision: a plot of how often answers are right, over the share of images that are answered."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.exporting.decision import precision_by_threshold
from pipeline.reporting.plots import COLORS, SQUARE, Plot, new_axes

FEWEST_ANSWERS = 20  # the share of right answers among fewer jumps up and down
POINTS = 500  # of the curve, at most


def coverage_plot(
    confidence: NDArray[np.float32], is_right: NDArray[np.bool_], decision: dict[str, Any] | None = None
) -> Plot:
    """The precision of the answers above every threshold. `decision` (the metadata of an exported file) marks one.

    `confidence`, float32 [n], is the probability of each image's predicted class; images whose confidence is not finite
    are left out.
    """
    is_finite = np.isfinite(confidence)
    _, answered, precision = precision_by_threshold(confidence[is_finite], is_right[is_finite])
    count = max(1, int(is_finite.sum()))
    shown = np.flatnonzero(answered >= min(FEWEST_ANSWERS, count))
    if len(shown) > POINTS:
        shown = shown[np.linspace(0, len(shown) - 1, POINTS).astype(np.int64)]
    caption = "The surest images are answered first; the curve ends where all are."
    with new_axes(*SQUARE) as (figure, ((axes,),)):
        axes.plot(answered[shown] / count, precision[shown], color=COLORS["accent"], linewidth=1.5)
        if decision is not None:
            caption = _mark(axes, decision)
        axes.set_xlim(0, 1.03)
        axes.set_xlabel("coverage: share of images answered")
        axes.set_ylabel("precision of the answers")
    alt = f"Precision of the answers over the share of images that are answered. {caption}"
    return Plot("coverage", "Coverage and precision", figure, alt, caption)


def _mark(axes: Any, decision: dict[str, Any]) -> str:
    """Mark the threshold of an exported file; returns the caption, which states its figures on test."""
    wanted, found = decision["wanted_precision"], decision["test"]
    axes.axhline(wanted, color=COLORS["muted"], linestyle="--", linewidth=1, label=f"wanted: {wanted:g}")
    precision = "no answers"
    if found["precision"] is not None:
        axes.scatter([found["coverage"]], [found["precision"]], color=COLORS["second"], zorder=3, label="threshold")
        precision = f"precision {found['precision']:.1%}"
    axes.legend(loc="best")
    return f"Threshold {decision['threshold']:.4g} of model.onnx: coverage {found['coverage']:.1%}, {precision}."
