"""Tar headers: parses V7, ustar, GNU and pax headers (long names, links, sparse members) and end-of-archive marks.

Python's tarfile is not used: it silently skips damaged headers and anything after an end mark, and crafted headers make
it use unbounded memory and time (Python 3.11).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from convline.inputs.decompression import ArchiveStream

BLOCK = 512
MAX_HEADER = 2**20  # bytes of one member's extended headers, or of its sparse map
EXTENDED = (b"x", b"X", b"g", b"L", b"K")  # types: pax, Solaris pax, pax for all members, GNU long name, GNU long link
WITHOUT_DATA = (b"1", b"2", b"3", b"4", b"5", b"6")  # types that have no data, whatever their size field says

MemberKind = Literal["file", "folder", "hard link", "symbolic link", "label", "other"]
DataRanges = tuple[tuple[int, int], ...]  # (offset, length) of a file's data; the gaps are zeros

KINDS: dict[bytes, MemberKind] = {
    b"0": "file",
    b"\0": "file",
    b"7": "file",  # contiguous file
    b"S": "file",  # GNU sparse file
    b"1": "hard link",
    b"2": "symbolic link",
    b"5": "folder",
    b"D": "folder",  # of a GNU incremental archive; its data are the names in it
    b"V": "label",  # of the archive, not a path
}


@dataclass(frozen=True)
class TarMember:
    """A member of a tar archive.

    `size`: of the file in bytes, with the gaps of a sparse file; `link`: the path that a link names;
    `data_start`: position in the stream of the data of `ranges`, which are stored one after another;
    `data_end`: position of the next header.
    """

    name: str
    kind: MemberKind
    size: int
    link: str
    data_start: int
    data_end: int
    ranges: DataRanges


def read_members(stream: ArchiveStream) -> Iterator[TarMember]:
    """All members of an archive. Each comes with the stream at its data, which may be read, but not past `data_end`.

    Raises ValueError or EOFError for a damaged or truncated archive.
    """
    is_ended = False
    while block := stream.read(BLOCK):
        if not block.strip(b"\0"):
            is_ended = True  # unless another archive follows, as after `tar --concatenate` or `cat`
            continue
        member = _read_member(block, stream)
        is_ended = False
        yield member
        stream.skip_to(member.data_end)
    if not is_ended:
        raise ValueError("it ends before its end mark")


def _read_member(block: bytes, stream: ArchiveStream) -> TarMember:
    """The member whose headers begin with `block`; extended headers come before the member's own header."""
    records: list[tuple[bytes, bytes]] = []
    bytes_left = MAX_HEADER
    while _verified(block, stream)[156:157] in EXTENDED:
        kind, size = block[156:157], _number(block[124:136])
        bytes_left -= size
        if bytes_left < 0:
            raise ValueError(f"a header of more than {MAX_HEADER} bytes")
        data = b"".join(stream.chunks(size))
        stream.skip_to(stream.position + -size % BLOCK)
        if kind == b"L":
            records.append((b"path", data.split(b"\0")[0]))
        elif kind == b"K":
            records.append((b"linkpath", data.split(b"\0")[0]))
        elif kind != b"g":
            records += _pax_records(data)
        block = stream.read(BLOCK)
    return _parse_header(block, records, stream)


def _verified(block: bytes, stream: ArchiveStream) -> bytes:
    """`block`, if it is a header with a correct checksum. Raises ValueError otherwise."""
    if len(block) == BLOCK:
        checksum = _number(block[148:156])
        fields = block[:148] + b" " * 8 + block[156:]
        unsigned = sum(fields)
        signed = unsigned - 256 * sum(byte > 127 for byte in fields)  # old writers summed signed bytes
        if checksum in (unsigned, signed):
            return block
    raise ValueError(f"no valid member header at byte {stream.position - len(block)}")


def _parse_header(block: bytes, records: list[tuple[bytes, bytes]], stream: ArchiveStream) -> TarMember:
    """The member of the header `block`; `records` are those of its extended headers."""
    extended = dict(records)
    kind = block[156:157]
    stored = size = _digits(extended[b"size"]) if extended.get(b"size") else _number(block[124:136])
    ranges: DataRanges | None = None
    if kind == b"S":
        ranges, size = _gnu_sparse_map(block, stream)
    elif any(key.startswith(b"GNU.sparse.") for key in extended):
        before = stream.position
        ranges = _pax_sparse_map(records, stream)
        size = _digits(extended.get(b"GNU.sparse.realsize") or extended.get(b"GNU.sparse.size", b""))
        stored -= stream.position - before
    name = extended.get(b"GNU.sparse.name") or extended.get(b"path") or _ustar_name(block)
    link = extended.get(b"linkpath") or block[157:257].split(b"\0")[0]
    if kind in (b"0", b"\0") and name.endswith(b"/") and not size:  # how V7 tar stores folders
        kind = b"5"
    start = stream.position
    end = start if kind in WITHOUT_DATA else start + stored + -stored % BLOCK
    if stored < 0 or sum(length for _, length in ranges or ()) > stored:
        raise ValueError("a sparse member has less data than its map says")
    if ranges is None:
        ranges = ((0, size),)
    return TarMember(os.fsdecode(name), KINDS.get(kind, "other"), size, os.fsdecode(link), start, end, ranges)


def _ustar_name(block: bytes) -> bytes:
    name = block[:100].split(b"\0")[0]
    # GNU headers have no prefix: times are in its place
    prefix = block[345:500].split(b"\0")[0] if block[257:263] == b"ustar\0" else b""
    return prefix + b"/" + name if prefix else name


def _number(field: bytes) -> int:
    """A number field: octal digits, or binary after a first byte of 0x80. Raises ValueError for an invalid one."""
    if field[0] & 0x80:
        if field[0] == 0xFF:
            raise ValueError("a negative number in a header")
        return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
    return _digits(field.split(b"\0")[0].strip() or b"0", 8)


def _digits(digits: bytes, base: int = 10) -> int:
    if not digits.isdigit() or len(digits) > 20:
        raise ValueError("a damaged number in a header")
    return int(digits, base)


def _pax_records(data: bytes) -> list[tuple[bytes, bytes]]:
    """The keys and values of a pax header, each "length key=value\\n". Raises ValueError for a damaged one."""
    records = []
    data, position = data.rstrip(b"\0"), 0
    while position < len(data):
        space = data.find(b" ", position, position + 20)
        end = position + _digits(data[position:space])
        key, equals, value = data[space + 1 : end - 1].partition(b"=")
        if not equals or data[end - 1 : end] != b"\n":
            raise ValueError("a damaged extended header")
        records.append((key, value))
        position = end
    return records


def _gnu_sparse_map(block: bytes, stream: ArchiveStream) -> tuple[DataRanges, int]:
    """The data ranges of a sparse member and the size of the file; leaves the stream at the data."""
    size = _number(block[483:495])
    entries, is_continued = block[386:482], block[482]
    while is_continued:
        if len(more := stream.read(BLOCK)) < BLOCK or len(entries) > MAX_HEADER:
            raise ValueError("a damaged sparse member")
        entries, is_continued = entries + more[:504], more[504]
    pairs = (entries[start : start + 24] for start in range(0, len(entries), 24))
    return tuple((_number(pair[:12]), _number(pair[12:])) for pair in pairs if pair.strip(b"\0")), size


def _pax_sparse_map(records: list[tuple[bytes, bytes]], stream: ArchiveStream) -> DataRanges:
    """The data ranges of a sparse member with pax headers, in any of GNU tar's three formats: 0.0, 0.1 and 1.0."""
    extended = dict(records)
    if b"GNU.sparse.map" in extended:  # 0.1
        numbers = [_digits(number) for number in extended[b"GNU.sparse.map"].split(b",")]
    elif b"GNU.sparse.major" in extended:  # 1.0: lines before the data, first the number of ranges, then their numbers
        text = b""
        while b"\n" not in text or text.count(b"\n") < 1 + 2 * _digits(text[: text.index(b"\n")]):
            if len(more := stream.read(BLOCK)) < BLOCK or len(text) > MAX_HEADER:
                raise ValueError("a damaged sparse member")
            text += more
        count, *lines = text.split(b"\n")
        numbers = [_digits(line) for line in lines[: 2 * _digits(count)]]
    else:  # 0.0
        keys = (b"GNU.sparse.offset", b"GNU.sparse.numbytes")
        numbers = [_digits(value) for key, value in records if key in keys]
    return tuple(zip(numbers[::2], numbers[1::2], strict=True))
