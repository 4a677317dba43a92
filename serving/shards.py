"""`--shard I/N`: split the files of a job into N shards for several machines.

A shard has whole batches of the listing, in its order, so that the tables of all shards joined are the table of the
whole job.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from convline.errors import ConvlineError
from convline.inputs.input_file import InputFile


@dataclass(frozen=True)
class ListingFingerprint:
    """The number of files in a listing and a hash of their names."""

    count: int
    sha256: str

    def shard(self, files: Iterator[InputFile], index: int, shards: int, batch_size: int) -> Iterator[InputFile]:
        """The files of shard `index`, from 1, of `shards`."""
        batches = -(-self.count // batch_size)
        start, stop = ((number * batches // shards) * batch_size for number in (index - 1, index))
        return islice(files, start, stop)

    def checked_shard(
        self, files: Iterator[InputFile], index: int, shards: int, batch_size: int
    ) -> Iterator[InputFile]:
        """As `shard`, but reads the listing to its end. Raises ConvlineError there if this is another listing."""
        names = NameHasher()
        yield from self.shard(_hash_names(files, names), index, shards, batch_size)
        for _ in _hash_names(files, names):
            pass
        self.check(names)

    def check(self, names: NameHasher) -> None:
        """Raises ConvlineError if `names` come from another listing."""
        if names.fingerprint() != self:
            raise ConvlineError("the input changed while it was read; start from the beginning with --overwrite")


class NameHasher:
    """Counts and hashes the names of a listing one by one."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()
        self._count = 0

    def add(self, path: str) -> None:
        self._digest.update(os.fsencode(path) + b"\0")
        self._count += 1

    def fingerprint(self) -> ListingFingerprint:
        return ListingFingerprint(self._count, self._digest.hexdigest())


def _hash_names(files: Iterator[InputFile], names: NameHasher) -> Iterator[InputFile]:
    """Yield the files, and add their names to `names`."""
    for file in files:
        names.add(file.path)
        yield file


def fingerprint_listing(files: Iterator[InputFile]) -> ListingFingerprint:
    """Read a listing once, without reading the files."""
    names = NameHasher()
    for file in files:
        names.add(file.path)
    return names.fingerprint()
