"""Learning curves: loss, precision @ 1, learning rate and speed over the steps of a training."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.ticker import NullFormatter
from numpy.typing import NDArray

from pipeline.reporting.plots import COLORS, Plot, new_axes, short_label
from pipeline.tracking.points import Point

LINE_COLORS = ("accent", "second", "third", "good", "muted")
# dashes make lines distinguishable without their colours; there is one more than there are colours, so that a
# combination repeats late
DASHES = ("-", (0, (4, 1.5)), (0, (1, 1)), (0, (6, 1.5, 1, 1.5)), (0, (9, 2)), (0, (2, 1)))
EACH_BATCH = "each batch"
LONGEST_NAME = 28  # characters of a line's name
MARKED_POINTS = 30  # a curve of fewer points has a marker at each
LOG_SCALE_RATIO = 20  # of the largest to the smallest value, above which losses and norms are on a logarithmic scale
DRAWN_POINTS = 600  # of a curve, at most

Line = tuple[str, NDArray[np.int64], NDArray[np.float64]]  # its name, steps and values


class Curves(NamedTuple):
    """Plots of what changed over the steps, and a sentence for each metric that did not."""

    plots: list[Plot]
    sentences: list[str]


def metric_series(points: Sequence[Point], metric: str) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Steps and values of a metric, at most DRAWN_POINTS of them, the first and the last included."""
    pairs = [(point.step, point.values[metric]) for point in points if point.values.get(metric) is not None]
    steps, values = np.array([step for step, _ in pairs], np.int64), np.array([value for _, value in pairs], np.float64)
    if len(steps) > DRAWN_POINTS:
        chosen = np.linspace(0, len(steps) - 1, DRAWN_POINTS).round().astype(np.int64)
        return steps[chosen], values[chosen]
    return steps, values


def line_plot(name: str, title: str, lines: Sequence[Line], label: str, height: float = 2.9) -> Plot:
    """Lines over steps, `height` in inches. A line without points is not drawn, but its colour is not given to another
    line.

    Losses and norms are on a logarithmic scale where they span a large range.
    """
    with new_axes(height=height) as (figure, ((axes,),)):
        smoothed = int(lines[0][0] == EACH_BATCH)  # the index of the first line that is not raw
        for index, (line_name, steps, values) in enumerate(lines):
            if not len(steps):
                continue
            is_raw = line_name == EACH_BATCH
            axes.plot(
                *(steps, values),
                label=short_label(line_name, LONGEST_NAME),
                color=COLORS["muted" if is_raw else LINE_COLORS[index % len(LINE_COLORS)]],
                linewidth=0.7 if is_raw else 1.5,
                linestyle="-" if is_raw else DASHES[(index - smoothed) % len(DASHES)],
                marker="." if len(steps) < MARKED_POINTS else "",
            )
        all_values = np.concatenate([values for _, _, values in lines])
        spans_widely = all_values.min() > 0 and all_values.max() > LOG_SCALE_RATIO * all_values.min()
        if spans_widely and label in ("loss", "norm"):
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("step")
        axes.set_ylabel(label)
        if len(lines) > 1:
            figure.legend(loc="outside lower center", ncols=min(4, len(lines)))
    ends = ", ".join(
        f"{line_name} from {values[0]:.3g} to {values[-1]:.3g}" for line_name, _, values in lines if len(values)
    )
    return Plot(name, title, figure, f"{title} over steps: {ends}.")


def training_curves(points: Sequence[Point]) -> Curves:
    """Loss, precision, learning rate and speed from metrics.jsonl, without those that have no values."""
    splits = {"test": "precision_at_1", "train": "train_precision_at_1", "validation": "validation_precision_at_1"}
    plots: list[tuple[str, str, str, dict[str, str]]] = [
        ("loss", "Loss", "loss", {EACH_BATCH: "loss", "smoothed": "smoothed_loss"}),
        ("precision", "Precision @ 1 of the averaged weights", "precision @ 1", splits),
        ("accuracy", "Accuracy on each batch", "share of hits", {"batch": "batch_accuracy"}),
        ("gradient-norm", "Norm of the gradient", "norm", {"norm": "gradient_norm"}),
        ("learning-rate", "Learning rate", "learning rate", {"rate": "learning_rate"}),
        ("speed", "Images a second", "images/s", {"speed": "images_per_second"}),
    ]
    return line_plots(
        (name, title, [(line_name, *metric_series(points, metric)) for line_name, metric in metrics.items()], label)
        for name, title, label, metrics in plots
    )


def line_plots(plots: Iterable[tuple[str, str, Sequence[Line], str]]) -> Curves:
    """A `line_plot` of each tuple of its arguments, or a sentence where no line changes; nothing for those whose lines
    have no points."""
    curves = Curves([], [])
    for name, title, lines, label in plots:
        if changes(lines):
            curves.plots.append(line_plot(name, title, lines, label))
        elif any(len(steps) for _, steps, _ in lines):
            curves.sentences.append(constant_sentence(title, lines))
    return curves


def changes(lines: Sequence[Line]) -> bool:
    """Whether a line has more than one value, so that there is something to draw."""
    return any(len(np.unique(values)) > 1 for _, _, values in lines)


def constant_sentence(title: str, lines: Sequence[Line]) -> str:
    """What a plot of lines that do not change would show."""
    parts = []
    for name, steps, values in lines:
        if len(steps):
            when = f"at step {steps[0]:,}" if len(steps) == 1 else f"from step {steps[0]:,} to {steps[-1]:,}"
            parts.append(f"{f'{name} ' if len(lines) > 1 else ''}{values[0]:.4g} {when}")
    return f"{title}: {'; '.join(parts)}."
