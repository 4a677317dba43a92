"""Decompression of gzip, bzip2 and xz archives: reads an archive from start to end in bounded memory."""

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

CHUNK = 2**16  # bytes that are read at a time
MAX_OUTPUT = 2**20  # bytes that are decompressed at a time
XZ_MEMORY_LIMIT = 2**28  # bytes; the highest preset of xz needs a quarter of this


class _Decompressor(Protocol):
    """The common interface of bz2.BZ2Decompressor and lzma.LZMADecompressor."""

    @property
    def eof(self) -> bool: ...

    @property
    def needs_input(self) -> bool: ...

    @property
    def unused_data(self) -> bytes: ...

    def decompress(self, data: bytes, max_length: int) -> bytes: ...


class _GzipDecompressor:
    """Gives zlib's decompressor the interface of the others."""

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


# by the first bytes of the file
DECOMPRESSORS: dict[bytes, Callable[[], _Decompressor]] = {
    b"\x1f\x8b": _GzipDecompressor,
    b"BZh": bz2.BZ2Decompressor,
    b"\xfd7zXZ\0": partial(lzma.LZMADecompressor, lzma.FORMAT_XZ, XZ_MEMORY_LIMIT),
}


class _DecompressedFile(io.RawIOBase):
    """The decompressed contents of a file, which may consist of several compressed streams.

    Unlike the file objects of gzip, bz2 and lzma, it raises EOFError if the file breaks off, raises an error for
    anything but zeros or another stream after a stream, and limits memory.
    """

    def __init__(self, file: IO[bytes], new_decompressor: Callable[[], _Decompressor]) -> None:
        self._file = file
        self._new_decompressor = new_decompressor
        self._decompressor = new_decompressor()

    def readable(self) -> bool:
        return True

    def readinto(self, target: Any) -> int:
        while True:
            data = b""
            if self._decompressor.eof:
                if not (data := self._start_of_next_stream()):
                    return 0
                self._decompressor = self._new_decompressor()
            elif self._decompressor.needs_input:
                data = self._file.read(CHUNK)
            output = self._decompressor.decompress(data, min(len(target), MAX_OUTPUT))
            if output:
                target[: len(output)] = output
                return len(output)
            if not data and not self._decompressor.eof:
                raise EOFError("the file ends inside its compressed data")

    def _start_of_next_stream(self) -> bytes:
        """The first bytes after a compressed stream and its zero padding; none at the end of the file."""
        data = self._decompressor.unused_data.lstrip(b"\0")
        while not data and (block := self._file.read(CHUNK)):
            data = block.lstrip(b"\0")
        return data


class ArchiveStream:
    """An archive file that is read forwards, decompressed if necessary. `position` counts decompressed bytes.

    For damaged data, the exceptions of the decompression library pass through.
    """

    def __init__(self, file: IO[bytes]) -> None:
        magic = file.read(max(map(len, DECOMPRESSORS)))
        file.seek(0)
        new_decompressor = next((new for start, new in DECOMPRESSORS.items() if magic.startswith(start)), None)
        self.is_compressed = new_decompressor is not None
        self.position = 0
        self._file: Any = (
            io.BufferedReader(_DecompressedFile(file, new_decompressor), CHUNK) if new_decompressor else file
        )

    def read(self, size: int) -> bytes:
        """`size` bytes; fewer only at the end of the file."""
        data: bytes = self._file.read(size)
        self.position += len(data)
        return data

    def chunks(self, size: int) -> Iterator[bytes]:
        """`size` bytes in chunks. Raises EOFError if there are fewer."""
        while size:
            if not (data := self.read(min(CHUNK, size))):
                raise EOFError("the file ends inside a member")
            size -= len(data)
            yield data

    def skip_to(self, position: int) -> None:
        """Continue at `position`. Raises EOFError if a compressed file ends before it; others can seek past the end."""
        if self.is_compressed:
            for _ in self.chunks(position - self.position):
                pass
        elif position != self.position:
            self._file.seek(position)
            self.position = position


_last = threading.local()  # the stream that this thread used last: members are usually read in order


def stream_at(open_file: Opener, name: str, position: int) -> ArchiveStream:
    """The archive `name` at `position`: this thread's last stream if it has not passed `position`, else a new one."""
    key = (open_file, name)
    if getattr(_last, "key", None) != key or _last.stream.position > position:
        close_stream()
        _last.file = open_file(name)
        _last.stream, _last.key = ArchiveStream(_last.file), key
    stream: ArchiveStream = _last.stream
    stream.skip_to(position)
    return stream


def close_stream() -> None:
    """Close this thread's last stream; the next `stream_at` opens the archive again."""
    if getattr(_last, "key", None) is not None:
        _last.key = None
        _last.file.close()
