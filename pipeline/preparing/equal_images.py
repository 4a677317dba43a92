"""Finds images with the same pixels: leaks (in two splits), images under two labels, copies that stay together."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convline.console import log
from convline.errors import ConvlineError
from pipeline.preparing.mapped_arrays import chunks
from pipeline.preparing.skipped_files import escape_unprintable

NAMED = 3  # pairs in a message
RECORDED = 100  # pairs in meta.json

Rows = NDArray[np.int64]


def first_equal(*arrays: NDArray[np.uint8]) -> Rows:
    """For each image of some arrays, counted through all of them, the first one with the same pixels: int64 [n]. Pixels
    are compared by a hash of 128 bits (BLAKE2b)."""
    digests = np.empty((sum(map(len, arrays)), 2), np.uint64)
    row = 0
    for images in arrays:
        for chunk in chunks(images):
            for image in images[chunk]:
                digest = hashlib.blake2b(np.ascontiguousarray(image).data, digest_size=16).digest()
                digests[row] = np.frombuffer(digest, np.uint64)
                row += 1
    _, first, group = np.unique(digests, axis=0, return_index=True, return_inverse=True)
    return first[group.reshape(-1)].astype(np.int64)


@dataclass(frozen=True)
class EqualImages:
    """The paths of pairs of images with the same pixels: an image, and the first one that equals it.

    `leaks`: pairs in two splits. `two_labels`: pairs of two classes. `copies`: how many pairs there are in all.
    """

    leaks: list[tuple[str, str]]
    two_labels: list[tuple[str, str]]
    copies: int

    def to_dict(self) -> dict[str, Any]:
        """The field `equal_images` of meta.json: numbers, and the first pairs."""
        pairs = {"leaks": self.leaks, "two_labels": self.two_labels}
        return {
            "copies": self.copies,
            **{kind: {"count": len(found), "pairs": found[:RECORDED]} for kind, found in pairs.items()},
        }

    def check(self, allow_leaks: bool) -> None:
        """Log images under two labels, and leaks where they are allowed. Raises ConvlineError where they are not."""
        if self.two_labels:
            log(f"{_described(self.two_labels, 'under two labels')}; correct or remove one of each")
        if self.leaks and not allow_leaks:
            raise ConvlineError(
                f"{_described(self.leaks, 'in two splits')}; a network that has seen an image in training proves "
                "nothing on it in test: remove one of each, or give --allow-leaks"
            )
        if self.leaks:
            log(f"{_described(self.leaks, 'in two splits')}: the figures on test will be too good")


def compare_splits(
    first: Rows, labels: NDArray[np.int64], rows: Mapping[str, Rows], names: Sequence[str]
) -> EqualImages:
    """What `first_equal` found among the `rows` of the splits; `labels` int64 and `names` are of all images."""
    split_of = np.full(len(first), -1)
    for number, split_rows in enumerate(rows.values()):
        split_of[split_rows] = number
    used = np.flatnonzero(split_of >= 0)
    _, first_used, group = np.unique(first[used], return_index=True, return_inverse=True)
    leaders = used[first_used][group]  # of each used image, the first used one with the same pixels
    copies = used != leaders
    pairs = list(zip(leaders[copies].tolist(), used[copies].tolist(), strict=True))
    return EqualImages(
        leaks=[(names[one], names[other]) for one, other in pairs if split_of[one] != split_of[other]],
        two_labels=[(names[one], names[other]) for one, other in pairs if labels[one] != labels[other]],
        copies=len(pairs),
    )


def _described(pairs: list[tuple[str, str]], where: str) -> str:
    named = "; ".join(" and ".join(map(escape_unprintable, pair)) for pair in pairs[:NAMED])
    such_as = "such as " if len(pairs) > NAMED else ""
    images = "1 image is" if len(pairs) == 1 else f"{len(pairs)} images are"
    return f"{images} {where}, with the same pixels: {such_as}{named}"
