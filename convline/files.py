"""Files that are whole or absent: the one way this project writes, hashes and finishes them.

What is temporary has a name that nobody can foresee, and is made, never opened: in a folder where others may write, a
link that waits under its name would have some other file written.
"""

from __future__ import annotations

import errno
import fcntl
import glob
import hashlib
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from convline.errors import ConvlineError

NAME = 255  # bytes of a name that file systems take
LONGEST = 200  # of a name that a temporary one keeps
SHORTENED = 150  # of a name that is too long
LONGEST_SUFFIX = 16  # characters


@contextmanager
def atomic_write(path: Path, mode: str = "wb", **options: Any) -> Iterator[IO[Any]]:
    """Open a file beside `path`; on success it is synced and renamed over `path`, else removed.

    Whoever looks at `path`, at any moment and after any crash, sees the old content or the new.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = beside_of(path)
    with open(beside, mode.replace("w", "x"), **options) as file:
        try:
            _lock(file.fileno())
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(beside, path)
        except BaseException:
            beside.unlink(missing_ok=True)
            raise
    sync_folder(path.parent)


def beside_of(path: Path, kind: str = "tmp") -> Path:
    """A new name beside `path` for what is to take its place: `.<name>.<token>.<kind>`."""
    return path.with_name(f".{_kept(path)}.{secrets.token_hex(8)}.{kind}")


def _kept(path: Path) -> str:
    """As much of a name as leaves room, in a file system's 255 bytes, for what `beside_of` adds."""
    return os.fsdecode(os.fsencode(path.name)[:LONGEST])


def _lock(descriptor: int) -> None:
    """Show that a temporary file or folder belongs to a living process."""
    with suppress(OSError):  # a file system without locks
        fcntl.flock(descriptor, fcntl.LOCK_EX)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path`, which on success is synced and takes its place at once, else is removed.

    What was at `path` is removed, and put back where a process was killed in between. Neither folder is entered by a
    link that stands under its name.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_left_folders(path)
    folder = beside_of(path)
    replaced = folder.with_suffix(".old")
    folder.mkdir()
    with _locked(folder):
        try:
            yield folder
            sync_files(folder)
            with _locked(path):  # nobody else puts it back
                if path.exists():
                    path.rename(replaced)  # at once: whoever still writes into it does not meet the new one
                folder.rename(path)
                sync_folder(path.parent)
                shutil.rmtree(replaced, ignore_errors=True)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Held as long as its process lives, wherever the folder is moved; nothing where there is none."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        yield
        return
    try:
        _lock(descriptor)
        yield
    finally:
        os.close(descriptor)


def _remove_left_folders(path: Path) -> None:
    """Remove what `new_folder` left where its process was killed, or put back what it was about to replace."""
    for left in path.parent.glob(f".{glob.escape(_kept(path))}.*.*"):
        token, _, kind = left.name.removeprefix(f".{_kept(path)}.").partition(".")
        if not re.fullmatch("[0-9a-f]+", token) or kind not in ("tmp", "old") or not _is_left(left, os.O_DIRECTORY):
            continue
        if kind == "old" and not path.exists():
            left.rename(path)
        else:
            shutil.rmtree(left, ignore_errors=True)  # another process may do so too


def _is_left(path: Path, kind: int = 0) -> bool:
    """Whether nobody holds a temporary file, or a folder, any more; never of a link."""
    with suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | kind)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # its writer holds it, on whatever machine
            return True
        finally:
            os.close(descriptor)
    return False


def open_in_place(path: Path, mode: str = "a+b", **options: Any) -> IO[Any]:
    """Open a file under its own name, to append to it ("a"), or as a lock ("w", which leaves it as it is).

    Raises ConvlineError where a link, or anything else than a file, stands there: another file would be written.
    """

    def opener(name: str, flags: int) -> int:
        try:
            descriptor = os.open(name, (flags | os.O_NOFOLLOW | os.O_NONBLOCK) & ~os.O_TRUNC, 0o666)
        except OSError as error:
            if error.errno not in (errno.ELOOP, errno.ENXIO):  # a link, a pipe
                raise
        else:
            status = os.fstat(descriptor)
            if stat.S_ISREG(status.st_mode) and ("w" in mode or status.st_nlink <= 1):
                return descriptor
            os.close(descriptor)
        raise ConvlineError(f"{path} is a link, or no file, and would lead elsewhere; remove it")

    return open(path, mode, opener=opener, **options)


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
    for left in path.parent.glob(f".{glob.escape(_kept(path))}.*.tmp"):
        if _is_left(left):
            with suppress(OSError):
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


def name_on_disk(name: str) -> str:
    """A label, or a part of a path, as the name of one file or folder.

    That is the name itself where it can be one. Else it keeps what it can of it, and a hash tells it from all others:
    "T-shirt/top" becomes "T-shirt_top~9cc7a4218305".
    """
    # surrogates that stand for no byte cannot be encoded
    kept = "".join("_" if c in "/\0" or "\ud800" <= c < "\udc80" or "\udcff" < c <= "\udfff" else c for c in name)
    if kept == name and name not in ("", ".", "..") and len(os.fsencode(name)) <= NAME:
        return name
    kept = f"_{kept}" if kept in ("", ".", "..") else kept
    suffix = Path(kept).suffix if len(Path(kept).suffix) <= LONGEST_SUFFIX else ""
    stem = os.fsencode(kept.removesuffix(suffix))[:SHORTENED].decode("utf-8", "ignore")
    return f"{stem}~{digest(name)[:12]}{suffix}"


def digest(name: str) -> str:
    """The SHA-256 of a name, in hexadecimal."""
    return hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()
