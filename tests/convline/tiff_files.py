"""Writes TIFF and JPEG 2000 files by hand, in layouts that Pillow does not write."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

MINISWHITE, MINISBLACK, RGB, PALETTE, SEPARATED = 0, 1, 2, 3, 5
ROWS = 4  # per strip


def tiff(
    pixels: NDArray[Any],
    bits: int,
    photometric: int,
    *,
    order: str = "<",
    planar: bool = False,
    deflate: bool = False,
    tile: tuple[int, int] | None = None,
    fill_order: int = 1,
    more: Sequence[tuple[int, list[int]]] = (),
) -> bytes:
    """A TIFF of `pixels` [height, width, samples] of `bits` bits per sample; `more`: further tags, of 16-bit values."""
    height, width, samples = pixels.shape
    parts = [pixels[..., index : index + 1] for index in range(samples)] if planar else [pixels]
    rows, columns = tile or (ROWS, width)
    segments = []
    for part in parts:
        for y in range(0, height, rows):
            for x in range(0, width, columns):
                block = part[y : y + rows, x : x + columns]
                if tile:
                    margin = [(0, rows - block.shape[0]), (0, columns - block.shape[1]), (0, 0)]
                    block = np.pad(block, margin)
                segments.append(_packed(block.reshape(len(block), -1), bits, order))
    if deflate:
        segments = [zlib.compress(segment) for segment in segments]
    if fill_order == 2:
        segments = [bytes(int(f"{byte:08b}"[::-1], 2) for byte in segment) for segment in segments]
    offsets = [8 + sum(map(len, segments[:index])) for index in range(len(segments))]
    long, short = "I", "H"
    tags: list[tuple[int, str, list[int]]] = [
        (256, long, [width]),
        (257, long, [height]),
        (258, short, [bits] * samples),
        (259, short, [8 if deflate else 1]),
        (262, short, [photometric]),
        (266, short, [fill_order]),
        (277, short, [samples]),
        (284, short, [2 if planar else 1]),
        *((tag, short, values) for tag, values in more),
    ]
    counts = [len(segment) for segment in segments]
    if tile:
        tags += [(322, long, [columns]), (323, long, [rows]), (324, long, offsets), (325, long, counts)]
    else:
        tags += [(273, long, offsets), (278, long, [rows]), (279, long, counts)]
    return _file(b"".join(segments), sorted(tags), order)


def _packed(rows: NDArray[Any], bits: int, order: str) -> bytes:
    """Each row begins at a byte boundary."""
    if bits == 16:
        return rows.astype(f"{order}u2").tobytes()
    each = (rows[..., None] >> np.arange(bits)[::-1]) & 1
    return np.packbits(each.astype(np.uint8).reshape(len(rows), -1), axis=1).tobytes()


def _file(body: bytes, tags: list[tuple[int, str, list[int]]], order: str) -> bytes:
    at = 8 + len(body)
    entries, outside = b"", b""
    for tag, kind, values in tags:
        packed = struct.pack(f"{order}{len(values)}{kind}", *values)
        place = packed.ljust(4, b"\0")
        if len(packed) > 4:
            place = struct.pack(f"{order}I", at + 2 + 12 * len(tags) + 4 + len(outside))
            outside += packed + b"\0" * (len(packed) % 2)
        entries += struct.pack(f"{order}HHI", tag, {"H": 3, "I": 4}[kind], len(values)) + place
    begin = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, at)
    return begin + body + struct.pack(f"{order}H", len(tags)) + entries + bytes(4) + outside


def jp2(codestream: bytes, shape: tuple[int, int, int], colour: int | bytes, *boxes: tuple[bytes, bytes]) -> bytes:
    """A JP2 file around a codestream: `shape` (height, width, components), `colour` the number of an enumerated colour
    space or an ICC profile, `boxes` further boxes of the header."""

    def box(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I4s", 8 + len(body), kind) + body

    bits = codestream[42] & 127
    described = b"\1\0\0" + struct.pack(">I", colour) if isinstance(colour, int) else b"\2\0\0" + colour
    header = box(b"ihdr", struct.pack(">IIHBBBB", *shape, bits, 7, 0, 0)) + box(b"colr", described)
    header += b"".join(box(*each) for each in boxes)
    first = box(b"jP  ", b"\r\n\x87\n") + box(b"ftyp", b"jp2 \0\0\0\0jp2 ")
    return first + box(b"jp2h", header) + box(b"jp2c", codestream)
