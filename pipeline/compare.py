"""`pipeline compare`: several runs as a table and as curves, and whether they differ by more than chance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convline.console import log
from convline.errors import ConvlineError
from convline.files import atomic_write
from convline.html import card, cards, display_name, element, muted, page, table
from pipeline.network import build_network, count_parameters, multiply_adds, network_input_shape
from pipeline.reporting.learning_curves import Curves, line_plots, metric_series
from pipeline.reporting.paired_comparison import PairedComparison, unpacked_bits
from pipeline.reporting.result_files import read_result_file
from pipeline.reporting.sections import duration
from pipeline.run import Run
from pipeline.tracking.points import Point, last_value, read_points

HEADER = ("run", "network", "dataset", "steps", "time", "train", "validation", "test", "parameters", "multiply-adds")
NOTE = (
    "Precision @ 1 is that of the averaged weights: on the whole test split, with its 95% interval, if ",
    element("code", "pipeline evaluate"),
    " was run after training, otherwise on the number of images in the recipe's evaluate_limit.",
)
SEPARATE = (
    "these runs were tested on different images, so that their figures say nothing about each other: each dataset has "
    "curves of its own"
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
        evaluated = self._evaluation
        test, validation, train, training_seconds, elapsed = (last_value(self.points, key) for key in LAST_VALUES)
        return {
            "run": self.run.name,
            "network": self.run.recipe.model.name,
            "dataset": self.run.recipe.data.dataset,
            "steps": self.steps,
            "seconds": training_seconds or elapsed,
            "train_precision_at_1": train,
            "validation_precision_at_1": validation,
            "precision_at_1": evaluated["precision_at_1"] if evaluated else test,
            "precision_at_1_interval": evaluated["intervals"]["precision_at_1"] if evaluated else None,
            "parameters": count_parameters(served.network),
            "multiply_adds": multiply_adds(served.network, network_input_shape(self.run, served)),
        }

    @cached_property
    def steps(self) -> int:
        return max((point.step for point in self.points), default=0)

    @cached_property
    def _evaluation(self) -> dict[str, Any] | None:
        """What `pipeline evaluate` wrote about the whole test split, if it evaluated the last weights."""
        evaluation = read_result_file(self.run.folder / "evaluation.json")
        is_complete = isinstance(evaluation.get("precision_at_1"), float) and "intervals" in evaluation
        return evaluation if evaluation.get("step") == self.steps and is_complete else None

    @property
    def test_images(self) -> str:
        """The fingerprint of the test split."""
        return str(self.run.info["dataset"]["fingerprints"]["test"])

    def hits(self) -> NDArray[np.bool_] | None:
        """Which test images the averaged weights classify correctly; None where `pipeline evaluate` was not run."""
        if self._evaluation is None:
            return None
        try:
            return unpacked_bits(self._evaluation["hits"], self._evaluation["count"])
        except (KeyError, ValueError, TypeError):
            log(f"warning: {self.run.folder / 'evaluation.json'} does not say which images are right; evaluate again")
            return None


def compare(runs: Sequence[Run], output: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Write the page `output` with the figures and curves of all runs, and return the figures, and in words what they
    say about the differences.

    Raises ConvlineError if `output` does not end in .html.
    """
    if output.suffix != ".html":
        raise ConvlineError(f"--output {output}: name a file that ends in .html")
    compared = [ComparedRun(run, list(read_points(run.metrics))) for run in runs]
    figures = [one.key_figures() for one in compared]
    groups = same_test_images(compared)
    remarks = [SEPARATE] if len(groups) > 1 else []
    for group in groups:
        remarks += differences_from_best(group)
    curves = [comparison_plots(group, len(groups) > 1) for group in groups]
    plots = [card(plot.title, plot.svg()) for one in curves for plot in one.plots]
    sentences = [muted(sentence) for one in curves for sentence in one.sentences]
    rows = [(*map(display_name, cells[:3]), *cells[3:]) for cells in map(table_row, figures)]
    sections = [("The runs", [table(HEADER, rows, "The runs"), *(element("p", remark) for remark in remarks)])]
    with atomic_write(output, "w", encoding="utf-8") as file:
        file.write(page("Runs compared", element("p", NOTE), [*sections, ("Curves", [cards(*plots), sentences])]))
    return figures, remarks


def same_test_images(compared: Sequence[ComparedRun]) -> list[list[ComparedRun]]:
    """The runs in groups that were tested on the same images, in their order."""
    groups: dict[str, list[ComparedRun]] = {}
    for one in compared:
        groups.setdefault(one.test_images, []).append(one)
    return list(groups.values())


def differences_from_best(group: Sequence[ComparedRun]) -> list[str]:
    """For each run but the most accurate one: whether it is worse than that by more than chance. Runs that were not
    evaluated on the whole test split are left out."""
    hits = {one.run.name: found for one in group if (found := one.hits()) is not None}
    if len(hits) < 2:
        return []
    best = max(hits, key=lambda name: int(hits[name].sum()))
    return [PairedComparison.of(hits[best], hits[name]).sentence(best, name) for name in hits if name != best]


def table_row(figures: dict[str, Any]) -> list[str]:
    """The figures of a run as text, in the columns of HEADER."""
    shares = (figures[key] for key in ("train_precision_at_1", "validation_precision_at_1", "precision_at_1"))
    train, validation, test = ("-" if share is None else f"{share:.2%}" for share in shares)
    if interval := figures["precision_at_1_interval"]:
        test += f" ({interval[0]:.1%} to {interval[1]:.1%})"
    return [
        *(figures[key] for key in ("run", "network", "dataset")),
        f"{figures['steps']:,}",
        "-" if figures["seconds"] is None else duration(figures["seconds"]),
        train,
        validation,
        test,
        f"{figures['parameters']:,}",
        f"{figures['multiply_adds']:,}",
    ]


def comparison_plots(compared: Sequence[ComparedRun], is_one_of_several: bool = False) -> Curves:
    """A plot for each metric that some run has, with a line for each run. Where runs of other datasets are compared as
    well (`is_one_of_several`), its title names the dataset."""
    dataset = f" ({compared[0].run.recipe.data.dataset})" if is_one_of_several else ""
    return line_plots(
        (key, title + dataset, [(one.run.name, *metric_series(one.points, metric)) for one in compared], label)
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
