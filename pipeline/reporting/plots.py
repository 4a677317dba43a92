"""What all plots share: colours, matplotlib style, and drawing as SVG for an HTML page and as PNG."""

from __future__ import annotations

import html
import re
import unicodedata
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.colors import LinearSegmentedColormap, to_rgba
from matplotlib.figure import Figure

from convline.files import atomic_write
from convline.html import Html, elide_middle

# named as in convline/page.css, which has other values for dark mode
COLORS = {
    "ink": "#1c2024",
    "muted": "#5c6570",
    "line": "#d5dae0",
    "accent": "#1b66dc",
    "good": "#1a7f37",
    "second": "#bc4c00",
    "third": "#8250df",
}
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
SQUARE = (4.4, 4.4)  # width and height in inches of plots that stand side by side
LONGEST_LABEL = 14  # characters of a class's name beside an axis
CENTRED: Any = {"ha": "center", "va": "center"}  # of a text


@dataclass(frozen=True)
class Plot:
    """A matplotlib figure with its texts; `name` is its file name, `alt` describes it for those who cannot see it."""

    name: str
    title: str
    figure: Figure
    alt: str
    caption: str = ""
    is_wide: bool = False

    def svg(self) -> Html:
        """An `svg` element whose colours are those of the page, in light and dark mode."""
        with _drawing():
            text = StringIO()
            self.figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        drawn = text.getvalue()
        drawn = re.sub(r"<metadata>.*?</metadata>", "", drawn[drawn.index("<svg") :], flags=re.DOTALL)
        for name, color in COLORS.items():  # only where they are values of attributes, not in text
            drawn = re.sub(rf"([:\"] ?){color}(?=[;\"])", rf"\1var(--{name})", drawn)
        opening, rest = drawn.split(">", 1)
        size = re.search(r'viewBox="[^"]*"', opening)
        assert size is not None
        alt = html.escape(self.alt)
        return Html(f'<svg {size.group()} {NAMESPACES} role="img" aria-label="{alt}"><title>{alt}</title>{rest}')

    def png(self) -> bytes:
        """A PNG file with a white background."""
        with _drawing():
            buffer = BytesIO()
            self.figure.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
        return buffer.getvalue()


@contextmanager
def _drawing() -> Iterator[None]:
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # the browser has fonts with more glyphs
        yield


@contextmanager
def new_axes(width: float = 4.4, height: float = 2.9, columns: int = 1, rows: int = 1) -> Iterator[tuple[Figure, Any]]:
    """A new figure, width and height in inches, and its axes [rows, columns]. A phone shows 4 inches in full size."""
    with _drawing():
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure, figure.subplots(rows, columns, squeeze=False)


def short_label(name: str, longest: int = LONGEST_LABEL) -> str:
    """A name for an axis or a legend: without control and format characters, and with its middle elided if long."""
    printable = "".join(c for c in name if unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Zl", "Zp"))
    return elide_middle(printable, longest)


def save_pngs(folder: Path, pngs: Mapping[str, bytes]) -> None:
    """Write `folder`/<name>.png for each name, atomically; the folder is created if there is something to write."""
    for name, png in pngs.items():
        folder.mkdir(exist_ok=True)
        with atomic_write(folder / f"{name}.png") as file:
            file.write(png)


def transparent_colormap(color: str) -> LinearSegmentedColormap:
    """From transparent to a colour of COLORS, so that it fits any background."""
    red, green, blue, _ = to_rgba(COLORS[color])
    return LinearSegmentedColormap.from_list(color, [(red, green, blue, 0), (red, green, blue, 0.85)])
