"""`pipeline check`: what in a dataset spoils its figures: copies, near duplicates, doubtful labels, blank images, …"""

from __future__ import annotations

import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from numpy.typing import NDArray

from convline.errors import ConvlineError
from pipeline.checking.doubtful_labels import DoubtfulLabels, doubtful_labels
from pipeline.checking.findings import TINY_CLASS, Check, DoubtfulLabel, NamedImage, Pair
from pipeline.checking.image_features import features_of_run, pretrained_features
from pipeline.checking.near_duplicates import describe, near_pairs
from pipeline.dataset import Dataset
from pipeline.preparing.equal_images import first_equal
from pipeline.preparing.paths_and_groups import position_in_split
from pipeline.run import Run


def check(dataset: Dataset, run: Run | None = None, *, judge_labels: bool = True) -> Check:
    """Look at all images of a prepared dataset. Labels are judged by a pretrained network, or by that of `run`.

    Raises ConvlineError where the dataset is damaged, where the run was trained on images of another kind, and where
    the package with the pretrained weights is missing.
    """
    started = time.monotonic()
    images = _Images(dataset)
    equal = first_equal(*images.arrays)
    described = describe(*images.arrays)
    near = near_pairs(described).tolist()
    pairs = [(int(first), row, True) for row, first in enumerate(equal) if first != row]
    pairs += [(one, other, False) for one, other in near if equal[one] == one and equal[other] == other]
    doubtful = _doubtful(dataset, images, equal, run) if judge_labels else None
    counts = dataset.meta["counts"]["train"]
    return Check(
        dataset=dataset.name,
        images=len(images.labels),
        pairs=[Pair(images.named(one), images.named(other), is_equal) for one, other, is_equal in pairs],
        doubtful_labels=None if doubtful is None else _named(doubtful, images),
        blank=[images.named(row) for row in np.flatnonzero(described.is_blank).tolist()],
        odd_sizes=dataset.meta.get("sizes", {}).get("odd", {}),
        tiny_classes={name: count for name, count in counts.items() if count < TINY_CLASS},
        imbalance=max(counts.values()) / max(1, min(counts.values())),
        seconds=time.monotonic() - started,
    )


class _Images:
    """All images of a dataset, by rows that count through its splits: `arrays` of pixels and `labels`, int64 [n]."""

    def __init__(self, dataset: Dataset) -> None:
        self._classes = dataset.classes
        self._splits = [dataset.split(name) for name in dataset.meta["counts"]]
        self._paths = [dataset.paths(split) for split in self._splits]
        self._starts = np.cumsum([0, *(len(split) for split in self._splits)])
        self.arrays = [split.images for split in self._splits]
        self.labels = np.concatenate([split.labels for split in self._splits])

    def named(self, row: int) -> NamedImage:
        number = int(np.searchsorted(self._starts, row, "right")) - 1
        split, paths, position = self._splits[number], self._paths[number], int(row - self._starts[number])
        path = position_in_split(split.name, position) if paths is None else paths[position]
        return NamedImage(split.name, position, path, self._classes[self.labels[row]])

    def class_name(self, label: int) -> str:
        return self._classes[label]


def _doubtful(dataset: Dataset, images: _Images, equal: NDArray[np.int64], run: Run | None) -> DoubtfulLabels:
    with TemporaryDirectory(prefix="convline-check-") as scratch:
        if run is None:
            features = pretrained_features(images.arrays, Path(scratch))
        elif run.info["dataset"]["image"] != dataset.meta["image"]:
            raise ConvlineError(
                f"{run.folder} was trained on images of another size, or decoded in another way, than those of "
                f"{dataset.name}; leave out --run, or check the dataset that it was trained on"
            )
        else:
            features = features_of_run(run, images.arrays, Path(scratch))
        return doubtful_labels(features, images.labels, len(dataset.classes), equal)


def _named(doubtful: DoubtfulLabels, images: _Images) -> list[DoubtfulLabel]:
    return [
        DoubtfulLabel(images.named(row), images.class_name(suggested), *map(float, probability))
        for row, suggested, probability in zip(
            doubtful.rows.tolist(), doubtful.suggested.tolist(), doubtful.probability, strict=True
        )
    ]
