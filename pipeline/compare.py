"""`pipeline compare`: several runs side by side, as a table and as curves on the same axes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convline.errors import ConvlineError
from convline.files import atomic_write
from convline.html import card, cards, display_name, element, page, table
from pipeline.network import build_network, count_parameters, multiply_adds, network_input_shape
from pipeline.reporting.curves import draw_curves, series
from pipeline.reporting.findings import read_findings
from pipeline.reporting.plots import Picture
from pipeline.reporting.sections import duration
from pipeline.run import Run
from pipeline.tracking.points import Point, last_value, read_points

HEADER = ("run", "network", "dataset", "steps", "time", "train", "validation", "test", "parameters", "multiply-adds")
NOTE = (
    "Precision @ 1 is that of the averaged weights: on the whole test split where ",
    element("code", "pipeline evaluate"),
    " was run at the end, else on as many images as the recipe's evaluate_limit says.",
)
LAST = ("precision_at_1", "validation_precision_at_1", "train_precision_at_1", "training_seconds", "elapsed")
CURVES = (
    ("precision", "Precision @ 1 on test", "precision @ 1", "precision_at_1"),
    ("validation-precision", "Precision @ 1 on validation", "precision @ 1", "validation_precision_at_1"),
    ("train-precision", "Precision @ 1 on train", "precision @ 1", "train_precision_at_1"),
    ("loss", "Smoothed loss", "loss", "smoothed_loss"),
    ("learning-rate", "Learning rate", "learning rate", "learning_rate"),
    ("speed", "Images a second", "images/s", "images_per_second"),
)


@dataclass(frozen=True)
class Compared:
    """A run with its points."""

    run: Run
    points: list[Point]

    def figures(self) -> dict[str, Any]:
        """What is compared: precision @ 1 of the averaged weights (None where it was not looked at), `seconds` of
        training, `multiply_adds` for one image."""
        served = build_network(self.run.recipe, self.run.info["dataset"])
        steps = max((point.step for point in self.points), default=0)
        evaluated = self._evaluated(steps)
        test, validation, train, trained, elapsed = (last_value(self.points, key) for key in LAST)
        return {
            "run": self.run.name,
            "network": self.run.recipe.model.name,
            "dataset": self.run.recipe.data.dataset,
            "steps": steps,
            "seconds": trained or elapsed,
            "train_precision_at_1": train,
            "validation_precision_at_1": validation,
            "precision_at_1": test if evaluated is None else evaluated,
            "parameters": count_parameters(served.network),
            "multiply_adds": multiply_adds(served.network, network_input_shape(self.run, served)),
        }

    def _evaluated(self, step: int) -> float | None:
        """What `pipeline evaluate` found on the whole test split, if that is of the last step."""
        evaluation = read_findings(self.run.folder / "evaluation.json")
        found = evaluation.get("precision_at_1")
        return found if evaluation.get("step") == step and isinstance(found, float) else None


def compare(runs: Sequence[Run], output: Path) -> list[dict[str, Any]]:
    """The figures of each run; the page `output` has them too, with the curves.

    Raises ConvlineError for an output that is no page.
    """
    if output.suffix != ".html":
        raise ConvlineError(f"--output {output}: name a file that ends in .html")
    compared = [Compared(run, list(read_points(run.metrics))) for run in runs]
    figures = [one.figures() for one in compared]
    shown = [card(one.title, one.svg()) for one in overlays(compared)]
    named = [(*map(display_name, cells[:3]), *cells[3:]) for cells in map(row, figures)]
    sections = [("The runs", table(HEADER, named, "The runs")), ("Curves", cards(*shown))]
    with atomic_write(output, "w", encoding="utf-8") as file:
        file.write(page("Runs compared", element("p", NOTE), sections))
    return figures


def row(figures: dict[str, Any]) -> list[str]:
    """As text, under HEADER."""
    shares = (figures[key] for key in ("train_precision_at_1", "validation_precision_at_1", "precision_at_1"))
    return [
        *(figures[key] for key in ("run", "network", "dataset")),
        f"{figures['steps']:,}",
        "-" if figures["seconds"] is None else duration(figures["seconds"]),
        *("-" if share is None else f"{share:.2%}" for share in shares),
        f"{figures['parameters']:,}",
        f"{figures['multiply_adds']:,}",
    ]


def overlays(compared: Sequence[Compared]) -> list[Picture]:
    """Each metric that some run has, with a line a run."""
    return draw_curves(
        (key, title, [(one.run.name, *series(one.points, metric)) for one in compared], label)
        for key, title, label, metric in CURVES
    )


def text(figures: Sequence[dict[str, Any]]) -> str:
    """A table for a terminal: names at the left, numbers at the right of their columns."""
    rows = [HEADER, *map(row, figures)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    aligned = [
        [cell.ljust(w) if n < 3 else cell.rjust(w) for n, (cell, w) in enumerate(zip(r, widths, strict=True))]
        for r in rows
    ]
    return "\n".join("  ".join(cells).rstrip() for cells in aligned)
