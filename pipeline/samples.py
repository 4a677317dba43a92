"""Images of a dataset as files, so that there is something to look at and to classify."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from convline.errors import ConvlineError
from convline.files import atomic_write, name_on_disk
from pipeline.dataset import Dataset, Split
from pipeline.reporting.image_grid import View, grid, to_pil

SHEET_COLUMNS = 10  # images a class on the contact sheet
SOFTWARE = "convline samples"  # by which a contact sheet is known, and may be replaced


def write_samples(dataset: Dataset, split: Split, count: int, output: Path, view: View | None = None) -> list[Path]:
    """The first images of each class, `count` in all, as `output`/<class>/<row>.png, lossless, and contact sheets
    beside it, which are returned: `output`.png, and with a `view` `output`.seen.png.

    Raises ConvlineError rather than replace a file that is something else.
    """
    named = output if output.name else output.resolve()
    views = {".png": None, **({".seen.png": view} if view else {})}
    sheets = [named.with_name(named.name + ending) for ending in views]
    for sheet in sheets:
        if sheet.exists() and not _is_ours(sheet):
            raise ConvlineError(f"{sheet} exists and is no contact sheet; choose another --output")
    chosen = _round_robin(split, len(dataset.classes))[:count]
    folders = [output / name_on_disk(label) for label in dataset.classes]
    for row in chosen:
        index = split.rows[row]
        _keep(folders[split.labels[index]] / f"{index}.png", _png(split.images[index]))
    known = PngInfo()
    known.add_text("Software", SOFTWARE)
    for sheet, seen in zip(sheets, views.values(), strict=True):
        with atomic_write(sheet) as file:
            contact_sheet(dataset, split, chosen, seen).save(file, "PNG", pnginfo=known)
    return sheets


def _is_ours(sheet: Path) -> bool:
    try:
        with Image.open(sheet) as image:
            return image.info.get("Software") == SOFTWARE
    except UnidentifiedImageError:
        return False


def _round_robin(split: Split, classes: int) -> NDArray[np.int64]:
    """Positions in the split: the first of every class, then the second of every class, …"""
    labels = split.labels[split.rows]
    turn = np.zeros(len(labels), np.int64)
    for label in range(classes):
        mine = labels == label
        turn[mine] = np.arange(mine.sum())
    return np.lexsort((labels, turn))


def _keep(path: Path, content: bytes) -> None:
    if path.exists():
        if path.read_bytes() != content:
            raise ConvlineError(f"{path} exists and is another image; choose another --output")
        return
    with atomic_write(path) as file:
        file.write(content)


def _png(image: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    to_pil(image).save(buffer, "PNG")
    return buffer.getvalue()


def contact_sheet(
    dataset: Dataset, split: Split, positions: NDArray[np.int64], view: View | None = None
) -> Image.Image:
    """One row a class, its name at the left, up to ten images."""
    labels = split.labels[split.rows[positions]]
    rows = [split.rows[positions][labels == number][:SHEET_COLUMNS] for number in range(len(dataset.classes))]
    images = [split.images[own] if view is None else view(split.images[own]) for own in rows]
    return grid([(label, list(map(to_pil, own))) for label, own in zip(dataset.classes, images, strict=True)])
