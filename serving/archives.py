"""Archives read in place: nothing is extracted, members come in their order."""

from __future__ import annotations

import io
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import IO

from serving.errors import ConvlineError, ImageError
from serving.found import Content, Found, InMemory, OnDisk, Stamp, Unusable, check_size

TAR_ENDINGS = (".tar", ".tar.gz", ".tgz")
ARCHIVE_ENDINGS = (*TAR_ENDINGS, ".zip")


def is_archive(name: Path | str) -> bool:
    return str(name).lower().endswith(ARCHIVE_ENDINGS)


def read_archive(path: Path, prefix: str = "") -> Iterator[Found]:
    """The files of a .tar, .tar.gz, .tgz or .zip, hidden ones left out.

    Raises ConvlineError for a damaged archive and for a member whose name leaves the archive.
    """
    with reading(path), path.open("rb") as file:
        yield from read_members(file, str(path), prefix)


def read_members(file: IO[bytes], name: str, prefix: str) -> Iterator[Found]:
    """As `read_archive`, of an open file that can be sought in."""
    members = _tar_members if name.lower().endswith(TAR_ENDINGS) else _zip_members
    yield from members(file, name, prefix)


def folders_within(path: Path) -> set[str]:
    """The folders in an archive, hidden ones left out."""
    name = str(path)
    if name.lower().endswith(TAR_ENDINGS):
        with reading(path), tarfile.open(path, "r:*") as tar:
            return {_clean(m.name) for m in tar if m.isdir() and not _is_hidden(name, m.name)}
    with reading(path), zipfile.ZipFile(path) as archive:
        return {_clean(m.filename) for m in archive.infolist() if m.is_dir() and not _is_hidden(name, m.filename)}


@contextmanager
def reading(archive: Path | str) -> Iterator[None]:
    """Whatever a damaged archive makes its reader raise becomes one sentence."""
    try:
        yield
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError) as error:
        raise ConvlineError(f"cannot read the archive {archive}: {error}; fetch it again") from error


def _tar_members(file: IO[bytes], name: str, prefix: str) -> Iterator[Found]:
    with tarfile.open(fileobj=file, mode="r:*") as archive:
        assert archive.fileobj is not None
        is_plain_file = archive.fileobj is file and isinstance(file, io.BufferedReader)
        for member in archive:
            if member.isdir() or _is_hidden(name, member.name):
                continue

            def content(member: tarfile.TarInfo = member) -> Content:
                if is_plain_file and member.isreg() and not member.issparse():
                    return OnDisk(str(file.name), member.offset_data, member.size)
                extracted = archive.extractfile(member) if member.isfile() else None
                if extracted is None:
                    raise ImageError("unsupported", "a link or special file inside an archive")
                return InMemory(extracted.read())

            yield _member(prefix + _clean(member.name), member.size, content)
            archive.members.clear()  # type: ignore[attr-defined]  # else memory grows with every member
        # tarfile takes a damaged header for the end, which is marked by a block of zeros
        archive.fileobj.seek(archive.offset)
        if archive.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError("it breaks off before its end mark")


def _zip_members(file: IO[bytes], name: str, prefix: str) -> Iterator[Found]:
    with zipfile.ZipFile(file) as archive:
        for member in archive.infolist():
            if member.is_dir() or _is_hidden(name, member.filename):
                continue

            def content(member: zipfile.ZipInfo = member) -> Content:
                if isinstance(file, io.BufferedReader):
                    return InZip(str(file.name), member)
                return InMemory(_read_zipped(archive, member))

            yield _member(prefix + _clean(member.filename), member.file_size, content)


@dataclass(frozen=True)
class InZip:
    """A member of a .zip of this machine: each process that reads some opens the archive once."""

    archive: str
    member: zipfile.ZipInfo

    def read(self) -> bytes:
        try:
            return _read_zipped(_open_zip(self.archive), self.member)
        except OSError as error:
            raise ImageError("unreadable", error.strerror or str(error)) from error

    def stamp(self) -> Stamp | None:
        return self.member.file_size, self.member.CRC


@lru_cache(maxsize=1)
def _open_zip(archive: str) -> zipfile.ZipFile:
    return zipfile.ZipFile(archive)


def forget_archives() -> None:
    """Have archives opened anew: in a process that closes the files it was born with."""
    _open_zip.cache_clear()


def _read_zipped(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bytes:
    try:
        return archive.read(member)
    # RuntimeError: encrypted; NotImplementedError: compressed in an exotic way
    except (RuntimeError, NotImplementedError, zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise ImageError("unreadable", str(error)) from error


def _member(path: str, size: int, content: Callable[[], Content]) -> Found:
    try:
        check_size(size)
        return Found(path, content())
    except ImageError as problem:
        return Found(path, Unusable(problem))


def _clean(name: str) -> str:
    return str(PurePosixPath(name))


def _is_hidden(archive: str, name: str) -> bool:
    parts = PurePosixPath(name.replace("\\", "/")).parts
    if name.startswith("/") or ".." in parts or name[1:3] in (":\\", ":/"):
        raise ConvlineError(f"{archive} holds a member that leaves the archive, {name!r}; refused: do not trust it")
    return any(part.startswith(".") for part in parts)
