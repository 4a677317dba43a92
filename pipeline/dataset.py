"""Opens a prepared dataset, memory-mapped, and cuts its splits."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convline.errors import ConvlineError
from convline.files import restore_folder
from convline.images import ImageSpec
from pipeline.metadata import DatasetFields, read_described
from pipeline.preparing.integrity import AGAIN, forget, open_arrays

FORMAT = 1


def check_name(name: str, what: str) -> str:
    """The name of a dataset or run, which is a folder's. Raises ConvlineError for one that is none."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name) or name.endswith(".onnx"):
        raise ConvlineError(f"{name!r} is no name for a {what}; use letters, digits, '.', '_' and '-'")
    return name


@dataclass(frozen=True)
class Split:
    """Some rows of a prepared array: `images` uint8 [n, height, width, channels] (memory-mapped),
    `labels` int64 [n], and `rows` int64, which of them belong to this split, ascending."""

    name: str
    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    rows: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.rows)

    def first(self, limit: int | None) -> Split:
        """The first `limit` rows; all where it is None."""
        return Split(self.name, self.images, self.labels, self.rows[:limit])

    def every(self, size: int, first: int) -> Split:
        """Every `size`-th row, from the row `first`: one of `size` parts without overlap."""
        return Split(self.name, self.images, self.labels, self.rows[first::size])

    def forget(self) -> None:
        """As `forget`, of its images."""
        forget(self.images)

    def batch(self, start: int, size: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """Images and labels of rows `start` to `start + size`, in order."""
        rows = self.rows[start : start + size]
        return self.images[rows], self.labels[rows]


@dataclass(frozen=True)
class Dataset:
    """A prepared dataset. `mean` and `std` are per channel, of the training images, in 0 to 255."""

    folder: Path
    meta: dict[str, Any]

    @classmethod
    def open(cls, data_dir: Path, name: str) -> Dataset:
        """Raises ConvlineError where it is not there, or not readable by this version."""
        folder = data_dir / name
        restore_folder(folder)
        try:
            return cls(folder, read_described(folder / "meta.json", DatasetFields, FORMAT, AGAIN))
        except FileNotFoundError as error:
            raise ConvlineError(
                f"no dataset {name} in {data_dir}; `pipeline preprocess {name}` prepares it (images of your own with "
                "--source FOLDER|ARCHIVE)"
            ) from error

    @property
    def name(self) -> str:
        return str(self.meta["name"])

    @property
    def classes(self) -> list[str]:
        return list(self.meta["classes"])

    @property
    def spec(self) -> ImageSpec:
        return ImageSpec.from_dict(self.meta["image"])

    @property
    def fingerprint(self) -> str:
        return str(self.meta["fingerprint"])

    def split(self, name: str, validation: int | float = 0, seed: int = 0) -> Split:
        """The rows of "train", "validation" or "test". Validation is cut from train, stratified, by `seed`.

        Raises ConvlineError for a validation split that is empty or leaves nothing to train on, and where the arrays
        are not those that were prepared.
        """
        source = "test" if name == "test" else "train"
        images, labels = open_arrays(self.folder, self.meta, source)
        rows = np.arange(len(labels))
        if source == "train":
            held_out = stratified(labels, validation, seed) if validation else rows[:0]
            rows = held_out if name == "validation" else np.setdiff1d(rows, held_out, assume_unique=True)
        if not len(rows):
            raise ConvlineError(f"the {name} split of {self.name} is empty; see data.validation in the recipe")
        return Split(name, images, labels, rows)


def stratified(labels: NDArray[np.int64], share: int | float, seed: int) -> NDArray[np.int64]:
    """Rows of a held-out part, ascending, drawn by `seed`, every class in proportion.

    `share` is a count in all (the largest remainders make it up), or a fraction below 1 of each class
    (rounded, but at least one image of a class that has two).
    """
    classes, sizes = np.unique(labels, return_counts=True)
    if isinstance(share, float):
        quotas = np.maximum(np.round(sizes * share).astype(np.int64), sizes > 1)
    elif share < len(labels):
        exact = sizes * share / len(labels)
        quotas = np.floor(exact).astype(np.int64)
        quotas[np.argsort(quotas - exact, kind="stable")[: share - int(quotas.sum())]] += 1
    else:
        raise ConvlineError(f"cannot hold out {share} of {len(labels)} images; hold out fewer")
    generator = np.random.default_rng([seed, len(labels)])
    chosen = [
        generator.permutation(np.flatnonzero(labels == label))[:quota]
        for label, quota in zip(classes, quotas, strict=True)
    ]
    return np.sort(np.concatenate(chosen))
