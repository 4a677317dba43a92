"""What stands between the members of a tar: headers of V7, ustar, GNU and pax, and end marks.

Not by tarfile: it passes over damaged headers and over what follows an end mark in silence, and crafted headers make
it take memory and time without bound (Python 3.11).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from convline.inputs.decompression import Stream

BLOCK = 512
MOST = 2**20  # bytes of a member's extended headers, or of where its holes are
EXTENDED = (b"x", b"X", b"g", b"L", b"K")  # pax (and Solaris'), pax for all members, GNU's long name and link
WITHOUT_DATA = (b"1", b"2", b"3", b"4", b"5", b"6")  # whatever their size says

Kind = Literal["file", "folder", "hard link", "symbolic link", "title", "other"]
Parts = tuple[tuple[int, int], ...]  # offset and length in the file; there are zeros between them

KINDS: dict[bytes, Kind] = {
    b"0": "file",
    b"\0": "file",
    b"7": "file",  # contiguous
    b"S": "file",  # GNU sparse
    b"1": "hard link",
    b"2": "symbolic link",
    b"5": "folder",
    b"D": "folder",  # of an incremental GNU archive, with a list of what is in it
    b"V": "title",  # of the archive, no path
}


@dataclass(frozen=True)
class Header:
    """A member: the `size` of the file, where the bytes of its `parts` start in the stream, and where they end."""

    name: str
    kind: Kind
    size: int
    link: str
    start: int
    end: int
    parts: Parts


def headers(stream: Stream) -> Iterator[Header]:
    """All members; the stream stands at a member's bytes, from where it may be read, but not beyond `end`.

    Raises ValueError or EOFError for what is damaged or breaks off.
    """
    is_ended = False
    while block := stream.read(BLOCK):
        if not block.strip(b"\0"):
            is_ended = True  # unless another archive follows, as after `tar --concatenate` or `cat`
            continue
        header = _header(block, stream)
        is_ended = False
        yield header
        stream.skip_to(header.end)
    if not is_ended:
        raise ValueError("it breaks off before its end mark")


def _header(block: bytes, stream: Stream) -> Header:
    """The member that begins with `block`, its extended headers first."""
    records: list[tuple[bytes, bytes]] = []
    room = MOST
    while _checked(block, stream)[156:157] in EXTENDED:
        kind, size = block[156:157], _number(block[124:136])
        room -= size
        if room < 0:
            raise ValueError(f"a header of more than {MOST} bytes")
        data = b"".join(stream.chunks(size))
        stream.skip_to(stream.position + -size % BLOCK)
        if kind == b"L":
            records.append((b"path", data.split(b"\0")[0]))
        elif kind == b"K":
            records.append((b"linkpath", data.split(b"\0")[0]))
        elif kind != b"g":
            records += _records(data)
        block = stream.read(BLOCK)
    return _member(block, records, stream)


def _checked(block: bytes, stream: Stream) -> bytes:
    """A header's block. Raises ValueError for anything else."""
    if len(block) == BLOCK:
        told = _number(block[148:156])
        fields = block[:148] + b" " * 8 + block[156:]
        unsigned = sum(fields)
        if told in (unsigned, unsigned - 256 * sum(byte > 127 for byte in fields)):  # old writers had signed bytes
            return block
    raise ValueError(f"at byte {stream.position - len(block)} of it is no header of a member")


def _member(block: bytes, records: list[tuple[bytes, bytes]], stream: Stream) -> Header:
    told = dict(records)
    kind = block[156:157]
    stored = size = _whole(told[b"size"]) if told.get(b"size") else _number(block[124:136])
    parts: Parts | None = None
    if kind == b"S":
        parts, size = _gnu_sparse(block, stream)
    elif any(key.startswith(b"GNU.sparse.") for key in told):
        before = stream.position
        parts = _pax_sparse(records, stream)
        size = _whole(told.get(b"GNU.sparse.realsize") or told.get(b"GNU.sparse.size", b""))
        stored -= stream.position - before
    name = told.get(b"GNU.sparse.name") or told.get(b"path") or _ustar_name(block)
    link = told.get(b"linkpath") or block[157:257].split(b"\0")[0]
    if kind in (b"0", b"\0") and name.endswith(b"/") and not size:  # of before there were folders
        kind = b"5"
    start = stream.position
    end = start if kind in WITHOUT_DATA else start + stored + -stored % BLOCK
    if stored < 0 or sum(length for _, length in parts or ()) > stored:
        raise ValueError("a sparse member holds less than it says")
    if parts is None:
        parts = ((0, size),)
    return Header(os.fsdecode(name), KINDS.get(kind, "other"), size, os.fsdecode(link), start, end, parts)


def _ustar_name(block: bytes) -> bytes:
    name = block[:100].split(b"\0")[0]
    # GNU's headers have times at the prefix's place
    prefix = block[345:500].split(b"\0")[0] if block[257:263] == b"ustar\0" else b""
    return prefix + b"/" + name if prefix else name


def _number(field: bytes) -> int:
    """Octal digits, or, for large ones, binary after a first byte of 0x80. Raises ValueError for others."""
    if field[0] & 0x80:
        if field[0] == 0xFF:
            raise ValueError("a number below zero in a header")
        return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
    return _whole(field.split(b"\0")[0].strip() or b"0", 8)


def _whole(digits: bytes, base: int = 10) -> int:
    if not digits.isdigit() or len(digits) > 20:
        raise ValueError("a damaged number in a header")
    return int(digits, base)


def _records(data: bytes) -> list[tuple[bytes, bytes]]:
    """The keys and values of a pax header, which are "length key=value\\n". Raises ValueError for a damaged one."""
    records = []
    data, at = data.rstrip(b"\0"), 0
    while at < len(data):
        space = data.find(b" ", at, at + 20)
        end = at + _whole(data[at:space])
        key, equals, value = data[space + 1 : end - 1].partition(b"=")
        if not equals or data[end - 1 : end] != b"\n":
            raise ValueError("a damaged extended header")
        records.append((key, value))
        at = end
    return records


def _gnu_sparse(block: bytes, stream: Stream) -> tuple[Parts, int]:
    """Where the parts of a sparse member are, and the file's size; the stream is at their bytes afterwards."""
    size = _number(block[483:495])
    structs, is_continued = block[386:482], block[482]
    while is_continued:
        if len(more := stream.read(BLOCK)) < BLOCK or len(structs) > MOST:
            raise ValueError("a damaged sparse member")
        structs, is_continued = structs + more[:504], more[504]
    entries = (structs[at : at + 24] for at in range(0, len(structs), 24))
    return tuple((_number(entry[:12]), _number(entry[12:])) for entry in entries if entry.strip(b"\0")), size


def _pax_sparse(records: list[tuple[bytes, bytes]], stream: Stream) -> Parts:
    """As `_gnu_sparse`, of the three ways in which pax headers tell it."""
    told = dict(records)
    if b"GNU.sparse.map" in told:
        numbers = [_whole(number) for number in told[b"GNU.sparse.map"].split(b",")]
    elif b"GNU.sparse.major" in told:  # before the parts, a line each: their number, then offsets and lengths
        text = b""
        while b"\n" not in text or text.count(b"\n") < 1 + 2 * _whole(text[: text.index(b"\n")]):
            if len(more := stream.read(BLOCK)) < BLOCK or len(text) > MOST:
                raise ValueError("a damaged sparse member")
            text += more
        count, *lines = text.split(b"\n")
        numbers = [_whole(line) for line in lines[: 2 * _whole(count)]]
    else:
        keys = (b"GNU.sparse.offset", b"GNU.sparse.numbytes")
        numbers = [_whole(value) for key, value in records if key in keys]
    return tuple(zip(numbers[::2], numbers[1::2], strict=True))
