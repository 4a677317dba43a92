"""Tar archives: their members, also where several archives follow each other, with links and sparse members.

`tar_headers` reads what a member is, `tar_members` makes files of them.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from convline.errors import ImageError
from convline.inputs.archive_members import Links, Window, inner_path, is_hidden, link_target, member, normal
from convline.inputs.decompression import CHUNK, Stream, forget_stream, stream_at
from convline.inputs.input_file import InMemory, InputFile, OnDisk, Opener, Stamp, Unusable, open_local, unreadable
from convline.inputs.tar_headers import Header, Parts, headers


def tar_members(open_file: Opener, name: str, prefix: str) -> Iterator[InputFile]:
    """The files of a tar in their order; what its links lead to comes last, in the order in which that is found."""
    links = Links()
    with open_file(name) as file:
        contents = _Contents(open_file, name, Stream(file))
        for header in headers(contents.stream):
            if header.kind == "title":
                continue
            path = inner_path(name, header.name)
            if header.kind in ("hard link", "symbolic link"):
                if (problem := _note(links, header, path)) and not is_hidden(path):
                    yield InputFile(prefix + path, Unusable(problem))
            elif header.kind != "folder" and not is_hidden(path):
                yield contents.file(prefix + path, header)
    if links.found:
        yield from _linked(open_file, name, prefix, links)


def tar_names(open_file: Opener, name: str) -> Iterator[tuple[str, bool]]:
    """The path of each member of a tar, and whether it is a folder."""
    with open_file(name) as file:
        for header in headers(Stream(file)):
            if header.kind != "title":
                yield inner_path(name, header.name), header.kind == "folder"


def _note(links: Links, header: Header, path: str) -> ImageError | None:
    """Remember a link, or say why it is not followed."""
    target = normal(header.link) if header.kind == "hard link" else link_target(path, header.link)
    if target is None or (header.kind == "hard link" and header.link.startswith("/")):
        return ImageError("unsupported", f"a link out of its archive, to {header.link}")
    return None if links.add(path, target) else ImageError("unsupported", "a link, in an archive with too many of them")


def _linked(open_file: Opener, name: str, prefix: str, links: Links) -> Iterator[InputFile]:
    """The files that links are, in a second pass: what they lead to may come later, and cannot all be kept."""
    with open_file(name) as file:
        contents = _Contents(open_file, name, Stream(file))
        for header in headers(contents.stream):
            if header.kind != "file":
                continue
            found = None
            for path in links.take(inner_path(name, header.name)):
                if not is_hidden(path):
                    found = found or contents.file(path, header)
                    yield InputFile(prefix + path, found.content)
    for path, target in links.left():
        if not is_hidden(path):
            yield unreadable(prefix + path, f"a link to {target or '.'}, which is no file of its archive")


class _Contents:
    """Where the bytes of members are, of which `stream` stands at the one that is asked for."""

    def __init__(self, open_file: Opener, name: str, stream: Stream) -> None:
        self.stream = stream
        self._open_file = open_file
        self._name = name
        self._window = Window()

    def file(self, path: str, header: Header) -> InputFile:
        return member(path, header.size, lambda: self._content(header))

    def _content(self, header: Header) -> OnDisk | InMemory | InTar:
        if header.kind != "file":
            raise ImageError("unsupported", "a special file inside an archive")
        is_whole = header.parts == ((0, header.size),)
        if is_whole and self._open_file is open_local and not self.stream.is_compressed:
            return OnDisk(self._name, header.start, header.size)
        if self._window.takes(header.size):
            return InMemory(b"".join(_unfolded(self.stream, header.parts, header.size)))
        checksum = 0
        for chunk in _unfolded(self.stream, header.parts, header.size):
            checksum = zlib.crc32(chunk, checksum)
        return InTar(self._open_file, self._name, header.start, header.size, header.parts, checksum)


@dataclass(frozen=True)
class InTar:
    """A member that is too large to be held: its archive is read and unpacked once more, up to it.

    Each process and thread does so for itself. It goes on from the last member that it was asked for.
    """

    open_file: Opener
    archive: str
    start: int
    size: int
    parts: Parts
    checksum: int

    def read(self) -> bytes:
        data, checksum = io.BytesIO(), 0  # whose value is no copy
        try:
            stream = stream_at(self.open_file, self.archive, self.start)
            for chunk in _unfolded(stream, self.parts, self.size):
                data.write(chunk)
                checksum = zlib.crc32(chunk, checksum)
        # libraries of compressions and of remote file systems have exceptions of their own
        except Exception as error:
            forget_stream()
            raise ImageError("unreadable", str(error) or type(error).__name__) from error
        if checksum != self.checksum:
            raise ImageError("unreadable", "its archive has changed since it was listed")
        return data.getvalue()

    def stamp(self) -> Stamp | None:
        return self.size, self.checksum  # as that of what is held in memory


def _unfolded(stream: Stream, parts: Parts, size: int) -> Iterator[bytes]:
    """The bytes of the member at which `stream` stands: its parts, and zeros in the holes of a sparse one."""
    position = 0
    for offset, length in (*parts, (size, 0)):
        if length < 0 or not position <= offset <= size - length:
            raise ImageError("unreadable", "its holes are not where they can be")
        yield from _zeros(offset - position)
        yield from stream.chunks(length)
        position = offset + length


def _zeros(size: int) -> Iterator[bytes]:
    for start in range(0, size, CHUNK):
        yield bytes(min(CHUNK, size - start))
