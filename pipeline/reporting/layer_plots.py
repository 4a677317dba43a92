"""Plots of a network's layers over a training: distributions of activations, weights and gradients; sparsity."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from convline.errors import ConvlineError
from pipeline.reporting.learning_curves import LINE_COLORS, Curves, changes, constant_sentence, line_plot
from pipeline.reporting.plots import COLORS, Plot, new_axes, transparent_colormap
from pipeline.tracking.points import Point

DRAWN_DEVIATIONS = 5.0  # standard deviations to each side of the mean
COLUMNS = 120  # summaries drawn side by side
HEIGHT = 4.4  # of a plot, in inches
KINDS = ("activations", "weights", "gradients")


def layer_distributions(summaries: Sequence[Point], layer: str) -> Plot:
    """The distribution of a layer's values over steps: a stronger colour stands for more values."""
    chosen = _evenly_spaced(summaries)
    with new_axes(height=HEIGHT, rows=3) as (figure, rows):
        for axes, kind in zip(rows[:, 0], KINDS, strict=True):
            _draw_distribution(axes, chosen, layer, kind)
            axes.set_title(kind, fontsize=8, color=COLORS["muted"])
    zeros = chosen[-1].values["layers"][layer]["activations"]["zeros"]
    caption = f"{zeros:.0%} of the activations are 0 at step {chosen[-1].step:,}."
    alt = f"Distribution of activations, weights and gradients of {layer} over training. {caption}"
    return Plot(f"layer-{layer}", layer, figure, alt, caption)


def _evenly_spaced(summaries: Sequence[Point]) -> list[Point]:
    chosen = np.unique(np.linspace(0, len(summaries) - 1, COLUMNS).round().astype(np.int64))
    return [summaries[index] for index in chosen]


def _draw_distribution(axes: Axes, summaries: Sequence[Point], layer: str, kind: str) -> None:
    recorded = [(point.step, point.values["layers"][layer].get(kind, {})) for point in summaries]
    histograms = [(step, histogram) for step, histogram in recorded if "counts" in histogram]
    if not histograms:
        axes.axis("off")
        return
    keys = ("lowest", "highest", "mean", "std")
    lowest, highest, mean, std = (np.array([histogram[key] for _, histogram in histograms]) for key in keys)
    # a few outliers, in values or in steps, must not compress the rest
    center, reach = np.median(mean), DRAWN_DEVIATIONS * np.median(std)
    bottom, top = max(lowest.min(), center - reach), min(highest.max(), center + reach)
    if bottom >= top:
        bottom, top = bottom - 0.5, bottom + 0.5
    edges = np.linspace(bottom, top, 49)
    columns = np.stack([_rebinned(histogram, edges) for _, histogram in histograms], 1)
    steps = np.array([step for step, _ in histograms])
    first, last = steps[0], steps[-1]
    # summaries may be missing at some steps: each is shown until the next one
    image = columns[:, np.searchsorted(steps, np.linspace(first, last, COLUMNS), side="right") - 1]
    axes.imshow(
        np.sqrt(image / image.max(0, keepdims=True).clip(1e-12)),  # the square root makes rare values visible
        cmap=transparent_colormap("accent"),
        aspect="auto",
        origin="lower",
        interpolation="nearest",
        extent=(first, max(last, first + 1), bottom, top),
    )
    axes.grid(False)
    axes.tick_params(labelsize=7)
    axes.locator_params(nbins=4)


def _rebinned(histogram: dict[str, Any], edges: NDArray[np.float64]) -> NDArray[np.float64]:
    """The histogram's counts between other edges, with the values of each bin spread evenly over it."""
    counts = np.asarray(histogram["counts"], np.float64)
    lowest, highest = histogram["lowest"], histogram["highest"]
    original_edges = np.linspace(lowest, highest if highest > lowest else lowest + 1e-9, len(counts) + 1)
    cumulative = np.interp(edges, original_edges, np.concatenate([[0], counts.cumsum()]))
    return np.diff(cumulative)


def sparsity(summaries: Sequence[Point]) -> Curves:
    """The share of activations that are 0, a line for each layer; as high as the layers' distributions beside it."""
    title = "Sparsity of activations"
    lines = []
    for layer in list(summaries[0].values["layers"])[: 2 * len(LINE_COLORS)]:
        pairs = [(point.step, point.values["layers"][layer]["activations"]["zeros"]) for point in summaries]
        steps, zeros = zip(*pairs, strict=True)
        lines.append((layer, np.array(steps), np.array(zeros)))
    if not changes(lines):
        return Curves([], [constant_sentence(title, lines)])
    return Curves([line_plot("sparsity", title, lines, "share of zeros", HEIGHT)], [])


def layer_plots(summaries: Sequence[Point]) -> Curves:
    """Sparsity, then the distributions of each layer; without the latter for a single summary, as they show a change.

    Raises ConvlineError if the summaries have different layers.
    """
    if not summaries:
        return Curves([], [])
    layers = summaries[-1].values.get("layers", {}).keys()
    for point in summaries:
        if not layers or point.values.get("layers", {}).keys() != layers:
            raise ConvlineError(
                f"summaries.jsonl is damaged: the summaries of steps {point.step} and {summaries[-1].step} have "
                "different layers; remove one of the two lines, or train with --overwrite"
            )
    plots, sentences = sparsity(summaries)
    if len(summaries) > 1:
        plots += [layer_distributions(summaries, layer) for layer in layers]
    return Curves(plots, sentences)
