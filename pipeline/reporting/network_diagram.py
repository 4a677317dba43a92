"""A diagram of a network: its layers from top to bottom, with shapes and parameters."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.patches import FancyBboxPatch

from pipeline.network import Layer
from pipeline.reporting.plots import CENTRED, COLORS, Plot, new_axes

DRAWN_LAYERS = 16
LONGEST_NAME = 18  # characters of a layer's name


def network_diagram(layers: Sequence[Layer], image_shape: tuple[int, ...], classes: int) -> Plot:
    """A box for each layer, as wide as the logarithm of its number of parameters; of a deep network, the first and the
    last layers."""
    drawn: list[Layer | None] = [*layers]  # None stands for the layers that are not drawn
    if len(layers) > DRAWN_LAYERS:
        drawn = [*layers[: DRAWN_LAYERS // 2], None, *layers[-DRAWN_LAYERS // 2 :]]
    rows = len(drawn) + 2
    with new_axes(4.4, 0.42 * rows + 0.2) as (figure, ((axes,),)):
        axes.axis("off")
        axes.set_xlim(0, 1)
        axes.set_ylim(rows - 0.4, -0.6)
        axes.text(0.5, 0, f"image {shape_text(image_shape)}", **CENTRED)
        widest = max(_log_parameters(layer) for layer in layers)
        for row, layer in enumerate(drawn, 1):
            _arrow_to(axes, row)
            if layer is None:
                axes.text(0.5, row, f"… {len(layers) - DRAWN_LAYERS} more …", **CENTRED, color=COLORS["muted"])
            else:
                _box(axes, row, layer, 0.69 + 0.27 * _log_parameters(layer) / widest)
        _arrow_to(axes, rows - 1)
        axes.text(0.5, rows - 1, f"{classes} classes", **CENTRED)
    described = [
        f"{layer.name}, {layer.kind}, returns {shape_text(layer.output_shape)}" for layer in layers[:DRAWN_LAYERS]
    ]
    alt = f"{len(layers)} layers with weights: {'; '.join(described)}."
    caption = "Each layer's name, kind, output (channels × height × width) and number of parameters."
    return Plot("network", "The network", figure, alt, caption)


def _log_parameters(layer: Layer) -> float:
    return float(np.log10(max(10, layer.parameters)))


def _arrow_to(axes: Axes, row: int) -> None:
    """Draw an arrow to a row from the one above it."""
    style = {"arrowstyle": "-|>", "color": COLORS["muted"]}
    axes.annotate("", (0.5, row - 0.33), (0.5, row - 0.67), arrowprops=style)


def _box(axes: Axes, row: int, layer: Layer, width: float) -> None:
    fill = (*to_rgba(COLORS["accent"])[:3], 0.14)
    corner, style = (0.5 - width / 2, row - 0.3), "round,pad=0,rounding_size=0.01"
    axes.add_patch(FancyBboxPatch(corner, width, 0.6, style, facecolor=fill, edgecolor=COLORS["accent"], linewidth=0.8))
    parts = (_end_of(layer.name), layer.kind, shape_text(layer.output_shape), short_count(layer.parameters))
    axes.text(0.5, row, " · ".join(parts), **CENTRED, fontsize=8)


def shape_text(shape: Sequence[int]) -> str:
    """(3, 32, 32) as "3×32×32"."""
    return "×".join(map(str, shape))


def _end_of(name: str) -> str:
    return name if len(name) <= LONGEST_NAME else "…" + name[1 - LONGEST_NAME :]


def short_count(number: float) -> str:
    """1,068,298 as "1.07 M"."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f}"
