"""`pipeline compare`: several runs side by side, as a table with a row for each run and as curves on the same axes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convline.errors import ConvlineError
from convline.files import atomic_write
from convline.html import card, cards, display_name, element, page, table
from pipeline.network import build_network, count_parameters, multiply_adds, network_input_shape
from pipeline.reporting.learning_curves import line_plots, metric_series
from pipeline.reporting.plots import Plot
from pipeline.reporting.result_files import read_result_file
from pipeline.reporting.sections import duration
from pipeline.run import Run
from pipeline.tracking.points import Point, last_value, read_points

HEADER = ("run", "network", "dataset", "steps", "time", "train", "validation", "test", "parameters", "multiply-adds")
NOTE = (
    "Precision @ 1 is that of the averaged weights: on the whole test split if ",
    element("code", "pipeline evaluate"),
    " was run after training, otherwise on the number of images in the recipe's evaluate_limit.",
)
LAST_VALUES = ("precision_at_1", "validation_precision_at_1", "train_precision_at_1", "training_seconds", "elapsed")
CURVES = (
    ("precision", "Precision @ 1 on test", "precision @ 1", "precision_at_1"),
    ("validation-precision", "Precision @ 1 on validation", "precision @ 1", "validation_precision_at_1"),
    ("train-precision", "Precision @ 1 on train", "precision @ 1", "train_precision_at_1"),
    ("loss", "Smoothed loss", "loss", "smoothed_loss"),
    ("learning-rate", "Learning rate", "learning rate", "learning_rate"),
    ("speed", "Images a second", "images/s", "images_per_second"),
)


@dataclass(frozen=True)
class ComparedRun:
    """A run with the points of its metrics.jsonl."""

    run: Run
    points: list[Point]

    def key_figures(self) -> dict[str, Any]:
        """The figures of the table: among them precision @ 1 of the averaged weights on each split (None if it was not
        measured), `seconds` of training, and `multiply_adds` for one image."""
        served = build_network(self.run.recipe, self.run.info["dataset"])
        steps = max((point.step for point in self.points), default=0)
        evaluated = self._evaluated_precision(steps)
        test, validation, train, training_seconds, elapsed = (last_value(self.points, key) for key in LAST_VALUES)
        return {
            "run": self.run.name,
            "network": self.run.recipe.model.name,
            "dataset": self.run.recipe.data.dataset,
            "steps": steps,
            "seconds": training_seconds or elapsed,
            "train_precision_at_1": train,
            "validation_precision_at_1": validation,
            "precision_at_1": test if evaluated is None else evaluated,
            "parameters": count_parameters(served.network),
            "multiply_adds": multiply_adds(served.network, network_input_shape(self.run, served)),
        }

    def _evaluated_precision(self, step: int) -> float | None:
        """precision @ 1 on the whole test split from `pipeline evaluate`, if it evaluated the weights of `step`."""
        evaluation = read_result_file(self.run.folder / "evaluation.json")
        precision = evaluation.get("precision_at_1")
        return precision if evaluation.get("step") == step and isinstance(precision, float) else None


def compare(runs: Sequence[Run], output: Path) -> list[dict[str, Any]]:
    """Write the page `output` with the figures and curves of all runs, and return the figures.

    Raises ConvlineError if `output` does not end in .html.
    """
    if output.suffix != ".html":
        raise ConvlineError(f"--output {output}: name a file that ends in .html")
    compared = [ComparedRun(run, list(read_points(run.metrics))) for run in runs]
    figures = [one.key_figures() for one in compared]
    plots = [card(plot.title, plot.svg()) for plot in comparison_plots(compared)]
    rows = [(*map(display_name, cells[:3]), *cells[3:]) for cells in map(table_row, figures)]
    sections = [("The runs", table(HEADER, rows, "The runs")), ("Curves", cards(*plots))]
    with atomic_write(output, "w", encoding="utf-8") as file:
        file.write(page("Runs compared", element("p", NOTE), sections))
    return figures


def table_row(figures: dict[str, Any]) -> list[str]:
    """The figures of a run as text, in the columns of HEADER."""
    shares = (figures[key] for key in ("train_precision_at_1", "validation_precision_at_1", "precision_at_1"))
    return [
        *(figures[key] for key in ("run", "network", "dataset")),
        f"{figures['steps']:,}",
        "-" if figures["seconds"] is None else duration(figures["seconds"]),
        *("-" if share is None else f"{share:.2%}" for share in shares),
        f"{figures['parameters']:,}",
        f"{figures['multiply_adds']:,}",
    ]


def comparison_plots(compared: Sequence[ComparedRun]) -> list[Plot]:
    """A plot for each metric that some run has, with a line for each run."""
    return line_plots(
        (key, title, [(one.run.name, *metric_series(one.points, metric)) for one in compared], label)
        for key, title, label, metric in CURVES
    )


def text_table(figures: Sequence[dict[str, Any]]) -> str:
    """The table for a terminal: names aligned left, numbers aligned right."""
    rows = [HEADER, *map(table_row, figures)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    aligned = [
        [
            cell.ljust(width) if column < 3 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        for row in rows
    ]
    return "\n".join("  ".join(cells).rstrip() for cells in aligned)
