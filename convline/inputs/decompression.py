"""An archive's bytes from its beginning to its end, unpacked where they are compressed, in bounded memory."""

from __future__ import annotations

import bz2
import io
import lzma
import threading
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import IO, Any, Protocol

from convline.inputs.input_file import Opener

CHUNK = 2**16  # bytes that are read at once
OUTPUT = 2**20  # bytes that are unpacked at once
MEMORY = 2**28  # bytes that an .xz may ask for: its highest preset takes a quarter


class _Unpacker(Protocol):
    """What bz2's and lzma's objects have in common."""

    @property
    def eof(self) -> bool: ...

    @property
    def needs_input(self) -> bool: ...

    @property
    def unused_data(self) -> bytes: ...

    def decompress(self, data: bytes, max_length: int) -> bytes: ...


class _Gzip:
    """zlib's object with the interface of the others."""

    def __init__(self) -> None:
        self._object = zlib.decompressobj(zlib.MAX_WBITS | 16)

    @property
    def eof(self) -> bool:
        return self._object.eof

    @property
    def needs_input(self) -> bool:
        return not self._object.unconsumed_tail

    @property
    def unused_data(self) -> bytes:
        return self._object.unused_data

    def decompress(self, data: bytes, max_length: int) -> bytes:
        return self._object.decompress(self._object.unconsumed_tail + data, max_length)


UNPACKERS: dict[bytes, Callable[[], _Unpacker]] = {
    b"\x1f\x8b": _Gzip,
    b"BZh": bz2.BZ2Decompressor,
    b"\xfd7zXZ\0": partial(lzma.LZMADecompressor, lzma.FORMAT_XZ, MEMORY),
}


class _Unpacked(io.RawIOBase):
    """What a compressed file holds, of all its streams one after the other.

    Unlike the files of gzip, bz2 and lzma it takes nothing but the file's end for an end, and has a limit of memory.
    """

    def __init__(self, file: IO[bytes], begin: Callable[[], _Unpacker]) -> None:
        self._file = file
        self._begin = begin
        self._unpacker = begin()

    def readable(self) -> bool:
        return True

    def readinto(self, target: Any) -> int:
        while True:
            data = b""
            if self._unpacker.eof:
                if not (data := self._next_stream()):
                    return 0
                self._unpacker = self._begin()
            elif self._unpacker.needs_input:
                data = self._file.read(CHUNK)
            unpacked = self._unpacker.decompress(data, min(len(target), OUTPUT))
            if unpacked:
                target[: len(unpacked)] = unpacked
                return len(unpacked)
            if not data and not self._unpacker.eof:
                raise EOFError("it breaks off inside its compressed data")

    def _next_stream(self) -> bytes:
        """The first bytes of what follows a stream and the zeros behind it; none at the end."""
        data = self._unpacker.unused_data.lstrip(b"\0")
        while not data and (block := self._file.read(CHUNK)):
            data = block.lstrip(b"\0")
        return data


class Stream:
    """A file that is read forwards. Its `position` counts unpacked bytes.

    Whatever the library of a compression raises for damaged data passes through.
    """

    def __init__(self, file: IO[bytes]) -> None:
        magic = file.read(max(map(len, UNPACKERS)))
        file.seek(0)
        begin = next((begin for start, begin in UNPACKERS.items() if magic.startswith(start)), None)
        self.is_compressed = begin is not None
        self.position = 0
        self._file: Any = io.BufferedReader(_Unpacked(file, begin), CHUNK) if begin else file

    def read(self, size: int) -> bytes:
        """`size` bytes; less only at the end of the file."""
        data: bytes = self._file.read(size)
        self.position += len(data)
        return data

    def chunks(self, size: int) -> Iterator[bytes]:
        """`size` bytes, a few at once. Raises EOFError where there are less."""
        while size:
            if not (data := self.read(min(CHUNK, size))):
                raise EOFError("it breaks off inside a member")
            size -= len(data)
            yield data

    def skip_to(self, position: int) -> None:
        """Go on at `position`. Raises EOFError where that is known to lie behind the end."""
        if self.is_compressed:
            for _ in self.chunks(position - self.position):
                pass
        elif position != self.position:
            self._file.seek(position)
            self.position = position


_last = threading.local()  # the stream that a thread read from last: members are asked for in their order


def stream_at(open_file: Opener, name: str, position: int) -> Stream:
    """The archive `name` at `position`: the stream of this thread's last call, if that is not behind it already."""
    key = (open_file, name)
    if getattr(_last, "key", None) != key or _last.stream.position > position:
        forget_stream()
        _last.file = open_file(name)
        _last.stream, _last.key = Stream(_last.file), key
    stream: Stream = _last.stream
    stream.skip_to(position)
    return stream


def forget_stream() -> None:
    """Have the archive opened anew by this thread's next call."""
    if getattr(_last, "key", None) is not None:
        _last.key = None
        _last.file.close()
