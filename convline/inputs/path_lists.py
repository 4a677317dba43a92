"""Lists of paths (`@FILE` and standard input): separated by newlines or NULs, in UTF-8, UTF-16 or UTF-32."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from typing import IO

from convline.errors import ConvlineError

BLOCK = 2**16  # bytes of a list that are read at a time
# UTF-32 before UTF-16: the UTF-32-LE mark starts with the UTF-16-LE mark
BYTE_ORDER_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
    codecs.BOM_UTF8: None,  # not decoded: the paths may be any bytes
}


def listed_paths(file: IO[bytes], name: str) -> Iterator[bytes]:
    """The paths of the list `file`; NULs separate them if there is one in the first block (`find -print0`).

    Raises ConvlineError for UTF-16 without a byte order mark, and for a list that is invalid in its encoding.
    """
    separator = None
    rest = b""
    for block in _utf8_blocks(file, name):
        separator = separator or _separator(block)
        *lines, rest = (rest + block).split(separator)
        yield from filter(None, (_without_carriage_return(line, separator) for line in lines))
    if last := _without_carriage_return(rest, separator or b"\n"):
        yield last


def _separator(block: bytes) -> bytes:
    if b"\0" in block:
        return b"\0"
    return b"\r" if b"\r" in block and b"\n" not in block else b"\n"  # \r alone: classic Mac OS


def _without_carriage_return(line: bytes, separator: bytes) -> bytes:
    return line.rstrip(b"\r") if separator == b"\n" else line


def _utf8_blocks(file: IO[bytes], name: str) -> Iterator[bytes]:
    """The list without its byte order mark; converted to UTF-8 if the mark is of another encoding."""
    first = file.read(BLOCK)
    mark = next((mark for mark in BYTE_ORDER_MARKS if first.startswith(mark)), b"")
    encoding = BYTE_ORDER_MARKS.get(mark)
    if not mark and _looks_like_utf16(first):
        raise ConvlineError(f"{name} looks like UTF-16, and has no byte order mark; save it as UTF-8")
    blocks = _all_blocks(first[len(mark) :], file)
    yield from blocks if encoding is None else _to_utf8(blocks, encoding, name)


def _all_blocks(first: bytes, file: IO[bytes]) -> Iterator[bytes]:
    yield first
    while block := file.read(BLOCK):
        yield block


def _to_utf8(blocks: Iterator[bytes], encoding: str, name: str) -> Iterator[bytes]:
    decoder = codecs.getincrementaldecoder(encoding)("surrogatepass")  # Windows allows lone surrogates in file names
    try:
        for block in blocks:
            yield decoder.decode(block).encode("utf-8", "surrogatepass")
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise ConvlineError(f"{name} is damaged {encoding} ({error.reason}); save it as UTF-8") from error


def _looks_like_utf16(block: bytes) -> bool:
    """Whether most names between NULs are single bytes, and one of those is hardly ever a whole path.

    ASCII text in UTF-16 or UTF-32 has a NUL beside each character, and would look like a list of one-letter paths.
    """
    names = list(filter(None, block.split(b"\0")))
    single_bytes = [name for name in names if len(name) == 1]
    unlikely_paths = {b".", b"/", b"\\", b"\r", b"\n"}
    return 2 < len(single_bytes) > len(names) / 2 and not unlikely_paths.isdisjoint(single_bytes)
