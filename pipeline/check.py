"""`pipeline check`: what in a dataset spoils its figures: copies, near duplicates, blank images, tiny classes."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from pipeline.checking.near_duplicates import describe, near_pairs
from pipeline.dataset import Dataset
from pipeline.preparing.equal_images import first_equal
from pipeline.preparing.skipped_files import escape_unprintable

TINY_CLASS = 10  # training images: with fewer, a class is hardly learned
IMBALANCE = 10  # times as many images in the largest class as in the smallest
LISTED = 10  # pairs on the terminal


@dataclass(frozen=True)
class NamedImage:
    """An image of a dataset: its split and row, its path in the source (or its split and row), and its class."""

    split: str
    row: int
    path: str
    label: str


@dataclass(frozen=True)
class Pair:
    """Two images that show the same; `is_equal`: in every pixel."""

    first: NamedImage
    second: NamedImage
    is_equal: bool

    @property
    def is_leak(self) -> bool:
        return self.first.split != self.second.split

    @property
    def has_two_labels(self) -> bool:
        return self.first.label != self.second.label


@dataclass(frozen=True)
class Check:
    """What was found in a dataset. `tiny_classes`: by name, their number of training images. `imbalance`: how many
    times as many training images the largest class has as the smallest."""

    dataset: str
    images: int
    pairs: list[Pair]
    blank: list[NamedImage]
    tiny_classes: dict[str, int]
    imbalance: float

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        pairs = [asdict(pair) | {"is_leak": pair.is_leak, "has_two_labels": pair.has_two_labels} for pair in self.pairs]
        return asdict(self) | {"pairs": pairs}

    def table(self) -> str:
        """For the terminal."""
        equal = [pair for pair in self.pairs if pair.is_equal]
        near = [pair for pair in self.pairs if not pair.is_equal]
        lines = [
            f"{self.dataset}: {self.images:,} images",
            f"{'':22}{'pairs':>7}{'in two splits':>15}{'two labels':>12}",
        ]
        for name, pairs in (("same pixels", equal), ("near duplicates", near)):
            leaks, two_labels = sum(pair.is_leak for pair in pairs), sum(pair.has_two_labels for pair in pairs)
            lines.append(f"{name:22}{len(pairs):7,}{leaks:15,}{two_labels:12,}")
        worst = sorted(self.pairs, key=lambda pair: (not pair.is_leak, not pair.has_two_labels))
        for pair in worst[:LISTED]:
            same = "=" if pair.is_equal else "≈"
            lines.append(f"  {_described(pair.first)} {same} {_described(pair.second)}")
        if len(worst) > LISTED:
            lines.append(f"  … and {len(worst) - LISTED:,} more pairs; --json lists them")
        if self.blank:
            lines.append(f"blank images: {len(self.blank):,}, such as {escape_unprintable(self.blank[0].path)}")
        if self.tiny_classes:
            tiny = ", ".join(f"{escape_unprintable(name)} ({count})" for name, count in self.tiny_classes.items())
            lines.append(f"classes with fewer than {TINY_CLASS} training images: {tiny}")
        if self.imbalance >= IMBALANCE:
            lines.append(
                f"the largest class has {self.imbalance:.0f} times as many training images as the smallest; "
                'data.sampling = "balanced" shows each equally often'
            )
        return "\n".join(lines)


def check(dataset: Dataset) -> Check:
    """Look at all images of a prepared dataset.

    Raises ConvlineError where it is damaged.
    """
    names: list[NamedImage] = []
    arrays = []
    for split_name in dataset.meta["counts"]:
        split = dataset.split(split_name)
        paths = dataset.paths(split) or [f"{split_name} {row}" for row in range(len(split))]
        names += [
            NamedImage(split_name, row, path, dataset.classes[label])
            for row, (path, label) in enumerate(zip(paths, split.labels.tolist(), strict=True))
        ]
        arrays.append(split.images)
    equal = first_equal(*arrays)
    pairs = [(int(first), row, True) for row, first in enumerate(equal) if first != row]
    described = describe(*arrays)
    near = near_pairs(described)
    pairs += [(one, other, False) for one, other in near.tolist() if equal[one] == one and equal[other] == other]
    counts = dataset.meta["counts"]["train"]
    return Check(
        dataset=dataset.name,
        images=len(names),
        pairs=[Pair(names[one], names[other], is_equal) for one, other, is_equal in pairs],
        blank=[names[row] for row in np.flatnonzero(described.is_blank).tolist()],
        tiny_classes={name: count for name, count in counts.items() if count < TINY_CLASS},
        imbalance=max(counts.values()) / max(1, min(counts.values())),
    )


def _described(image: NamedImage) -> str:
    return f"{escape_unprintable(image.path)} ({image.split}, {escape_unprintable(image.label)})"
