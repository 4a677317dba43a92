"""One part in N of a listing: whole batches, in the listing's order, so that the parts' tables joined are the whole."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from convline.errors import ConvlineError
from convline.inputs.input_file import InputFile


@dataclass(frozen=True)
class Survey:
    """How many files a listing has, and a hash of their names."""

    found: int
    sha256: str

    def part(self, files: Iterator[InputFile], index: int, parts: int, batch_size: int) -> Iterator[InputFile]:
        """The files of part `index`, from 1, of `parts`."""
        batches = -(-self.found // batch_size)
        start, stop = ((number * batches // parts) * batch_size for number in (index - 1, index))
        return islice(files, start, stop)

    def checked_part(self, files: Iterator[InputFile], index: int, parts: int, batch_size: int) -> Iterator[InputFile]:
        """As `part`. Raises ConvlineError at its end where the listing is not what was surveyed."""
        names = Names()
        yield from self.part(_noted(files, names), index, parts, batch_size)
        for _ in _noted(files, names):
            pass
        self.check(names)

    def check(self, names: Names) -> None:
        """Raises ConvlineError where the names gone through are not those that were surveyed."""
        if names.survey() != self:
            raise ConvlineError(
                "the input changed while it was gone through; start from the beginning with --overwrite"
            )


class Names:
    """The names of a listing, as they come: their number and their hash."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()
        self._found = 0

    def add(self, path: str) -> None:
        self._digest.update(os.fsencode(path) + b"\0")
        self._found += 1

    def survey(self) -> Survey:
        return Survey(self._found, self._digest.hexdigest())


def _noted(files: Iterator[InputFile], names: Names) -> Iterator[InputFile]:
    for file in files:
        names.add(file.path)
        yield file


def survey(files: Iterator[InputFile]) -> Survey:
    """Go through a listing once, without reading a file."""
    names = Names()
    for file in files:
        names.add(file.path)
    return names.survey()
