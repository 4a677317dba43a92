"""Lists of paths: a line each, or separated by NULs, in UTF-8 or in what Windows writes."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from typing import IO

from convline.errors import ConvlineError

BLOCK = 2**16  # bytes of a list that are read at once
# of those that begin alike the longer one first
MARKS = {
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
    codecs.BOM_UTF8: None,  # names may be any bytes
}


def list_lines(file: IO[bytes], name: str) -> Iterator[bytes]:
    """What is between line ends, or between NULs where there is one in the first block (`find -print0`).

    Raises ConvlineError for UTF-16 that does not say so, and for what is no text in the encoding that it says.
    """
    separator = None
    rest = b""
    for block in _blocks(file, name):
        separator = separator or _separator(block)
        *lines, rest = (rest + block).split(separator)
        yield from filter(None, (_line(line, separator) for line in lines))
    if last := _line(rest, separator or b"\n"):
        yield last


def _separator(block: bytes) -> bytes:
    if b"\0" in block:
        return b"\0"
    return b"\r" if b"\r" in block and b"\n" not in block else b"\n"  # as on old Macs


def _line(line: bytes, separator: bytes) -> bytes:
    return line.rstrip(b"\r") if separator == b"\n" else line


def _blocks(file: IO[bytes], name: str) -> Iterator[bytes]:
    """The list without its mark, in UTF-8 where there was one."""
    first = file.read(BLOCK)
    mark = next((mark for mark in MARKS if first.startswith(mark)), b"")
    encoding = MARKS.get(mark)
    if not mark and _looks_like_utf16(first):
        raise ConvlineError(f"{name} looks like UTF-16, and has no byte order mark; save it as UTF-8")
    blocks = _all_blocks(first[len(mark) :], file)
    yield from blocks if encoding is None else _decoded(blocks, encoding, name)


def _all_blocks(first: bytes, file: IO[bytes]) -> Iterator[bytes]:
    yield first
    while block := file.read(BLOCK):
        yield block


def _decoded(blocks: Iterator[bytes], encoding: str, name: str) -> Iterator[bytes]:
    decoder = codecs.getincrementaldecoder(encoding)("surrogatepass")  # Windows lets them stand alone in names
    try:
        for block in blocks:
            yield decoder.decode(block).encode("utf-8", "surrogatepass")
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise ConvlineError(f"{name} is damaged {encoding} ({error.reason}); save it as UTF-8") from error


def _looks_like_utf16(block: bytes) -> bool:
    """Whether a list of names between NULs would be one of letters, among them what no list names."""
    names = list(filter(None, block.split(b"\0")))
    letters = [name for name in names if len(name) == 1]
    return 2 < len(letters) > len(names) / 2 and not {b".", b"/", b"\\", b"\r", b"\n"}.isdisjoint(letters)
