"""What every picture has in common: how it is drawn by matplotlib, for a page and as PNG."""

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

# by name those of convline/page.css, where each has another value in the dark
COLORS = {
    "ink": "#1c2024",
    "muted": "#5c6570",
    "line": "#d5dae0",
    "accent": "#1f6feb",
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
LONGEST_LABEL = 14  # characters of a class's name beside an axis


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
        for name, color in COLORS.items():  # as values of attributes, not in texts
            drawn = re.sub(rf"([:\"] ?){color}(?=[;\"])", rf"\1var(--{name})", drawn)
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
def axes_of(width: float = 4.4, height: float = 2.9, columns: int = 1, rows: int = 1) -> Iterator[tuple[Figure, Any]]:
    """A figure of so many inches: on a phone a page shows 4 inches side by side in their full size."""
    with _drawing():
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure, figure.subplots(rows, columns, squeeze=False)


def short(name: str, longest: int = LONGEST_LABEL) -> str:
    """A name for an axis or a legend: what has a width, and of a long one its two ends."""
    kept = "".join(c for c in name if unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Zl", "Zp"))
    return elide_middle(kept, longest)


def save(folder: Path, pictures: Mapping[str, bytes]) -> None:
    """PNG by name, each whole or not at all."""
    for name, png in pictures.items():
        folder.mkdir(exist_ok=True)
        with atomic_write(folder / f"{name}.png") as file:
            file.write(png)


def shade(color: str) -> LinearSegmentedColormap:
    """From nothing to a colour, so that it fits any background."""
    red, green, blue, _ = to_rgba(COLORS[color])
    return LinearSegmentedColormap.from_list(color, [(red, green, blue, 0), (red, green, blue, 0.85)])
