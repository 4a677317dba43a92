"""Calibration: a plot of the share of hits over confidence."""

from __future__ import annotations

import numpy as np

from pipeline.calibration import BINS, Calibration
from pipeline.reporting.plots import COLORS, SQUARE, Plot, new_axes


def calibration_plot(found: Calibration) -> Plot:
    """The share of hits in each bin of confidence; a larger dot stands for more images."""
    confidence, hits, counts, error = found.confidence, found.hits, found.counts, found.error
    with new_axes(*SQUARE) as (figure, ((axes,),)):
        axes.plot([0, 1], [0, 1], color=COLORS["muted"], linestyle="--", linewidth=1, label="perfectly calibrated")
        is_filled = counts > 0
        sizes = 10 + 120 * np.sqrt(counts[is_filled] / counts.max())
        axes.plot(confidence[is_filled], hits[is_filled], color=COLORS["accent"], linewidth=1)
        axes.scatter(confidence[is_filled], hits[is_filled], s=sizes, color=COLORS["accent"], label="images")
        axes.set_xlim(0, 1.03)
        axes.set_ylim(0, 1.06)
        axes.set_xlabel("confidence")
        axes.set_ylabel("share of hits")
        axes.legend(loc="upper left", markerscale=0.5)
    alt = f"Share of hits by confidence, in {BINS} equal bins; the expected calibration error is {error:.3f}."
    caption = f"Expected calibration error {error:.3f}; a larger dot stands for more images."
    return Plot("calibration", "Calibration", figure, alt, caption)
