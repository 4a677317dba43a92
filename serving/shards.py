"""One part in N of a listing: whole batches, in the listing's order, so that the parts' tables joined are the whole."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

from serving.found import Found


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


def survey(files: Iterator[Found], told: Callable[[int], None] = lambda _: None) -> Survey:
    """Go through a listing once, without reading a file."""
    digest = hashlib.sha256()
    found = 0
    for found, file in enumerate(files, 1):  # counted
        digest.update(os.fsencode(file.path) + b"\0")
        if found % 1000 == 0:
            told(found)
    return Survey(found, digest.hexdigest())
