"""Zip archives: their members in the order of their table, and what their names are."""

from __future__ import annotations

import os
import stat
import struct
import weakref
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, partial

from convline.console import log
from convline.errors import ImageError
from convline.inputs.archive_members import inner_path, is_hidden, link_target, member, normal
from convline.inputs.input_file import InputFile, Opener, Stamp, check_size

IS_ENCRYPTED, IS_UTF8 = 0x1, 0x800  # flags
OF_WINDOWS = (0, 6, 10, 11, 14)  # systems where \ separates names: DOS, OS/2, Windows
OF_UNIX = (3, 19)  # and macOS: the attributes hold the mode
UNICODE_PATH = 0x7075  # an extra field: the name in UTF-8, beside that in the system's own encoding
FAITHFUL = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # unpack no more than they are asked for
LONGEST_LINK = 4096  # bytes
SHOWN = 60  # bytes of a name
LINKS = 8  # that lead from one to the next


def zip_members(open_file: Opener, name: str, prefix: str) -> Iterator[InputFile]:
    """The files of a zip, in the order of its table."""
    paths: dict[str, zipfile.ZipInfo] = {}
    with open_file(name) as file, zipfile.ZipFile(file) as archive:
        _tell_unknown_encoding(name, archive)
        for info in archive.infolist():
            path = inner_path(name, member_name(info))
            if _is_folder(info) or is_hidden(path):
                continue
            if _is_link(info):
                paths = paths or {normal(member_name(other)) or "": other for other in archive.infolist()}
                yield _linked(open_file, name, prefix, path, paths)
            else:
                yield member(prefix + path, info.file_size, partial(InZip, open_file, name, info))


def zip_names(open_file: Opener, name: str) -> Iterator[tuple[str, bool]]:
    """The path of each member of a zip, and whether it is a folder."""
    with open_file(name) as file, zipfile.ZipFile(file) as archive:
        for info in archive.infolist():
            yield inner_path(name, member_name(info)), _is_folder(info)


@dataclass(frozen=True)
class InZip:
    """A member of a zip: each process that reads some opens the archive once."""

    open_file: Opener
    archive: str
    info: zipfile.ZipInfo

    def read(self) -> bytes:
        try:
            return _read(_opened(self.open_file, self.archive), self.info)
        except ImageError:
            raise
        # zipfile, and what it unpacks with, stumble over a damaged member in many ways
        except Exception as error:
            raise ImageError("unreadable", str(error) or type(error).__name__) from error

    def stamp(self) -> Stamp | None:
        return self.info.file_size, self.info.CRC


@lru_cache(maxsize=1)
def _opened(open_file: Opener, name: str) -> zipfile.ZipFile:
    file = open_file(name)
    archive = zipfile.ZipFile(file)
    weakref.finalize(archive, file.close)  # which is not zipfile's to close
    return archive


def forget_zip() -> None:
    """Have the archive opened anew by the next read."""
    _opened.cache_clear()


def _read(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    """A member's bytes, in no more memory than it says that they take."""
    if info.flag_bits & IS_ENCRYPTED:
        raise ImageError("unreadable", "it is encrypted; unpack the archive with its password")
    # of bzip2 and LZMA all is unpacked that was read: 4 KiB may be 90 MB
    step = 2**16 if info.compress_type in FAITHFUL else 2**12
    with archive.open(info) as file:
        return b"".join(iter(lambda: file.read(step), b""))


def member_name(info: zipfile.ZipInfo) -> str:
    """A member's name, with / between its parts.

    It is UTF-8 where the archive says so, and where it can be, as of Info-ZIP and macOS, which don't say so. Names in
    a code page of a system, which is not told, keep their bytes, as names of files do that are not UTF-8.
    """
    raw = info.orig_filename.encode("utf-8" if info.flag_bits & IS_UTF8 else "cp437")
    name = os.fsdecode(_unicode_path(info.extra, raw) or raw)
    if info.create_system in OF_WINDOWS and _is_utf8(name):  # a byte of a character may look like \ else
        return name.replace("\\", "/")
    return name


def _unicode_path(extra: bytes, raw: bytes) -> bytes | None:
    """What an extra field says that the name is, if it is about this one."""
    while len(extra) >= 4:
        kind, size = struct.unpack_from("<HH", extra)
        field, extra = extra[4 : 4 + size], extra[4 + size :]
        if kind == UNICODE_PATH and field[:5] == b"\1" + struct.pack("<I", zlib.crc32(raw)):
            return field[5:]
    return None


def _is_utf8(name: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in name)


def _tell_unknown_encoding(name: str, archive: zipfile.ZipFile) -> None:
    others = [path for path in map(member_name, archive.infolist()) if not _is_utf8(path)]
    if others:
        shown = others[0].encode("utf-8", "surrogateescape")[:SHOWN]
        _log_once(
            f"warning: {name} does not tell in which encoding {len(others)} of its names are, such as {shown!r}; "
            "they keep their bytes. If it is, say, cp932, this unpacks it: "
            f"python -m zipfile --metadata-encoding cp932 -e {name} FOLDER"
        )


@lru_cache(maxsize=16)
def _log_once(message: str) -> None:
    """An archive is listed several times."""
    log(message)


def _is_folder(info: zipfile.ZipInfo) -> bool:
    is_so_called = member_name(info).endswith("/") or stat.S_ISDIR(_mode(info))
    return is_so_called and not info.file_size


def _is_link(info: zipfile.ZipInfo) -> bool:
    return stat.S_ISLNK(_mode(info))


def _mode(info: zipfile.ZipInfo) -> int:
    return info.external_attr >> 16 if info.create_system in OF_UNIX else 0


def _linked(open_file: Opener, name: str, prefix: str, path: str, paths: dict[str, zipfile.ZipInfo]) -> InputFile:
    """The file that a symbolic link leads to, within its archive."""

    def content() -> InZip:
        here = path
        for _ in range(LINKS):
            link = InZip(open_file, name, paths[here])
            if link.info.file_size > LONGEST_LINK:
                break
            target = link_target(here, told := os.fsdecode(link.read()))
            if target is None:
                raise ImageError("unsupported", f"a link out of its archive, to {told}")
            if target not in paths or _is_folder(paths[target]):
                raise ImageError("unreadable", f"a link to {target or '.'}, which is no file of its archive")
            if not _is_link(paths[target]):
                check_size(paths[target].file_size)
                return InZip(open_file, name, paths[target])
            here = target
        raise ImageError("unreadable", "a link that leads nowhere")

    return member(prefix + path, 0, content)
