"""Files that are whole or absent: the one way this project writes, hashes and finishes them."""

from __future__ import annotations

import fcntl
import glob
import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from serving.errors import ConvlineError


@contextmanager
def atomic_write(path: Path, mode: str = "wb", **options: Any) -> Iterator[IO[Any]]:
    """Open a file beside `path`; on success it is synced and renamed over `path`, else removed.

    Whoever looks at `path`, at any moment and after any crash, sees the old content or the new.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(beside, mode, **options) as file:
            with suppress(OSError):  # a file system without locks
                fcntl.flock(file, fcntl.LOCK_EX)
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def hold(file: IO[Any], path: Path, name: Path | str, patience: float = 0.0) -> None:
    """Lock the open file at `path` for as long as it is open.

    Raises ConvlineError, calling it `name`, where another process holds it for more than `patience` seconds, or has
    removed it since it was opened.
    """
    deadline = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError as error:
            if time.monotonic() >= deadline:
                raise ConvlineError(f"another job is writing {name}; wait for it or choose another output") from error
            time.sleep(0.05)
    if not (path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat())):
        raise ConvlineError(f"another job has just finished {name}; look at its output first")


def remove_leftovers(path: Path) -> None:
    """Remove what `atomic_write` to `path` left where its process was killed."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        with suppress(OSError), left.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # its writer holds it, on whatever machine
            left.unlink()


def sync_files(folder: Path) -> None:
    """Make the files in `folder` durable, before it is renamed to where it will be found."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    sync_folder(folder)


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable (a rename is not, until its folder is synced)."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
