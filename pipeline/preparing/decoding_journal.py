"""The journal of a decoding that may be interrupted: which rows of `decoded.npy`, beside it, hold decoded images.

The first line says what is decoded, and how; each further line is the result of a batch. A batch is written when its
pixels are durable, so what the journal says is true after a crash of the machine, too. When the images are about to be
moved within `decoded.npy`, `stop_resuming` removes the journal: a process that is killed after that decodes again,
which is always right; moving takes a small part of the time that decoding takes.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from convline import locks
from convline.console import log
from convline.errors import ImageError
from convline.files import open_in_place, sync_folder
from convline.process_pool import can_fork
from pipeline.preparing.decoded_source import create_array
from pipeline.preparing.parallel_decoding import DecodingResult

DECODED, JOURNAL = "decoded.npy", "decoding.jsonl"
SECONDS_BETWEEN_SAVES = 1.0
SHARE_OF_TIME = 0.1  # that making pixels durable may take

Inputs = Mapping[str, Any]  # JSON values by the name that messages call them


class DecodingJournal:
    """`images`: the array on disk, uint8 [n, height, width, channels]; `done`: the results of the rows that it holds
    already."""

    def __init__(self, images: NDArray[np.uint8], journal: IO[bytes], done: DecodingResult) -> None:
        self.images = images
        self.done = done
        self._journal = journal
        self._unsaved = DecodingResult()
        self._next_save = time.monotonic() + SECONDS_BETWEEN_SAVES

    def add(self, result: DecodingResult) -> None:
        """Record the rows of a batch, whose pixels are in `images`; once a second all new ones become durable."""
        self._unsaved.add(result)
        if time.monotonic() >= self._next_save:
            self.save()

    def save(self) -> None:
        started = time.monotonic()
        if self._unsaved.digests:
            if isinstance(self.images, np.memmap):
                self.images.flush()  # what other processes wrote, too
            self._journal.write(_line(_to_fields(self._unsaved)))
            os.fsync(self._journal.fileno())
            self._unsaved = DecodingResult()
        ended = time.monotonic()
        self._next_save = ended + max(SECONDS_BETWEEN_SAVES, (ended - started) / SHARE_OF_TIME)


@contextmanager
def decoding_journal(folder: Path, shape: tuple[int, ...], inputs: Inputs) -> Iterator[DecodingJournal]:
    """The journal in `folder`, and the images of `shape`. It goes on where an interrupted process has left it, if that
    had the same `inputs`; otherwise what is there is thrown away, and a line is logged.

    Raises OSError if the disk is too full.
    """
    done = _read(folder, inputs) if (folder / DECODED).exists() else None
    if done is None:
        (folder / DECODED).unlink(missing_ok=True)
        create_array(folder / DECODED, shape)
        _begin(folder, inputs)
    with _mapped(folder / DECODED) as images, open_in_place(folder / JOURNAL, "ab", buffering=0) as file:
        assert images.shape == shape
        journal = DecodingJournal(images, file, done or DecodingResult())
        try:
            yield journal
        except (KeyboardInterrupt, SystemExit):
            journal.save()
            raise
        journal.save()


def stop_resuming(folder: Path) -> None:
    """Remove the journal, durably, before the decoded images are changed."""
    (folder / JOURNAL).unlink(missing_ok=True)
    sync_folder(folder)


def _begin(folder: Path, inputs: Inputs) -> None:
    """Write the first line, when the array is durable."""
    with (folder / DECODED).open("r+b") as array:
        os.fsync(array.fileno())
    with open_in_place(folder / JOURNAL, "ab", buffering=0) as file:
        file.truncate(0)
        file.write(_line(inputs))
        os.fsync(file.fileno())
    sync_folder(folder)


@contextmanager
def _mapped(path: Path) -> Iterator[NDArray[np.uint8]]:
    """Map the array, and lock its file meanwhile.

    The processes that decode share the map, and with it the lock: those of a killed job finish their batch, and would
    write over images that have been moved since. So the next job waits for them here.
    """
    with path.open("r+b") as file:
        if can_fork():
            with suppress(OSError):  # a file system without locks
                locks.acquire(file.fileno(), math.inf)
        np.lib.format.read_magic(file)
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        try:
            yield np.memmap(file, dtype, "r+", file.tell(), shape)
        finally:
            if can_fork():
                with suppress(OSError):
                    locks.release(file.fileno())  # the map lives on, and would keep it


def _read(folder: Path, inputs: Inputs) -> DecodingResult | None:
    """What the journal holds, without a line that was not written whole; None if it is missing, or of other inputs."""
    try:
        file = open_in_place(folder / JOURNAL, "r+b")
    except FileNotFoundError:
        return None
    done = DecodingResult()
    with file:
        first = _parsed(file.readline())
        if first is None:  # killed before anything was decoded
            return None
        if changed := [name for name, value in inputs.items() if first.get(name) != value]:
            log(f"{changed[0]} changed since decoding was interrupted: what was decoded is thrown away")
            return None
        whole = file.tell()
        while (fields := _parsed(file.readline())) is not None:
            done.add(_from_fields(fields))
            whole = file.tell()
        file.truncate(whole)
    log(f"going on: {len(done.digests)} images were decoded before the interruption")
    return done


def _line(fields: Mapping[str, Any]) -> bytes:
    return json.dumps(fields, separators=(",", ":")).encode() + b"\n"


def _parsed(line: bytes) -> Any:
    """The fields of a line; None if it was not written whole."""
    try:
        return json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None


def _to_fields(result: DecodingResult) -> dict[str, Any]:
    return {
        "digests": {row: digest.hex() for row, digest in result.digests.items()},
        "sizes": result.sizes,
        "rejects": {row: [problem.reason, problem.detail] for row, problem in result.rejects.items()},
        "is_all_grey": result.is_all_grey,
    }


def _from_fields(fields: dict[str, Any]) -> DecodingResult:
    """JSON has made strings of the rows."""
    return DecodingResult(
        rejects={int(row): ImageError(*problem) for row, problem in fields["rejects"].items()},
        is_all_grey=fields["is_all_grey"],
        digests={int(row): bytes.fromhex(digest) for row, digest in fields["digests"].items()},
        sizes={int(row): (size[0], size[1]) for row, size in fields["sizes"].items()},
    )
