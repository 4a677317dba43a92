"""Opens a prepared dataset: its splits (train, validation, test) as memory-mapped arrays, read in batches."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convline.errors import ConvlineError
from convline.files import restore_folder
from convline.images import ImageSpec
from pipeline.json_schemas import MetaFields, read_validated
from pipeline.preparing.held_out_splits import stratified_sample
from pipeline.preparing.integrity import REMEDY, open_arrays
from pipeline.preparing.mapped_arrays import release_memory
from pipeline.preparing.paths_and_groups import read_groups, read_paths

FORMAT = 1


def check_name(name: str, kind: str) -> str:
    """`name`, if it is a valid name for a `kind` ("dataset", "run", "model"). Raises ConvlineError if it is not."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name) or name.endswith(".onnx"):
        raise ConvlineError(f"invalid {kind} name {name!r}; use letters, digits, '.', '_' and '-'")
    return name


@dataclass(frozen=True)
class Split:
    """A split of a dataset: the images at `rows` (int64, ascending) of the prepared arrays `images`, uint8
    [n, height, width, channels] (memory-mapped), and `labels`, int64 [n]."""

    name: str
    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    rows: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.rows)

    def class_counts(self, classes: int) -> list[int]:
        """The number of images of each class."""
        return np.bincount(self.labels[self.rows], minlength=classes).tolist()

    def take(self, limit: int | None) -> Split:
        """The first `limit` images; all of them for None."""
        return replace(self, rows=self.rows[:limit])

    def shard(self, count: int, index: int) -> Split:
        """Every `count`-th image, from `index` on: one of `count` parts that do not overlap."""
        return replace(self, rows=self.rows[index::count])

    def batches(self, size: int) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.int64]]]:
        """Copies of the images and labels in order, `size` at a time, fewer in the last batch."""
        for start in range(0, len(self), size):
            rows = self.rows[start : start + size]
            batch = self.images[rows], self.labels[rows]
            self.release_memory()
            yield batch

    def release_memory(self) -> None:
        """Release the memory of images that were read from the memory map."""
        release_memory(self.images)


@dataclass(frozen=True)
class Dataset:
    """A prepared dataset. `meta` is its meta.json; its `mean` and `std` are per channel, of the training images, in 0
    to 255."""

    folder: Path
    meta: dict[str, Any]

    @classmethod
    def open(cls, data_dir: Path, name: str) -> Dataset:
        """Raises ConvlineError where the dataset is missing, damaged or of another format."""
        folder = data_dir / name
        restore_folder(folder)
        try:
            return cls(folder, read_validated(folder / "meta.json", MetaFields, FORMAT, REMEDY))
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

    @property
    def leaks(self) -> int:
        """How many images are in two splits, with the same pixels; 0 where an earlier convline did not look."""
        return int(self.meta.get("equal_images", {}).get("leaks", {}).get("count", 0))

    @property
    def _has_own_validation(self) -> bool:
        return "validation" in self.meta["counts"]

    def _stored_split(self, name: str) -> str:
        """The split in whose arrays the images of a split are."""
        return name if name == "test" or self._has_own_validation else "train"

    def paths(self, split: Split) -> list[str] | None:
        """The path of each image of a split in the dataset's source; None where it has none (see `read_paths`)."""
        paths = read_paths(self.folder, self._stored_split(split.name), len(split.labels))
        return None if paths is None else [paths[row] for row in split.rows.tolist()]

    def has_validation(self, validation: int | float) -> bool:
        """Whether there is a validation split: one of its own, or `validation` images held out (see `split`)."""
        return self._has_own_validation or bool(validation)

    def split(self, name: str, validation: int | float = 0, seed: int = 0) -> Split:
        """The split "train", "validation" or "test". Where the dataset has no validation split of its own, a stratified
        sample of the training images, drawn by `seed`, is held out as validation: a number of them, or a fraction.
        Images with the same pixels stay together.

        Raises ConvlineError for a split without images, and where the arrays are not those that were prepared.
        """
        stored_split = self._stored_split(name)
        images, labels = open_arrays(self.folder, self.meta, stored_split)
        rows = np.arange(len(labels))
        if stored_split == "train" and not self._has_own_validation:
            groups = read_groups(self.folder, self.meta)
            held_out = stratified_sample(labels, validation, seed, groups) if validation else rows[:0]
            rows = held_out if name == "validation" else np.setdiff1d(rows, held_out, assume_unique=True)
        if not len(rows):
            raise ConvlineError(f"the {name} split of {self.name} is empty; see data.validation in the recipe")
        return Split(name, images, labels, rows)
