"""mistakes.csv of a run: the test images that are classified wrongly, the most confident first."""

from __future__ import annotations

from collections.abc import Sequence

from convline.csv_rows import CsvRows
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
        rows = CsvRows(file)
        rows.write(("row" if paths is None else "path", "truth", "predicted", "probability"))
        for position in predictions.mistakes(MAX_ROWS).tolist():
            image = str(position) if paths is None else paths[position]
            truth, predicted = predictions.labels[position], predictions.predicted[position]
            rows.write((image, classes[truth], classes[predicted], f"{predictions.confidence[position]:.6f}"))
