"""Writes sample images of a dataset as PNG files, a folder per class, and contact sheets of them."""

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
from pipeline.reporting.image_grid import NetworkViews, View, grid, to_pil

SHEET_COLUMNS = 10  # images per class on the contact sheet
AUGMENTED_IMAGES, AUGMENTED_STEPS = 10, 9  # rows and columns of the sheet of augmented images
SOFTWARE = "convline samples"  # PNG text that marks contact sheets, which may be replaced


def write_samples(
    dataset: Dataset, split: Split, count: int, output: Path, views: NetworkViews | None = None
) -> list[Path]:
    """Write the first images of each class, `count` in all, as `output`/<class>/<row>.png, and contact sheets.

    Returns the paths of the contact sheets: `output`.png; with `views`, `output`.seen.png, of the images as the network
    sees them; and where it augments, `output`.augmented.png, of a few images, each several times. Raises ConvlineError
    where a file exists that is neither the same image nor a contact sheet.
    """
    positions = _round_robin(split, len(dataset.classes))[:count]
    images = {".png": contact_sheet(dataset, split, positions)}
    if views:
        images[".seen.png"] = contact_sheet(dataset, split, positions, views.seen)
    if views and views.augmented:
        images[".augmented.png"] = augmented_sheet(dataset, split, positions, views.augmented)
    folder = output if output.name else output.resolve()
    sheets = {folder.with_name(folder.name + ending): image for ending, image in images.items()}
    for path in sheets:
        if path.exists() and not _is_contact_sheet(path):
            raise ConvlineError(f"{path} exists and is not a contact sheet; choose another --output")
    class_folders = [output / name_on_disk(label) for label in dataset.classes]
    for row in split.rows[positions]:
        _write_png(class_folders[split.labels[row]] / f"{row}.png", split.images[row])
    sheet_text = PngInfo()
    sheet_text.add_text("Software", SOFTWARE)
    for path, sheet in sheets.items():
        with atomic_write(path) as file:
            sheet.save(file, "PNG", pnginfo=sheet_text)
    return list(sheets)


def _is_contact_sheet(path: Path) -> bool:
    try:
        with Image.open(path) as image:
            return image.info.get("Software") == SOFTWARE
    except UnidentifiedImageError:
        return False


def _round_robin(split: Split, classes: int) -> NDArray[np.int64]:
    """Positions in the split: the first image of every class, then the second of every class, …"""
    labels = split.labels[split.rows]
    number_in_class = np.zeros(len(labels), np.int64)
    for label in range(classes):
        is_label = labels == label
        number_in_class[is_label] = np.arange(is_label.sum())
    return np.lexsort((labels, number_in_class))


def _write_png(path: Path, image: NDArray[np.uint8]) -> None:
    """Write an image, unless the file holds it already. Raises ConvlineError where it holds something else."""
    buffer = io.BytesIO()
    to_pil(image).save(buffer, "PNG")
    content = buffer.getvalue()
    if not path.exists():
        with atomic_write(path) as file:
            file.write(content)
    elif path.read_bytes() != content:
        raise ConvlineError(f"{path} exists and is another image; choose another --output")


def contact_sheet(
    dataset: Dataset, split: Split, positions: NDArray[np.int64], view: View | None = None
) -> Image.Image:
    """The images at `positions` of the split, a row per class: its name on the left, then at most ten images."""
    rows = split.rows[positions]
    labels = split.labels[rows]
    rows_of_classes = [rows[labels == number][:SHEET_COLUMNS] for number in range(len(dataset.classes))]
    images = [split.images[of_class] if view is None else view(split.images[of_class]) for of_class in rows_of_classes]
    return grid([(label, list(map(to_pil, shown))) for label, shown in zip(dataset.classes, images, strict=True)])


def augmented_sheet(dataset: Dataset, split: Split, positions: NDArray[np.int64], view: View) -> Image.Image:
    """The first images at `positions` of the split, a row each: the name of its class on the left, the image as it is
    stored, then as training may see it."""
    rows = split.rows[positions[:AUGMENTED_IMAGES]]
    stored = split.images[rows]
    labels = [dataset.classes[label] for label in split.labels[rows]]
    return grid(
        [
            (label, list(map(to_pil, [image, *augmented])))
            for label, image, augmented in zip(labels, stored, view(stored), strict=True)
        ]
    )
