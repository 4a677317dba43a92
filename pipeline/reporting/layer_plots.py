"""How the values of a network's layers are distributed over a training, as pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from convline.errors import ConvlineError
from pipeline.reporting.curves import SERIES, curves
from pipeline.reporting.plots import COLORS, Picture, axes_of, shade
from pipeline.tracking.points import Point

WIDTH = 5.0  # standard deviations to each side that are drawn
COLUMNS = 120  # summaries that are drawn side by side
KINDS = ("activations", "weights", "gradients")


def distributions(summaries: Sequence[Point], layer: str) -> Picture:
    """How the values of a layer are distributed, over steps: the stronger the colour, the more of them."""
    chosen = _spread(summaries)
    with axes_of(4.4, 4.4, rows=3) as (figure, rows):
        for axes, kind in zip(rows[:, 0], KINDS, strict=True):
            _draw_distribution(axes, chosen, layer, kind)
            axes.set_title(kind, fontsize=8, color=COLORS["muted"])
    zeros = chosen[-1].values["layers"][layer]["activations"]["zeros"]
    caption = f"{zeros:.0%} of the activations are 0 at step {chosen[-1].step:,}."
    alt = f"Distribution of activations, weights and gradients of {layer} over training. {caption}"
    return Picture(f"layer-{layer}", layer, figure, alt, caption)


def _spread(summaries: Sequence[Point]) -> list[Point]:
    chosen = np.unique(np.linspace(0, len(summaries) - 1, COLUMNS).round().astype(np.int64))
    return [summaries[index] for index in chosen]


def _draw_distribution(axes: Axes, summaries: Sequence[Point], layer: str, kind: str) -> None:
    told = [(point.step, point.values["layers"][layer].get(kind, {})) for point in summaries]
    found = [(step, one) for step, one in told if "counts" in one]
    if not found:
        axes.axis("off")
        return
    keys = ("lowest", "highest", "mean", "std")
    lowest, highest, mean, std = (np.array([one[key] for _, one in found]) for key in keys)
    # a few wild values, or steps, must not flatten the rest
    middle, reach = np.median(mean), WIDTH * np.median(std)
    bottom, top = max(lowest.min(), middle - reach), min(highest.max(), middle + reach)
    if bottom >= top:
        bottom, top = bottom - 0.5, bottom + 0.5
    edges = np.linspace(bottom, top, 49)
    columns = np.stack([_rebinned(one, edges) for _, one in found], 1)
    steps = np.array([step for step, _ in found])
    first, last = steps[0], steps[-1]
    # some summaries may have been left out: each is shown until the next one
    image = columns[:, np.searchsorted(steps, np.linspace(first, last, COLUMNS), side="right") - 1]
    axes.imshow(
        np.sqrt(image / image.max(0, keepdims=True).clip(1e-12)),  # the root shows what is rare as well
        cmap=shade("accent"),
        aspect="auto",
        origin="lower",
        interpolation="nearest",
        extent=(first, max(last, first + 1), bottom, top),
    )
    axes.grid(False)
    axes.tick_params(labelsize=7)
    axes.locator_params(nbins=4)


def _rebinned(told: dict[str, Any], edges: NDArray[np.float64]) -> NDArray[np.float64]:
    """A histogram on other edges, each bin's values spread evenly."""
    counts = np.asarray(told["counts"], np.float64)
    lowest, highest = told["lowest"], told["highest"]
    own = np.linspace(lowest, highest if highest > lowest else lowest + 1e-9, len(counts) + 1)
    below = np.interp(edges, own, np.concatenate([[0], counts.cumsum()]))
    return np.diff(below)


def sparsity(summaries: Sequence[Point]) -> Picture:
    """The share of activations that are 0, by layer."""
    lines = []
    for layer in list(summaries[0].values["layers"])[: 2 * len(SERIES)]:
        told = [(point.step, point.values["layers"][layer]["activations"]["zeros"]) for point in summaries]
        steps, zeros = zip(*told, strict=True)
        lines.append((layer, np.array(steps), np.array(zeros)))
    return curves("sparsity", "Sparsity of activations", lines, "share of zeros")


def layer_pictures(summaries: Sequence[Point]) -> list[Picture]:
    """Sparsity, then the distributions of each layer. Raises ConvlineError where the summaries are not of the same."""
    if not summaries:
        return []
    layers = summaries[-1].values.get("layers", {}).keys()
    for point in summaries:
        if not layers or point.values.get("layers", {}).keys() != layers:
            raise ConvlineError(
                f"summaries.jsonl is damaged: the summaries of the steps {point.step} and {summaries[-1].step} are not "
                "of the same layers; remove one of the two lines, or train with --overwrite"
            )
    return [sparsity(summaries), *(distributions(summaries, layer) for layer in summaries[-1].values["layers"])]
