"""Zip archives: makes files of their members, with names in whatever encoding, symbolic links and Windows paths."""

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
from convline.inputs.archive_members import inner_path, is_hidden, member_file, normalized, symlink_target
from convline.inputs.input_file import FileVersion, InputFile, Opener, check_size

IS_ENCRYPTED, IS_UTF8 = 0x1, 0x800  # bits of a member's flags
WINDOWS_SYSTEMS = (0, 6, 10, 11, 14)  # systems that separate names by \: DOS, OS/2, Windows
UNIX_SYSTEMS = (3, 19)  # and macOS: the external attributes hold the file mode
UNICODE_PATH = 0x7075  # an extra field: the name in UTF-8, in addition to the one in the system's encoding
BOUNDED = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # compressions that give at most as many bytes as were asked for
MAX_LINK = 4096  # bytes of a link's target
MAX_SHOWN = 60  # bytes of a name in a message
MAX_LINKED_LINKS = 8  # links that point to links


def zip_members(open_file: Opener, name: str, prefix: str) -> Iterator[InputFile]:
    """The files of a zip, in the order of its central directory."""
    infos: dict[str, zipfile.ZipInfo] = {}
    with open_file(name) as file, zipfile.ZipFile(file) as archive:
        _warn_of_unknown_encoding(name, archive)
        for info in archive.infolist():
            path = inner_path(name, member_name(info))
            if _is_folder(info) or is_hidden(path):
                continue
            if _is_link(info):
                infos = infos or {normalized(member_name(other)) or "": other for other in archive.infolist()}
                yield _linked_file(open_file, name, prefix, path, infos)
            else:
                yield member_file(prefix + path, info.file_size, partial(InZip, open_file, name, info))


def zip_paths(open_file: Opener, name: str) -> Iterator[tuple[str, bool]]:
    """The path of each member of a zip, and whether it is a folder."""
    with open_file(name) as file, zipfile.ZipFile(file) as archive:
        for info in archive.infolist():
            yield inner_path(name, member_name(info)), _is_folder(info)


@dataclass(frozen=True)
class InZip:
    """A member of a zip. Each process opens the archive once, and keeps it open."""

    open_file: Opener
    archive: str
    info: zipfile.ZipInfo

    def read(self) -> bytes:
        try:
            return _read_member(_open_zip(self.open_file, self.archive), self.info)
        except ImageError:
            raise
        # for damaged members zipfile and the decompressors raise exceptions of many kinds
        except Exception as error:
            raise ImageError("unreadable", str(error) or type(error).__name__) from error

    def version(self) -> FileVersion | None:
        return self.info.file_size, self.info.CRC


@lru_cache(maxsize=1)
def _open_zip(open_file: Opener, name: str) -> zipfile.ZipFile:
    file = open_file(name)
    archive = zipfile.ZipFile(file)
    weakref.finalize(archive, file.close)  # zipfile does not close a file that it was given
    return archive


def close_zip() -> None:
    """Close the zip that is kept open; the next read opens it again."""
    _open_zip.cache_clear()


def _read_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    """A member's bytes, in no more memory than its header says that they need."""
    if info.flag_bits & IS_ENCRYPTED:
        raise ImageError("unreadable", "it is encrypted; unpack the archive with its password")
    # bzip2 and LZMA decompress all that they read, and 4 KiB may become 90 MB
    step = 2**16 if info.compress_type in BOUNDED else 2**12
    with archive.open(info) as file:
        return b"".join(iter(lambda: file.read(step), b""))


def member_name(info: zipfile.ZipInfo) -> str:
    """A member's name, with / between its parts.

    It is decoded as UTF-8 if the archive says so or if it is valid UTF-8: Info-ZIP and macOS write UTF-8 without saying
    so. Names in another encoding, which a zip does not state, keep their bytes, as `os.fsdecode` gives them.
    """
    raw = info.orig_filename.encode("utf-8" if info.flag_bits & IS_UTF8 else "cp437")
    name = os.fsdecode(_unicode_path(info.extra, raw) or raw)
    if info.create_system in WINDOWS_SYSTEMS and _is_utf8(name):  # else the byte of \ may be part of a character
        return name.replace("\\", "/")
    return name


def _unicode_path(extra: bytes, raw: bytes) -> bytes | None:
    """The name in the Unicode path field, if there is one and its checksum is that of the name `raw`."""
    while len(extra) >= 4:
        kind, size = struct.unpack_from("<HH", extra)
        field, extra = extra[4 : 4 + size], extra[4 + size :]
        if kind == UNICODE_PATH and field[:5] == b"\1" + struct.pack("<I", zlib.crc32(raw)):
            return field[5:]
    return None


def _is_utf8(name: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in name)


def _warn_of_unknown_encoding(name: str, archive: zipfile.ZipFile) -> None:
    not_utf8 = [path for path in map(member_name, archive.infolist()) if not _is_utf8(path)]
    if not_utf8:
        shown = not_utf8[0].encode("utf-8", "surrogateescape")[:MAX_SHOWN]
        _log_once(
            f"warning: {name} does not state the encoding of {len(not_utf8)} of its names, such as {shown!r}; "
            "they keep their bytes. If you know the encoding, say cp932, unpack the archive by: "
            f"python -m zipfile --metadata-encoding cp932 -e {name} FOLDER"
        )


@lru_cache(maxsize=16)
def _log_once(message: str) -> None:
    """Log a message once, although an archive is listed several times."""
    log(message)


def _is_folder(info: zipfile.ZipInfo) -> bool:
    is_marked = member_name(info).endswith("/") or stat.S_ISDIR(_mode(info))
    return is_marked and not info.file_size


def _is_link(info: zipfile.ZipInfo) -> bool:
    return stat.S_ISLNK(_mode(info))


def _mode(info: zipfile.ZipInfo) -> int:
    return info.external_attr >> 16 if info.create_system in UNIX_SYSTEMS else 0


def _linked_file(open_file: Opener, name: str, prefix: str, path: str, infos: dict[str, zipfile.ZipInfo]) -> InputFile:
    """The file that the symbolic link at `path` points to, within its archive."""

    def locate() -> InZip:
        current = path
        for _ in range(MAX_LINKED_LINKS):
            link = InZip(open_file, name, infos[current])
            if link.info.file_size > MAX_LINK:
                break
            target = symlink_target(current, written := os.fsdecode(link.read()))
            if target is None:
                raise ImageError("unsupported", f"a link out of its archive, to {written}")
            if target not in infos or _is_folder(infos[target]):
                raise ImageError("unreadable", f"a link to {target or '.'}, which is not a file of its archive")
            if not _is_link(infos[target]):
                check_size(infos[target].file_size)
                return InZip(open_file, name, infos[target])
            current = target
        raise ImageError("unreadable", "a link that is too long, or that leads through too many other links")

    return member_file(prefix + path, 0, locate)
