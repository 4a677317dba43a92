"""`InputFile`, one file to classify or prepare: its path in results, where its bytes are, and its version.

Files on disk (`OnDisk`), in memory (`InMemory`) and rejected ones (`Rejected`) are here; members of archives and remote
files are in the modules that read them. An `InputFile` can be pickled and read in another process.
"""

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

FileVersion = tuple[int, int | str]  # size in bytes; modification time, checksum or entity tag (ETag)
Opener = Callable[[str], IO[bytes]]  # opens the file at a path or URL; can be pickled


class FileLocation(Protocol):
    """Where the bytes of a file are, and how to read them."""

    def read(self) -> bytes:
        """The bytes. Raises ImageError if they cannot be read."""

    def version(self) -> FileVersion | None:
        """A value that changes whenever the file does; None if there is no such value."""


@dataclass
class InputFile:
    """`path` is the file's name in results; `version` is None until `record_version` was called."""

    path: str
    location: FileLocation
    version: FileVersion | None = None

    def record_version(self) -> None:
        """Call this before reading the file, so that a later change of the file can be detected."""
        self.version = self.location.version()

    def read(self) -> bytes:
        """The file's bytes. Raises ImageError if it cannot be read."""
        return self.location.read()


@dataclass(frozen=True)
class OnDisk:
    """A local file, or `size` bytes of it from offset `start` (a member of an uncompressed .tar)."""

    file: str
    start: int = 0
    size: int | None = None

    def read(self) -> bytes:
        try:
            # O_NONBLOCK: opening a FIFO without a writer would block forever
            descriptor = os.open(self.file, os.O_RDONLY | O_NONBLOCK)
            with open(descriptor, "rb", buffering=0) as file:
                status = os.fstat(descriptor)
                if not stat.S_ISREG(status.st_mode):
                    raise ImageError("unsupported", "not a regular file")
                check_size(status.st_size if self.size is None else self.size)
                file.seek(self.start)
                return file.readall() if self.size is None else _require_size(file.read(self.size), self.size)
        except OSError as error:
            raise ImageError("unreadable", error.strerror or str(error)) from error
        except ValueError as error:  # a listed path contains a NUL
            raise ImageError("unreadable", str(error)) from error

    def version(self) -> FileVersion | None:
        try:
            status = os.stat(self.file)  # noqa: PTH116  # takes half the time of Path.stat, for millions of files
        except (OSError, ValueError):
            return None
        if self.size is None:
            return status.st_size, status.st_mtime_ns
        # with `start`, as an archive may hold two members of one name
        return self.size, f"{status.st_size} {status.st_mtime_ns} {self.start}"


@dataclass(frozen=True)
class InMemory:
    """Bytes that have been read already."""

    data: bytes

    def read(self) -> bytes:
        return self.data

    def version(self) -> FileVersion | None:
        return len(self.data), zlib.crc32(self.data)


@dataclass(frozen=True)
class Rejected:
    """A file that was found but cannot be used; reading it raises `error`."""

    error: ImageError

    def read(self) -> bytes:
        raise self.error

    def version(self) -> FileVersion | None:
        return None


def open_local(name: str) -> IO[bytes]:
    """The `Opener` of local files."""
    return open(name, "rb")


def check_size(size: int) -> None:
    """Raises ImageError ("too-large") for a file of more than MAX_BYTES."""
    if size > MAX_BYTES:
        raise ImageError("too-large", f"{size} bytes; the limit is {MAX_BYTES}")


def unreadable_file(path: str, detail: str) -> InputFile:
    return InputFile(path, Rejected(ImageError("unreadable", detail)))


def _require_size(data: bytes, size: int) -> bytes:
    if len(data) < size:
        raise ImageError("truncated", "the archive ends inside it")
    return data
