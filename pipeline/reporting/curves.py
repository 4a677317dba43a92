"""Curves of a training, over its steps."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from matplotlib.ticker import NullFormatter
from numpy.typing import NDArray

from pipeline.reporting.plots import COLORS, Picture, axes_of, short
from pipeline.tracking.points import Point

SERIES = ("accent", "second", "third", "good", "muted")
# lines are told apart without their colours as well: of another number, so that both together repeat late
DASHES = ("-", (0, (4, 1.5)), (0, (1, 1)), (0, (6, 1.5, 1, 1.5)), (0, (9, 2)), (0, (2, 1)))
EACH_BATCH = "each batch"
LONGEST_NAME = 28  # characters of a line's name
FEW = 30  # points of a curve, that are marked each
GREAT_RANGE = 20
POINTS = 600  # of a curve that are drawn

Line = tuple[str, NDArray[np.int64], NDArray[np.float64]]  # its name, steps and values


def series(points: Sequence[Point], key: str) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Steps and values of a metric, at most POINTS of them, the first and the last among them."""
    found = [(point.step, point.values[key]) for point in points if point.values.get(key) is not None]
    steps, values = np.array([step for step, _ in found], np.int64), np.array([value for _, value in found], np.float64)
    if len(steps) > POINTS:
        chosen = np.linspace(0, len(steps) - 1, POINTS).round().astype(np.int64)
        return steps[chosen], values[chosen]
    return steps, values


def curves(name: str, title: str, lines: Sequence[Line], label: str) -> Picture:
    """Lines over steps; one without points is left out, and keeps its colour for other pictures of the same.

    Losses and norms are on a logarithmic scale where they span a great range.
    """
    with axes_of() as (figure, ((axes,),)):
        smoothed = int(lines[0][0] == EACH_BATCH)  # the number of the first line that is not raw
        for index, (called, steps, values) in enumerate(lines):
            if not len(steps):
                continue
            is_raw = called == EACH_BATCH
            axes.plot(
                *(steps, values),
                label=short(called, LONGEST_NAME),
                color=COLORS["muted" if is_raw else SERIES[index % len(SERIES)]],
                linewidth=0.7 if is_raw else 1.5,
                linestyle="-" if is_raw else DASHES[(index - smoothed) % len(DASHES)],
                marker="." if len(steps) < FEW else "",
            )
        everything = np.concatenate([values for _, _, values in lines])
        is_great = everything.min() > 0 and everything.max() > GREAT_RANGE * everything.min()
        if is_great and label in ("loss", "norm"):
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("step")
        axes.set_ylabel(label)
        if len(lines) > 1:
            figure.legend(loc="outside lower center", ncols=min(4, len(lines)))
    ends = ", ".join(f"{called} from {values[0]:.3g} to {values[-1]:.3g}" for called, _, values in lines if len(values))
    return Picture(name, title, figure, f"{title} over steps: {ends}.")


def training_curves(points: Sequence[Point]) -> list[Picture]:
    """Loss, precision, learning rate and speed from metrics.jsonl; those of which there are values."""
    splits = {"test": "precision_at_1", "train": "train_precision_at_1", "validation": "validation_precision_at_1"}
    wanted: list[tuple[str, str, str, dict[str, str]]] = [
        ("loss", "Loss", "loss", {EACH_BATCH: "loss", "smoothed": "smoothed_loss"}),
        ("precision", "Precision @ 1 of the averaged weights", "precision @ 1", splits),
        ("accuracy", "Accuracy on each batch", "share of hits", {"batch": "batch_accuracy"}),
        ("gradient-norm", "Norm of the gradient", "norm", {"norm": "gradient_norm"}),
        ("learning-rate", "Learning rate", "learning rate", {"rate": "learning_rate"}),
        ("speed", "Images a second", "images/s", {"speed": "images_per_second"}),
    ]
    return draw_curves(
        (name, title, [(called, *series(points, key)) for called, key in keys.items()], label)
        for name, title, label, keys in wanted
    )


def draw_curves(wanted: Iterable[tuple[str, str, Sequence[Line], str]]) -> list[Picture]:
    """What `curves` takes, each; without those that have no points at all."""
    return [curves(*one) for one in wanted if any(len(steps) for _, steps, _ in one[2])]
