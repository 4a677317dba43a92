"""mistakes.csv of a run: the test images that are classified wrongly, the most confident first."""

from __future__ import annotations

import csv
from collections.abc import Sequence

from convline.files import atomic_write
from pipeline.reporting.predictions import SplitPredictions
from pipeline.run import Run

MAX_ROWS = 1000


def write_mistakes(run: Run, predictions: SplitPredictions, paths: Sequence[str] | None) -> None:
    """Write the first MAX_ROWS mistakes: path in the dataset's source, true and predicted class, and the probability of
    the latter. Where the dataset has no `paths`, the first column is the image's row in the split, from 0."""
    classes = run.classes
    # names that are not UTF-8 keep their bytes
    with atomic_write(run.mistakes, "w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        # a carriage return ends a row for readers of CSV, but csv.writer does not quote it
        quoting_writer = csv.writer(file, lineterminator="\n", quoting=csv.QUOTE_ALL)
        writer.writerow(("row" if paths is None else "path", "truth", "predicted", "probability"))
        for position in predictions.mistakes(MAX_ROWS).tolist():
            image = str(position) if paths is None else paths[position]
            truth, predicted = predictions.labels[position], predictions.predicted[position]
            cells = (image, classes[truth], classes[predicted], f"{predictions.confidence[position]:.6f}")
            (quoting_writer if any("\r" in cell for cell in cells) else writer).writerow(cells)
