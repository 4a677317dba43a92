"""One part in N of a listing: whole batches, in the listing's order, so that the parts' tables joined are the whole."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from serving.errors import ConvlineError
from serving.found import Found

if TYPE_CHECKING:
    from hashlib import _Hash as Hash


@dataclass(frozen=True)
class Survey:
    """How many files a listing has, and a hash of their names."""

    found: int
    sha256: str

    def part(self, files: Iterator[Found], index: int, parts: int, batch_size: int) -> Iterator[Found]:
        """The files of part `index`, from 1, of `parts`."""
        batches = -(-self.found // batch_size)
        start, stop = ((number * batches // parts) * batch_size for number in (index - 1, index))
        return islice(files, start, stop)

    def checked_part(self, files: Iterator[Found], index: int, parts: int, batch_size: int) -> Iterator[Found]:
        """As `part`. Raises ConvlineError at its end where the listing is not what was surveyed."""
        digest = hashlib.sha256()
        yield from self.part(_hashed(files, digest), index, parts, batch_size)
        for _ in _hashed(files, digest):
            pass
        if digest.hexdigest() != self.sha256:
            raise ConvlineError(
                "the input changed while it was gone through; start from the beginning with --overwrite"
            )


def _hashed(files: Iterator[Found], digest: Hash) -> Iterator[Found]:
    for file in files:
        digest.update(os.fsencode(file.path) + b"\0")
        yield file


def survey(files: Iterator[Found]) -> Survey:
    """Go through a listing once, without reading a file."""
    digest = hashlib.sha256()
    return Survey(sum(1 for _ in _hashed(files, digest)), digest.hexdigest())
