"""Pictures of a training, of its network and of what it says, drawn by matplotlib for a page and for MLflow."""

from __future__ import annotations

import html
import re
import unicodedata
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO, StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_rgba
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from numpy.typing import NDArray

from pipeline.engine.points import Point
from serving.files import atomic_write
from serving.page import Html

if TYPE_CHECKING:  # it needs torch, which what sends pictures does without
    from pipeline.engine.network import Layer

# by name those of serving/page.css, where each has another value in the dark
COLORS = {
    "ink": "#1c2024",
    "muted": "#5c6570",
    "line": "#d5dae0",
    "accent": "#1f6feb",
    "good": "#1a7f37",
    "second": "#bc4c00",
    "third": "#8250df",
}
SERIES = ("accent", "second", "third", "good", "muted")
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "convline",
    "font.size": 9,
    "text.color": COLORS["ink"],
    "text.parse_math": False,
    "axes.edgecolor": COLORS["line"],
    "axes.labelcolor": COLORS["muted"],
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": COLORS["line"],
    "grid.linewidth": 0.5,
    "xtick.color": COLORS["muted"],
    "ytick.color": COLORS["muted"],
    "legend.frameon": False,
    "legend.fontsize": 8,
}
NAMESPACES = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
LONGEST_LABEL = 14  # characters of a class's name beside an axis
NAMED_CLASSES = 20  # more do not fit beside an axis
DRAWN_LAYERS = 16
EACH_BATCH = "each batch"
FEW = 30  # points of a curve, that are marked each
GREAT_RANGE = 20
POINTS = 600  # of a curve that are drawn
WIDTH = 5.0  # standard deviations to each side that are drawn
COLUMNS = 120  # summaries that are drawn side by side


Line = tuple[str, NDArray[np.int64], NDArray[np.float64]]  # its name, steps and values


@dataclass(frozen=True)
class Picture:
    """A figure with what it shows: `alt` says in words what is to be seen."""

    name: str
    title: str
    figure: Figure
    alt: str
    caption: str = ""
    wide: bool = False

    def svg(self) -> Html:
        """As an element whose colours follow the page's."""
        with _drawing():
            text = StringIO()
            self.figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        drawn = text.getvalue()
        drawn = re.sub(r"<metadata>.*?</metadata>", "", drawn[drawn.index("<svg") :], flags=re.DOTALL)
        for name, color in COLORS.items():
            drawn = drawn.replace(color, f"var(--{name})")
        opening, rest = drawn.split(">", 1)
        size = re.search(r'viewBox="[^"]*"', opening)
        assert size is not None
        alt = html.escape(self.alt)
        return Html(f'<svg {size.group()} {NAMESPACES} role="img" aria-label="{alt}"><title>{alt}</title>{rest}')

    def png(self) -> bytes:
        """The same on white."""
        with _drawing():
            buffer = BytesIO()
            self.figure.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
        return buffer.getvalue()


@contextmanager
def _drawing() -> Iterator[None]:
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # the browser has more of them
        yield


@contextmanager
def _axes(width: float = 4.4, height: float = 2.9, columns: int = 1, rows: int = 1) -> Iterator[tuple[Figure, Any]]:
    """A figure of so many inches: on a phone a page shows 4 inches side by side in their full size."""
    with _drawing():
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure, figure.subplots(rows, columns, squeeze=False)


def short(name: str) -> str:
    """A class's name for an axis: what has a width, and not too much of it."""
    kept = "".join(c for c in name if unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Zl", "Zp"))
    return kept if len(kept) <= LONGEST_LABEL else kept[: LONGEST_LABEL - 1] + "…"


def save(folder: Path, pictures: Mapping[str, bytes]) -> None:
    """PNG by name, each whole or not at all."""
    for name, png in pictures.items():
        folder.mkdir(exist_ok=True)
        with atomic_write(folder / f"{name}.png") as file:
            file.write(png)


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
    with _axes() as (figure, ((axes,),)):
        for index, (called, steps, values) in enumerate(lines):
            if not len(steps):
                continue
            is_raw = called == EACH_BATCH
            axes.plot(
                *(steps, values),
                label=short(called),
                color=COLORS["muted" if is_raw else SERIES[index % len(SERIES)]],
                linewidth=0.7 if is_raw else 1.5,
                linestyle="-" if index < len(SERIES) else ":",
                marker="o" if len(steps) < FEW else "",
                markersize=3,
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
    drawn = []
    for name, title, label, keys in wanted:
        lines = [(called, *series(points, key)) for called, key in keys.items()]
        if any(len(steps) for _, steps, _ in lines):
            drawn.append(curves(name, title, lines, label))
    return drawn


def confusion(counts: NDArray[np.int64], classes: Sequence[str]) -> Picture:
    """int64 [classes, classes], rows true, columns predicted: the darker, the larger the share of the row."""
    size = len(classes)
    share = counts / np.maximum(1, counts.sum(1, keepdims=True))
    side = 4.4 if size <= 12 else 6.5
    with _axes(side, side) as (figure, ((axes,),)):
        axes.imshow(share, cmap=_shade("accent"), vmin=0, vmax=1, interpolation="nearest")
        axes.grid(False)
        if size <= NAMED_CLASSES:
            labels = [short(label) for label in classes]
            axes.set_xticks(range(size), labels, rotation=90)
            axes.set_yticks(range(size), labels)
            for row, column in np.ndindex(counts.shape):
                if counts[row, column] and size <= 12:
                    axes.text(column, row, str(counts[row, column]), ha="center", va="center", fontsize=7)
        axes.set_xlabel("predicted")
        axes.set_ylabel("true")
    hits = counts.diagonal().sum() / max(1, counts.sum())
    alt = f"Confusion matrix of {size} classes: {hits:.1%} of {counts.sum():,} images lie on the diagonal."
    return Picture(
        "confusion",
        "Confusion matrix",
        figure,
        alt,
        "Rows are the true classes, columns the predicted ones.",
        size > 12,
    )


def _shade(color: str) -> LinearSegmentedColormap:
    """From nothing to a colour, so that it fits any background."""
    red, green, blue, _ = to_rgba(COLORS[color])
    return LinearSegmentedColormap.from_list(color, [(red, green, blue, 0), (red, green, blue, 0.85)])


def calibration(
    confidence: NDArray[np.float64], hits: NDArray[np.float64], counts: NDArray[np.int64], error: float
) -> Picture:
    """Mean confidence, share of hits and number of images of each bin of confidence, and the expected calibration
    error (Naeini et al., 2015)."""
    with _axes() as (figure, ((axes,),)):
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
    return Picture(
        "calibration",
        "Calibration",
        figure,
        alt,
        f"Expected calibration error {error:.3f}; larger dots are more images.",
    )


def network(layers: Sequence[Layer], image_shape: tuple[int, ...], classes: int) -> Picture:
    """The layers from top to bottom, each as wide as the logarithm of its parameters."""
    shown: list[Layer | None] = list(layers)
    if len(layers) > DRAWN_LAYERS:
        half = DRAWN_LAYERS // 2
        shown = [*layers[:half], None, *layers[-half:]]
    rows = len(shown) + 2
    most = max(np.log10(max(10, layer.parameters)) for layer in layers)
    with _axes(4.4, 0.42 * rows + 0.2) as (figure, ((axes,),)):
        axes.axis("off")
        axes.set_xlim(0, 10)
        axes.set_ylim(-rows + 0.4, 0.6)
        axes.text(5, 0, f"image {shape(image_shape)}", ha="center", va="center")
        for row, layer in enumerate(shown, 1):
            axes.annotate(
                "", (5, -row + 0.33), (5, -row + 0.67), arrowprops={"arrowstyle": "-|>", "color": COLORS["muted"]}
            )
            if layer is None:
                axes.text(
                    5, -row, f"… {len(layers) - DRAWN_LAYERS} more …", ha="center", va="center", color=COLORS["muted"]
                )
                continue
            width = 9.6 * (0.72 + 0.28 * np.log10(max(10, layer.parameters)) / most)
            box = matplotlib.patches.FancyBboxPatch(
                (5 - width / 2, -row - 0.3), width, 0.6, boxstyle="round,pad=0,rounding_size=0.12",
                facecolor=(*to_rgba(COLORS["accent"])[:3], 0.14), edgecolor=COLORS["accent"], linewidth=0.8,
            )  # fmt: skip
            axes.add_patch(box)
            axes.text(
                5,
                -row,
                f"{_tail(layer.name)} · {layer.kind} · {shape(layer.returns)} · {count(layer.parameters)}",
                ha="center",
                va="center",
                fontsize=8,
            )
        axes.annotate(
            "", (5, -rows + 1.33), (5, -rows + 1.67), arrowprops={"arrowstyle": "-|>", "color": COLORS["muted"]}
        )
        axes.text(5, -rows + 1, f"{classes} classes", ha="center", va="center")
    told = "; ".join(
        f"{layer.name}, {layer.kind}, returns {shape(layer.returns)}, {layer.parameters} parameters"
        for layer in layers[:DRAWN_LAYERS]
    )
    return Picture(
        "network",
        "The network",
        figure,
        f"{len(layers)} layers with weights: {told}.",
        "Layer, kind, what it returns (channels × height × width), parameters.",
    )


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


KINDS = ("activations", "weights", "gradients")


def distributions(summaries: Sequence[Point], layer: str) -> Picture:
    """How the values of a layer are distributed, over steps: the stronger the colour, the more of them."""
    chosen = _spread(summaries)
    with _axes(4.4, 4.4, rows=3) as (figure, rows):
        for axes, kind in zip(rows[:, 0], KINDS, strict=True):
            _draw_distribution(axes, chosen, layer, kind)
            axes.set_title(kind, fontsize=8, color=COLORS["muted"])
    zeros = chosen[-1].values["layers"][layer]["activations"]["zeros"]
    caption = f"{zeros:.0%} of the activations are 0 at the end."
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
    image = np.stack([_rebinned(one, edges) for _, one in found], 1)
    first, last = found[0][0], found[-1][0]
    axes.imshow(
        np.sqrt(image / image.max(0, keepdims=True).clip(1e-12)),  # the root shows what is rare as well
        cmap=_shade("accent"),
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
    """Sparsity, then the distributions of each layer."""
    if not summaries:
        return []
    return [sparsity(summaries), *(distributions(summaries, layer) for layer in summaries[-1].values["layers"])]
