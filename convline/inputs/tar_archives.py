"""Tar archives: makes files of their members, including links, sparse members and concatenated archives.

`tar_headers` parses the headers.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass

from convline.errors import ImageError
from convline.inputs.archive_members import (
    LinkTable,
    MemoryWindow,
    inner_path,
    is_hidden,
    member_file,
    normalized,
    symlink_target,
)
from convline.inputs.decompression import CHUNK, ArchiveStream, close_stream, stream_at
from convline.inputs.input_file import (
    FileVersion,
    InMemory,
    InputFile,
    OnDisk,
    Opener,
    Rejected,
    open_local,
    unreadable_file,
)
from convline.inputs.tar_headers import DataRanges, TarMember, read_members


def tar_members(open_file: Opener, name: str, prefix: str) -> Iterator[InputFile]:
    """The files of a tar in their order, and at the end the links, in the order of their targets."""
    with closing(LinkTable()) as links:
        with open_file(name) as file:
            locator = _MemberLocator(open_file, name, ArchiveStream(file))
            for member in read_members(locator.stream):
                if member.kind == "label":
                    continue
                path = inner_path(name, member.name)
                if member.kind in ("hard link", "symbolic link"):
                    if (problem := _add_link(links, member, path)) and not is_hidden(path):
                        yield InputFile(prefix + path, Rejected(problem))
                elif member.kind != "folder" and not is_hidden(path):
                    yield locator.file(prefix + path, member)
        if links.added:
            yield from _linked_files(open_file, name, prefix, links)


def tar_paths(open_file: Opener, name: str) -> Iterator[tuple[str, bool]]:
    """The path of each member of a tar, and whether it is a folder."""
    with open_file(name) as file:
        for member in read_members(ArchiveStream(file)):
            if member.kind != "label":
                yield inner_path(name, member.name), member.kind == "folder"


def _add_link(links: LinkTable, member: TarMember, path: str) -> ImageError | None:
    """Remember a link, or return why it is not followed."""
    target = normalized(member.link) if member.kind == "hard link" else symlink_target(path, member.link)
    if target is None or (member.kind == "hard link" and member.link.startswith("/")):
        return ImageError("unsupported", f"a link out of its archive, to {member.link}")
    return None if links.add(path, target) else ImageError("unsupported", "a link, in an archive with too many of them")


def _linked_files(open_file: Opener, name: str, prefix: str, links: LinkTable) -> Iterator[InputFile]:
    """The files that links point to, found in a second pass: a target may come after its link."""
    with open_file(name) as file:
        locator = _MemberLocator(open_file, name, ArchiveStream(file))
        for member in read_members(locator.stream):
            if member.kind != "file":
                continue
            target = None
            for path in links.pop_links_to(inner_path(name, member.name)):
                if not is_hidden(path):
                    target = target or locator.file(path, member)
                    yield InputFile(prefix + path, target.location)
    for path, missing in links.unresolved():
        if not is_hidden(path):
            yield unreadable_file(prefix + path, f"a link to {missing or '.'}, which is not a file of its archive")


class _MemberLocator:
    """Makes an `InputFile` of each member; `stream` must stand at the member's data."""

    def __init__(self, open_file: Opener, name: str, stream: ArchiveStream) -> None:
        self.stream = stream
        self._open_file = open_file
        self._name = name
        self._window = MemoryWindow()

    def file(self, path: str, member: TarMember) -> InputFile:
        return member_file(path, member.size, lambda: self._locate(member))

    def _locate(self, member: TarMember) -> OnDisk | InMemory | InTar:
        if member.kind != "file":
            raise ImageError("unsupported", "a special file inside an archive")
        is_sparse = member.ranges != ((0, member.size),)
        if not is_sparse and self._open_file is open_local and not self.stream.is_compressed:
            return OnDisk(self._name, member.data_start, member.size)
        if self._window.admits(member.size):
            return InMemory(b"".join(_file_chunks(self.stream, member.ranges, member.size)))
        checksum = 0
        for chunk in _file_chunks(self.stream, member.ranges, member.size):
            checksum = zlib.crc32(chunk, checksum)
        return InTar(self._open_file, self._name, member.data_start, member.size, member.ranges, checksum)


@dataclass(frozen=True)
class InTar:
    """A member that is not held in memory: reading it decompresses the archive again, up to the member.

    Each process and thread keeps a stream of its own and continues from the last member that it read.
    """

    open_file: Opener
    archive: str
    start: int
    size: int
    ranges: DataRanges
    checksum: int

    def read(self) -> bytes:
        data, checksum = io.BytesIO(), 0  # getvalue() of a BytesIO makes no copy
        try:
            stream = stream_at(self.open_file, self.archive, self.start)
            for chunk in _file_chunks(stream, self.ranges, self.size):
                data.write(chunk)
                checksum = zlib.crc32(chunk, checksum)
        # decompressors and remote file systems raise exceptions of their own
        except Exception as error:
            close_stream()
            raise ImageError("unreadable", str(error) or type(error).__name__) from error
        if checksum != self.checksum:
            raise ImageError("unreadable", "its archive has changed since it was listed")
        return data.getvalue()

    def version(self) -> FileVersion | None:
        return self.size, self.checksum  # the same as that of InMemory


def _file_chunks(stream: ArchiveStream, ranges: DataRanges, size: int) -> Iterator[bytes]:
    """The bytes of the member at which `stream` stands: its data, with zeros in the gaps of a sparse file."""
    position = 0
    for offset, length in (*ranges, (size, 0)):
        if length < 0 or not position <= offset <= size - length:
            raise ImageError("unreadable", "its sparse map is damaged")
        yield from _zeros(offset - position)
        yield from stream.chunks(length)
        position = offset + length


def _zeros(size: int) -> Iterator[bytes]:
    for start in range(0, size, CHUNK):
        yield bytes(min(CHUNK, size - start))
