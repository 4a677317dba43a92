"""One file of a listing: its name in results, and how its bytes are had, in whichever process needs them."""

from __future__ import annotations

import os
import stat
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, Protocol

from convline.errors import ImageError
from convline.files import O_NONBLOCK
from convline.images import MAX_BYTES

Stamp = tuple[int, int | str]  # size in bytes, and when it was last written, or its entity tag
Opener = Callable[[str], IO[bytes]]  # opens the file of a name, or behind a URL, in whichever process


class Content(Protocol):
    """Where a file's bytes are."""

    def read(self) -> bytes:
        """The bytes. Raises ImageError where they cannot be had."""

    def stamp(self) -> Stamp | None:
        """What changes when the file does; None where nothing tells."""


@dataclass
class InputFile:
    """One file: `path` as results name it, where its bytes are, and its stamp once `look` was called."""

    path: str
    content: Content
    stamp: Stamp | None = None

    def look(self) -> None:
        """Note the stamp, before the file is read."""
        self.stamp = self.content.stamp()

    def read(self) -> bytes:
        """The file's bytes. Raises ImageError where it cannot be read."""
        return self.content.read()


@dataclass(frozen=True)
class OnDisk:
    """A file of this machine, or `size` bytes of it from `start` on (a member of a .tar)."""

    file: str
    start: int = 0
    size: int | None = None

    def read(self) -> bytes:
        try:
            # a FIFO that nobody writes to would block for ever
            descriptor = os.open(self.file, os.O_RDONLY | O_NONBLOCK)
            with open(descriptor, "rb", buffering=0) as file:
                status = os.fstat(descriptor)
                if not stat.S_ISREG(status.st_mode):
                    raise ImageError("unsupported", "not a regular file")
                check_size(status.st_size if self.size is None else self.size)
                file.seek(self.start)
                return file.readall() if self.size is None else _exactly(file.read(self.size), self.size)
        except OSError as error:
            raise ImageError("unreadable", error.strerror or str(error)) from error
        except ValueError as error:  # a NUL in a listed name
            raise ImageError("unreadable", str(error)) from error

    def stamp(self) -> Stamp | None:
        try:
            status = os.stat(self.file)  # noqa: PTH116  # half the time of Path's, a million times
        except (OSError, ValueError):
            return None
        if self.size is None:
            return status.st_size, status.st_mtime_ns
        return self.size, f"{status.st_size} {status.st_mtime_ns} {self.start}"  # a name may be twice in an archive


@dataclass(frozen=True)
class InMemory:
    """Bytes that were read already."""

    data: bytes

    def read(self) -> bytes:
        return self.data

    def stamp(self) -> Stamp | None:
        return len(self.data), zlib.crc32(self.data)


@dataclass(frozen=True)
class Unusable:
    """What was found and cannot be read, and why."""

    problem: ImageError

    def read(self) -> bytes:
        raise self.problem

    def stamp(self) -> Stamp | None:
        return None


def open_local(name: str) -> IO[bytes]:
    """A file of this machine."""
    return open(name, "rb")


def check_size(size: int) -> None:
    """Raises ImageError for a file that is too large to be read at all."""
    if size > MAX_BYTES:
        raise ImageError("too-large", f"{size} bytes; the limit is {MAX_BYTES}")


def unreadable(path: str, detail: str) -> InputFile:
    return InputFile(path, Unusable(ImageError("unreadable", detail)))


def _exactly(data: bytes, size: int) -> bytes:
    if len(data) < size:
        raise ImageError("truncated", "the archive ends inside it")
    return data
