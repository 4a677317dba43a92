"""A network, and how right it is, as pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.patches import FancyBboxPatch
from numpy.typing import NDArray

from pipeline.network import Layer
from pipeline.reporting.plots import COLORS, Picture, axes_of, shade, short

NAMED_CLASSES = 20  # more do not fit beside an axis
COUNTED_CLASSES = 12  # of which each pair's number fits into its square
DRAWN_LAYERS = 16
CENTRED: dict[str, Any] = {"ha": "center", "va": "center"}


def confusion(counts: NDArray[np.int64], classes: Sequence[str]) -> Picture:
    """int64 [classes, classes], rows true, columns predicted: the stronger, the larger the share of the row."""
    size = len(classes)
    share = counts / np.maximum(1, counts.sum(1, keepdims=True))
    is_small = size <= COUNTED_CLASSES
    side = 4.4 if is_small else 6.5
    with axes_of(side, side) as (figure, ((axes,),)):
        axes.imshow(share, cmap=shade("accent"), vmin=0, vmax=1, interpolation="nearest")
        axes.grid(False)
        if size <= NAMED_CLASSES:
            labels = [short(label) for label in classes]
            axes.set_xticks(range(size), labels, rotation=90)
            axes.set_yticks(range(size), labels)
        for row, column in zip(*counts.nonzero(), strict=True) if is_small else ():
            axes.text(column, row, str(counts[row, column]), **CENTRED, fontsize=7)
        axes.set_xlabel("predicted")
        axes.set_ylabel("true")
    hits = counts.diagonal().sum() / max(1, counts.sum())
    alt = f"Confusion matrix of {size} classes: {hits:.1%} of {counts.sum():,} images lie on the diagonal."
    caption = "Rows are the true classes, columns the predicted ones."
    return Picture("confusion", "Confusion matrix", figure, alt, caption, wide=not is_small)


def calibration(
    confidence: NDArray[np.float64], hits: NDArray[np.float64], counts: NDArray[np.int64], error: float
) -> Picture:
    """Mean confidence, share of hits and number of images of each bin of confidence, and the expected calibration
    error (Naeini et al., 2015)."""
    with axes_of() as (figure, ((axes,),)):
        axes.plot([0, 1], [0, 1], color=COLORS["muted"], linestyle="--", linewidth=1, label="as it should be")
        there = counts > 0
        sizes = 10 + 120 * np.sqrt(counts[there] / counts.max())
        axes.plot(confidence[there], hits[there], color=COLORS["accent"], linewidth=1)
        axes.scatter(confidence[there], hits[there], s=sizes, color=COLORS["accent"], label="images")
        axes.set_xlim(0, 1.03)
        axes.set_ylim(0, 1.06)
        axes.set_xlabel("confidence")
        axes.set_ylabel("share of hits")
        axes.legend(loc="upper left", markerscale=0.5)
    alt = f"Share of hits by confidence, in tenths; the expected calibration error is {error:.3f}."
    caption = f"Expected calibration error {error:.3f}; larger dots are more images."
    return Picture("calibration", "Calibration", figure, alt, caption)


def network(layers: Sequence[Layer], image_shape: tuple[int, ...], classes: int) -> Picture:
    """The layers from top to bottom, each as wide as the logarithm of its parameters."""
    shown: list[Layer | None] = [*layers]
    if len(layers) > DRAWN_LAYERS:
        half = DRAWN_LAYERS // 2
        shown = [*layers[:half], None, *layers[-half:]]
    rows = len(shown) + 2
    with axes_of(4.4, 0.42 * rows + 0.2) as (figure, ((axes,),)):
        axes.axis("off")
        axes.set_xlim(0, 1)
        axes.set_ylim(rows - 0.4, -0.6)
        axes.text(0.5, 0, f"image {shape(image_shape)}", **CENTRED)
        most = max(_width(layer) for layer in layers)
        for row, layer in enumerate(shown, 1):
            _arrow(axes, row)
            if layer is None:
                axes.text(0.5, row, f"… {len(layers) - DRAWN_LAYERS} more …", **CENTRED, color=COLORS["muted"])
            else:
                _box(axes, row, layer, 0.69 + 0.27 * _width(layer) / most)
        _arrow(axes, rows - 1)
        axes.text(0.5, rows - 1, f"{classes} classes", **CENTRED)
    told = [f"{layer.name}, {layer.kind}, returns {shape(layer.output_shape)}" for layer in layers[:DRAWN_LAYERS]]
    alt = f"{len(layers)} layers with weights: {'; '.join(told)}."
    caption = "Layer, kind, what it returns (channels × height × width), parameters."
    return Picture("network", "The network", figure, alt, caption)


def _width(layer: Layer) -> float:
    return float(np.log10(max(10, layer.parameters)))


def _arrow(axes: Axes, row: int) -> None:
    """To a row from the one above."""
    style = {"arrowstyle": "-|>", "color": COLORS["muted"]}
    axes.annotate("", (0.5, row - 0.33), (0.5, row - 0.67), arrowprops=style)


def _box(axes: Axes, row: int, layer: Layer, width: float) -> None:
    fill = (*to_rgba(COLORS["accent"])[:3], 0.14)
    place, style = (0.5 - width / 2, row - 0.3), "round,pad=0,rounding_size=0.01"
    axes.add_patch(FancyBboxPatch(place, width, 0.6, style, facecolor=fill, edgecolor=COLORS["accent"], linewidth=0.8))
    told = f"{_tail(layer.name)} · {layer.kind} · {shape(layer.output_shape)} · {count(layer.parameters)}"
    axes.text(0.5, row, told, **CENTRED, fontsize=8)


def shape(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape))


def _tail(name: str) -> str:
    return name if len(name) <= 18 else "…" + name[-17:]


def count(number: float) -> str:
    """1,068,298 as 1.07 M."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f}"
