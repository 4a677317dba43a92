"""Atomic writes of files and folders, what killed processes left of them, SHA-256, and names that file systems accept.

A temporary file or folder has an unpredictable name and is always newly created: in a folder that others can write to,
a symbolic link that waits under a known name would redirect the write to another file.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import math
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from convline import locks
from convline.errors import ConvlineError

MAX_NAME = 255  # bytes, the limit of file systems
MAX_IN_TEMPORARY = 200  # bytes of a name that its temporary name keeps
MAX_STEM = 150  # bytes that `name_on_disk` keeps of a name that is too long
LONGEST_SUFFIX = 16  # characters
LOCK_SECONDS = 2.0  # to wait for the processes of a killed job, which may still hold its lock

# flags of os.open that Windows lacks
O_NOFOLLOW: int = getattr(os, "O_NOFOLLOW", 0)
O_NONBLOCK: int = getattr(os, "O_NONBLOCK", 0)  # opening a FIFO does not wait for its writer
IS_WINDOWS = os.name == "nt"  # an open file cannot be renamed or removed there, nor a folder opened


@contextmanager
def atomic_write(path: Path, mode: str = "wb", **options: Any) -> Iterator[IO[Any]]:
    """Open a temporary file beside `path`; on success it is synced and renamed to `path`, otherwise removed.

    At any moment, and after any crash, `path` has either its old content or the new.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_path(path)
    with open(temporary, mode.replace("w", "x"), **options) as file:
        try:
            _mark_as_in_use(file.fileno())
            yield file
            file.flush()
            os.fsync(file.fileno())
            if IS_WINDOWS:
                file.close()
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                file.close()
            temporary.unlink(missing_ok=True)
            raise
    sync_folder(path.parent)


def temporary_path(path: Path, kind: str = "tmp") -> Path:
    """A new name for a temporary file or folder beside `path`: `.<name>.<token>.<kind>`."""
    return path.with_name(f".{_shortened_name(path)}.{secrets.token_hex(8)}.{kind}")


def _shortened_name(path: Path) -> str:
    """The name, cut so that what `temporary_path` adds still fits into a file system's 255 bytes."""
    return os.fsdecode(os.fsencode(path.name)[:MAX_IN_TEMPORARY])


def _mark_as_in_use(descriptor: int) -> None:
    """Lock a temporary file or folder: it belongs to a running process."""
    with suppress(OSError):  # a file system without locks
        locks.acquire(descriptor, patience=math.inf)


@contextmanager
def new_folder(path: Path, journal: str | None = None) -> Iterator[Path]:
    """A temporary folder beside `path`; on success it is synced and renamed to `path`, otherwise removed.

    A folder that is at `path` already is replaced, and removed. If the process is killed between the two renames,
    `restore_folder` puts the old one back. Symbolic links under the names of temporary folders are not followed.

    While there is a file `journal` in the temporary folder, KeyboardInterrupt and SystemExit leave the folder, and a
    later call enters it again, as it does after a kill. Other processes must not do so at the same time.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    restore_folder(path)
    kept = remove_abandoned_folders(path, journal)
    temporary = kept or temporary_path(path)
    replaced = temporary.with_suffix(".old")
    if kept is None:
        temporary.mkdir()
    with _marked_as_in_use(temporary):
        try:
            yield temporary
            sync_files(temporary)
            with _marked_as_in_use(path):  # so that no other process restores it
                if path.exists():
                    path.rename(replaced)  # whole: a process that still writes to it does not write to the new one
                temporary.rename(path)
                sync_folder(path.parent)
                if replaced.exists():
                    replaced.rename(temporary)  # once it is partly removed, it must not be restored
                    shutil.rmtree(temporary, ignore_errors=True)
        except BaseException as error:
            is_interrupted = isinstance(error, KeyboardInterrupt | SystemExit)
            if not (is_interrupted and journal is not None and (temporary / journal).exists()):
                shutil.rmtree(temporary, ignore_errors=True)
            raise


def remove_abandoned_folders(path: Path, journal: str | None = None) -> Path | None:
    """Remove what killed processes left of `new_folder`. Of those with a file `journal` one is kept, and returned."""
    kept = None
    for abandoned in [*_abandoned_folders(path, "tmp"), *_abandoned_folders(path, "old")]:
        if kept is None and journal is not None and (abandoned / journal).is_file() and _is_ours(abandoned):
            kept = abandoned
        else:
            shutil.rmtree(abandoned, ignore_errors=True)  # another process may be removing it, too
    return kept


def _is_ours(folder: Path) -> bool:
    """Whether this user made the folder: links in that of another user may lead anywhere."""
    return not hasattr(os, "getuid") or folder.stat().st_uid == os.getuid()


def restore_folder(path: Path) -> None:
    """Put back the folder that `new_folder` was replacing at `path` when its process was killed.

    To be called before the folder is opened, or looked for.
    """
    if not path.exists():
        for replaced in _abandoned_folders(path, "old"):
            with suppress(OSError):  # another process was faster, or the file system is read-only
                replaced.rename(path)
                return


def restore_folders(parent: Path) -> None:
    """Call `restore_folder` for every folder of `parent` that may need it."""
    for replaced in parent.glob(".*.*.old"):
        name = replaced.name[1:].rsplit(".", 2)[0]
        if len(os.fsencode(name)) < MAX_IN_TEMPORARY:  # else it may have been cut
            restore_folder(parent / name)


def _abandoned_folders(path: Path, kind: str) -> Iterator[Path]:
    """The temporary folders of `path` that no running process uses."""
    for folder in path.parent.glob(f".{glob.escape(_shortened_name(path))}.*.{kind}"):
        token = folder.name.removeprefix(f".{_shortened_name(path)}.").removesuffix(f".{kind}")
        if re.fullmatch("[0-9a-f]+", token) and folder.is_dir() and _is_abandoned(folder):
            yield folder


@contextmanager
def _marked_as_in_use(folder: Path) -> Iterator[None]:
    """Lock a folder, wherever it is moved, while its process lives; do nothing if it does not exist."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | O_NONBLOCK)
    except OSError:
        yield
        return
    try:
        _mark_as_in_use(descriptor)
        yield
    finally:
        os.close(descriptor)


def _is_abandoned(path: Path) -> bool:
    """Whether no running process, on any machine, uses a temporary file or folder. False for links."""
    if path.is_symlink() or not locks.are_supported():
        return False
    with suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY | O_NOFOLLOW | O_NONBLOCK)
        try:
            return locks.acquire(descriptor)
        finally:
            os.close(descriptor)
    return False


def remove_leftovers(path: Path) -> None:
    """Remove the temporary files of `atomic_write` to `path` whose processes were killed."""
    for temporary in path.parent.glob(f".{glob.escape(_shortened_name(path))}.*.tmp"):
        if _is_abandoned(temporary):
            with suppress(OSError):
                temporary.unlink()


def open_in_place(path: Path, mode: str = "a+b", **options: Any) -> IO[Any]:
    """Open a file under its final name: to append to it ("a"), or to lock it ("w", which keeps its content).

    Raises ConvlineError if `path` is a link or not a regular file, because another file would be written.
    """

    def opener(name: str, flags: int) -> int:
        try:
            if not O_NOFOLLOW and path.is_symlink():
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
            descriptor = os.open(name, (flags | O_NOFOLLOW | O_NONBLOCK) & ~os.O_TRUNC, 0o666)
        except OSError as error:
            if error.errno not in (errno.ELOOP, errno.ENXIO):  # a link, a pipe
                raise
        else:
            status = os.fstat(descriptor)
            if stat.S_ISREG(status.st_mode) and ("w" in mode or status.st_nlink <= 1):
                return descriptor
            os.close(descriptor)
        raise ConvlineError(f"{path} is a link, or not a regular file; remove it")

    return open(path, mode, opener=opener, **options)


def lock_file(file: IO[Any], path: Path, name: Path | str, patience: float = 0.0) -> None:
    """Lock the open file at `path` until it is closed.

    Raises ConvlineError, which calls the file `name`, if another process holds the lock for more than `patience`
    seconds, or has removed the file since it was opened.
    """
    if not locks.acquire(file.fileno(), patience):
        raise ConvlineError(f"another job is writing {name}; wait for it or choose another output")
    if not (path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat())):
        raise ConvlineError(f"another job has just finished {name}; look at its output first")


@contextmanager
def exclusive(path: Path, name: Path | str) -> Iterator[None]:
    """Hold the lock file `path`, which is created, and removed at the end.

    Raises ConvlineError, which calls the output `name`, if another process holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open_in_place(path, "wb") as file:
        with suppress(OSError):  # a file system without locks
            lock_file(file, path, name, LOCK_SECONDS)
        try:
            yield
        finally:
            with suppress(FileNotFoundError):
                remove_open_file(file, path)


def remove_open_file(file: IO[Any], path: Path) -> None:
    """Remove the open file at `path`; its lock is kept until then where the system can remove open files."""
    if IS_WINDOWS:
        file.close()
    path.unlink()


def rename_open_file(file: IO[Any], path: Path, new_path: Path) -> None:
    """Rename the open file at `path`, replacing the file at `new_path`; as `remove_open_file` for its lock."""
    if IS_WINDOWS:
        file.close()
    path.replace(new_path)


def move_to_new_name(source: Path, path: Path) -> None:
    """Give a finished file the name `path`. Raises FileExistsError if that exists."""
    if hasattr(os, "link"):
        os.link(source, path)
        source.unlink()
    else:
        if path.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
        source.rename(path)


def sync_files(folder: Path) -> None:
    """Make the files of a folder durable, before the folder is renamed."""
    for path in folder.iterdir():
        with path.open("r+b") as file:  # Windows syncs no file that is open for reading only
            os.fsync(file.fileno())
    sync_folder(folder)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable: a rename may be lost until its folder is synced."""
    if IS_WINDOWS:
        return
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
    """The name of a file or folder for a class label or a part of a path.

    A valid name stays as it is. An invalid one keeps its valid part, and a hash makes it unique: "T-shirt/top" becomes
    "T-shirt_top~9cc7a4218305".
    """
    # surrogates that stand for no byte cannot be encoded
    valid = "".join("_" if c in "/\0" or "\ud800" <= c < "\udc80" or "\udcff" < c <= "\udfff" else c for c in name)
    if valid == name and name not in ("", ".", "..") and len(os.fsencode(name)) <= MAX_NAME:
        return name
    valid = f"_{valid}" if valid in ("", ".", "..") else valid
    suffix = Path(valid).suffix if len(Path(valid).suffix) <= LONGEST_SUFFIX else ""
    stem = os.fsencode(valid.removesuffix(suffix))[:MAX_STEM].decode("utf-8", "ignore")
    return f"{stem}~{digest(name)[:12]}{suffix}"


def digest(name: str) -> str:
    """The SHA-256 of a name, in hexadecimal."""
    return hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()
