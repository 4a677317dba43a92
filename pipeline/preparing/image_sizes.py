"""The sizes that a source's images have before they are resized: a summary for `meta.json` and for the user."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

SMALL_SIDE = 16  # pixels
NARROW_RATIO = 5  # of the longer side to the shorter
MAX_LISTED = 10  # odd images of each kind
KINDS = {"small": f"a side under {SMALL_SIDE} pixels", "narrow": f"one side over {NARROW_RATIO} times the other"}

Size = tuple[int, int]  # height, width


def summary_of_sizes(sizes: Mapping[int, Size], paths: Sequence[str]) -> dict[str, Any]:
    """The smallest, largest and median size by area, the number of different sizes, and the odd images: those that are
    small or narrow, where the median size is not. `sizes` has one image or more; `paths` are by row."""
    by_area = sorted(sizes.values(), key=lambda size: (size[0] * size[1], size))
    median = by_area[len(by_area) // 2]
    odd = {}
    for kind in KINDS:
        rows = [row for row, size in sorted(sizes.items()) if _is(kind, size)]
        if rows and not _is(kind, median):
            listed = [
                {"path": paths[row], "height": sizes[row][0], "width": sizes[row][1]} for row in rows[:MAX_LISTED]
            ]
            odd[kind] = {"count": len(rows), "images": listed}
    return {
        "smallest": list(by_area[0]),
        "largest": list(by_area[-1]),
        "median": list(median),
        "different": len(set(by_area)),
        "odd": odd,
    }


def _is(kind: str, size: Size) -> bool:
    return min(size) < SMALL_SIDE if kind == "small" else max(size) > NARROW_RATIO * min(size)


def lines_about_sizes(summary: Mapping[str, Any]) -> Iterator[str]:
    """The summary for people: the range of sizes, height x width, and a line for each kind of odd ones."""
    smallest, largest, median = (_written(*summary[name]) for name in ("smallest", "largest", "median"))
    if summary["different"] == 1:
        yield f"size: every image is {smallest} (height x width)"
    else:
        yield f"sizes: {smallest} to {largest} (height x width), median {median}, {summary['different']} different"
    yield from lines_about_odd_sizes(summary["odd"])


def lines_about_odd_sizes(odd_sizes: Mapping[str, Any]) -> Iterator[str]:
    """A line for each kind of odd sizes."""
    for kind, odd in odd_sizes.items():
        first = odd["images"][0]
        size = _written(first["height"], first["width"])
        yield f"odd sizes: {odd['count']} with {KINDS.get(kind, kind)}, such as {first['path']} ({size})"


def _written(height: int, width: int) -> str:
    return f"{height}x{width}"
