"""The confusion matrix as a plot."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pipeline.reporting.plots import CENTRED, SQUARE, Plot, new_axes, short_label, transparent_colormap

NAMED_CLASSES = 20  # with more classes, their names do not fit beside an axis
COUNTED_CLASSES = 12  # with more classes, counts do not fit into the squares


def confusion_matrix(counts: NDArray[np.int64], classes: Sequence[str]) -> Plot:
    """Of int64 [classes, classes], rows true, columns predicted. A square's colour is its share of the row."""
    size = len(classes)
    share = counts / np.maximum(1, counts.sum(1, keepdims=True))
    is_small = size <= COUNTED_CLASSES
    with new_axes(*(SQUARE if is_small else (6.5, 6.5))) as (figure, ((axes,),)):
        axes.imshow(share, cmap=transparent_colormap("accent"), vmin=0, vmax=1, interpolation="nearest")
        axes.grid(False)
        if size <= NAMED_CLASSES:
            labels = [short_label(label) for label in classes]
            axes.set_xticks(range(size), labels, rotation=90)
            axes.set_yticks(range(size), labels)
        for row, column in zip(*counts.nonzero(), strict=True) if is_small else ():
            axes.text(column, row, str(counts[row, column]), **CENTRED, fontsize=7)
        axes.set_xlabel("predicted")
        axes.set_ylabel("true")
    hits = counts.diagonal().sum() / max(1, counts.sum())
    alt = f"Confusion matrix of {size} classes: {hits:.1%} of {counts.sum():,} images lie on the diagonal."
    caption = "Rows are the true classes, columns the predicted ones."
    return Plot("confusion", "Confusion matrix", figure, alt, caption, is_wide=not is_small)
