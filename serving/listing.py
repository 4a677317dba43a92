"""Finding files: folders, single files and archives become one stream in one fixed order.

Folders depth first, each folder's names sorted by their bytes; archives in member order; hidden files
skipped. Every other file is found, whatever it holds. Only one folder's names are held at a time.
"""

from __future__ import annotations

import os
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from serving.errors import ConvlineError, ImageError
from serving.images import MAX_BYTES

TAR_ENDINGS = (".tar", ".tar.gz", ".tgz")
ARCHIVE_ENDINGS = (*TAR_ENDINGS, ".zip")


@dataclass(frozen=True)
class Found:
    """One file: `path` as results name it, and where its bytes are (exactly one of the other three)."""

    path: str
    file: Path | None = None
    data: bytes | None = None
    problem: ImageError | None = None

    def read(self) -> bytes:
        """The file's bytes. Raises ImageError where it cannot be read."""
        if self.problem is not None:
            raise self.problem
        if self.data is not None:
            return self.data
        assert self.file is not None
        try:
            status = self.file.stat()
            if not stat.S_ISREG(status.st_mode):
                raise ImageError("unsupported", "not a regular file")
            if status.st_size > MAX_BYTES:
                raise ImageError("too-large", f"{status.st_size} bytes; the limit is {MAX_BYTES}")
            return self.file.read_bytes()
        except OSError as error:
            raise ImageError("unreadable", error.strerror or str(error)) from error


def find(inputs: Sequence[str]) -> Iterator[Found]:
    """Every file of the inputs. Paths are relative to the input; several inputs prefix theirs, as given.

    Raises ConvlineError, before the first file, for an input that does not exist.
    """
    for name in inputs:
        if not os.path.lexists(name):
            raise ConvlineError(f"no such file or folder: {name}")
    return _find(inputs)


def _find(inputs: Sequence[str]) -> Iterator[Found]:
    for name in inputs:
        path = Path(name)
        prefix = name.rstrip("/") + "/" if len(inputs) > 1 else ""
        if path.is_dir():
            yield from walk(path, prefix)
        elif is_archive(path):
            yield from read_archive(path, prefix)
        else:
            yield Found(name if len(inputs) > 1 else path.name, file=path)


def walk(folder: Path, prefix: str = "", above: tuple[tuple[int, int], ...] = ()) -> Iterator[Found]:
    """The files below `folder`; links are followed, a folder inside itself is reported, not entered."""
    try:
        status = folder.stat()
        with os.scandir(folder) as entries:
            names = sorted((os.fsencode(e.name), _is_folder(e)) for e in entries if not e.name.startswith("."))
    except OSError as error:
        yield Found(prefix.rstrip("/") or ".", problem=ImageError("unreadable", error.strerror or str(error)))
        return
    here = (status.st_dev, status.st_ino)
    if here in above:
        yield Found(prefix.rstrip("/"), problem=ImageError("unreadable", "a link to a folder that contains it"))
        return
    for encoded, is_folder in names:
        name = os.fsdecode(encoded)
        if is_folder:
            yield from walk(folder / name, f"{prefix}{name}/", (*above, here))
        else:
            yield Found(prefix + name, file=folder / name)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def folders(source: Path) -> set[str]:
    """The folders below a folder, or in an archive, hidden ones left out."""
    if source.is_dir():
        below = (Path(top, name) for top, names, _ in os.walk(source) for name in names)
        names = (path.relative_to(source) for path in below)
        return {name.as_posix() for name in names if not any(part.startswith(".") for part in name.parts)}
    if source.name.lower().endswith(TAR_ENDINGS):
        with _reading(source), tarfile.open(source, "r:*") as tar:
            return {_clean(m.name) for m in tar if m.isdir() and not _is_hidden(source, m.name)}
    if is_archive(source):
        with _reading(source), zipfile.ZipFile(source) as archive:
            return {_clean(m.filename) for m in archive.infolist() if m.is_dir() and not _is_hidden(source, m.filename)}
    return set()


def is_archive(path: Path) -> bool:
    return path.name.lower().endswith(ARCHIVE_ENDINGS)


def read_archive(path: Path, prefix: str = "") -> Iterator[Found]:
    """The files of a .tar, .tar.gz, .tgz or .zip, read in place: nothing is extracted.

    Raises ConvlineError for a damaged archive and for a member whose name leaves the archive.
    """
    members = _tar_members if path.name.lower().endswith(TAR_ENDINGS) else _zip_members
    with _reading(path):
        yield from members(path, prefix)


@contextmanager
def _reading(archive: Path) -> Iterator[None]:
    try:
        yield
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, OSError) as error:
        raise ConvlineError(f"cannot read the archive {archive}: {error}; fetch it again") from error


def _tar_members(path: Path, prefix: str) -> Iterator[Found]:
    with tarfile.open(path, "r:*") as archive:
        for member in archive:
            if member.isdir() or _is_hidden(path, member.name):
                continue

            def content(member: tarfile.TarInfo = member) -> bytes:
                file = archive.extractfile(member) if member.isfile() else None
                if file is None:
                    raise ImageError("unsupported", "a link or special file inside an archive")
                return file.read()

            yield _member(prefix + _clean(member.name), member.size, content)
            archive.members.clear()  # type: ignore[attr-defined]  # else memory grows with every member
        # tarfile takes a damaged header for the end, which is marked by a block of zeros
        assert archive.fileobj is not None
        archive.fileobj.seek(archive.offset)
        if archive.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError("it breaks off before its end mark")


def _zip_members(path: Path, prefix: str) -> Iterator[Found]:
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            if member.is_dir() or _is_hidden(path, member.filename):
                continue

            def content(member: zipfile.ZipInfo = member) -> bytes:
                try:
                    return archive.read(member)
                # RuntimeError: encrypted; NotImplementedError: compressed in an exotic way
                except (RuntimeError, NotImplementedError, zipfile.BadZipFile, zlib.error, EOFError) as error:
                    raise ImageError("unreadable", str(error)) from error

            yield _member(prefix + _clean(member.filename), member.file_size, content)


def _member(path: str, size: int, content: Callable[[], bytes]) -> Found:
    if size > MAX_BYTES:
        return Found(path, problem=ImageError("too-large", f"{size} bytes; the limit is {MAX_BYTES}"))
    try:
        return Found(path, data=content())
    except ImageError as problem:
        return Found(path, problem=problem)


def _clean(name: str) -> str:
    return str(PurePosixPath(name))


def _is_hidden(archive: Path, name: str) -> bool:
    parts = PurePosixPath(name.replace("\\", "/")).parts
    if name.startswith("/") or ".." in parts or name[1:3] in (":\\", ":/"):
        raise ConvlineError(f"{archive} holds a member that leaves the archive, {name!r}; refused: do not trust it")
    return any(part.startswith(".") for part in parts)
