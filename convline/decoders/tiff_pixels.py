"""Decodes TIFF pages that Pillow gets wrong: other bit depths, byte orders, planar samples, tiles, alpha, CMYK.

libtiff still decompresses: it gets each plane as an 8-bit image of the same bytes, with new tags. This module then
turns the bytes into samples.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from io import BytesIO
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from convline.decoders import tiff_tags
from convline.decoders.bit_depth import to_8_bits, with_alpha
from convline.decoders.tiff_tags import TiffPage
from convline.errors import ImageError

BLOCK = 2**20  # samples that are converted at a time
Tags = list[tuple[int, tuple[int, ...]]]


def read(page: TiffPage) -> Image.Image:
    """Decode a page: mode L or RGB, or LA or RGBA if it has alpha.

    As in Pillow, the orientation is not applied; it is in the EXIF or XMP data of the image.

    Raises ImageError and, for damaged data, exceptions of Pillow.
    """
    colours, alpha = tiff_tags.COLOUR_COUNTS[page.photometric], _alpha(page)
    if page.samples < colours:
        raise ImageError("unreadable", f"a TIFF with {page.samples} samples per pixel instead of {colours}")
    planes = _planes(page, [*range(colours)] if alpha is None else [*range(colours), alpha[0]])
    image = _coloured(page, planes[:colours])
    if alpha:
        image = with_alpha(image, planes[colours], is_premultiplied=alpha[1] == tiff_tags.ASSOCIATED)
    if tiff_tags.ORIENTATION in page.tags:
        image.getexif()[tiff_tags.ORIENTATION] = page.number(tiff_tags.ORIENTATION, 1)
    elif xmp := page.tags.get(tiff_tags.XMP):
        image.info["xmp"] = xmp[0] if isinstance(xmp, tuple) else xmp
    return image


def _alpha(page: TiffPage) -> tuple[int, int] | None:
    """The index of the alpha sample and its kind; None if there is none."""
    colours, kinds = tiff_tags.COLOUR_COUNTS[page.photometric], page.numbers(tiff_tags.EXTRA_SAMPLES)
    if not kinds and page.photometric == tiff_tags.RGB and page.samples == 4:
        return 3, tiff_tags.UNASSOCIATED  # as Pillow assumes
    return next(((index, kind) for index, kind in enumerate(kinds, colours) if kind and index < page.samples), None)


def _coloured(page: TiffPage, planes: list[NDArray[np.uint8]]) -> Image.Image:
    """The colour planes as an image of mode L or RGB."""
    bands = [Image.fromarray(plane) for plane in planes]
    if page.photometric == tiff_tags.CMYK:
        return Image.merge("CMYK", bands).convert("RGB")
    if page.photometric == tiff_tags.PALETTE:
        colours = np.array(page.numbers(tiff_tags.COLOR_MAP)).reshape(3, -1)
        # colour maps have 16 bits; some writers store 8
        colours = colours >> 8 if colours.max() > 255 else colours
        tables = np.zeros((3, 256), np.uint8)
        tables[:, : colours.shape[1]] = colours
        bands = [bands[0].point(table.tolist()) for table in tables]
    return bands[0] if len(bands) == 1 else Image.merge("RGB", bands)


def _planes(page: TiffPage, samples: list[int]) -> list[NDArray[np.uint8]]:
    """The samples with the given indices, scaled to 8 bits: uint8 [height, width] each; palette indices unchanged."""
    scaled = to_8_bits(page.bits[0])
    tables = dict.fromkeys(samples, scaled)
    if page.photometric == tiff_tags.PALETTE:
        tables[0] = np.arange(len(scaled), dtype=np.uint8)
    elif page.photometric == tiff_tags.WHITE_IS_ZERO:
        tables[0] = 255 - scaled
    if not page.is_planar:
        (rows,) = _decompressed_planes(page, [0], page.samples)
        return _scaled(page, rows, page.samples, tables)
    planes = _decompressed_planes(page, samples, 1)
    return [
        plane
        for rows, table in zip(planes, tables.values(), strict=True)
        for plane in _scaled(page, rows, 1, {0: table})
    ]


def _scaled(
    page: TiffPage, rows: NDArray[np.uint8], count: int, tables: dict[int, NDArray[np.uint8]]
) -> list[NDArray[np.uint8]]:
    """The samples that `tables` has a lookup table for: uint8 [height, width] each.

    `rows` are decompressed bytes, with `count` samples per pixel.
    """
    width = page.segments.width
    planes = {sample: np.empty((len(rows), width), np.uint8) for sample in tables}
    block = max(1, BLOCK // (width * count))
    is_predicted = page.number(tiff_tags.PREDICTOR, 1) == 2
    for top in range(0, len(rows), block):
        pixels = _to_samples(page, rows[top : top + block], width * count).reshape(-1, width, count)
        if is_predicted:  # stored as differences between neighbours
            pixels = np.cumsum(pixels, 1, dtype=pixels.dtype)
        for sample, plane in planes.items():
            plane[top : top + block] = tables[sample][pixels[..., sample]]
    return [_join_tiles(page, plane) if page.segments.is_tiled else plane for plane in planes.values()]


def _to_samples(page: TiffPage, rows: NDArray[np.uint8], count: int) -> NDArray[Any]:
    """Unpack rows of bytes to `count` samples each: uint8 or uint16 [rows, count]."""
    bits = page.bits[0]
    if bits == 8:
        return rows
    if bits == 16:
        return np.ascontiguousarray(rows).view("<u2" if page.data.startswith(b"II") else ">u2").astype(np.uint16)
    sample_bits = np.unpackbits(rows, axis=1, count=count * bits).reshape(len(rows), count, bits)
    return (sample_bits @ (1 << np.arange(bits)[::-1]).astype(np.uint16)).astype(np.uint16)


def _join_tiles(page: TiffPage, tiles: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """One plane, [height, width], of its tiles, which `tiles` has one below the other."""
    segments = page.segments
    grid = tiles.reshape(segments.down, segments.across, segments.height, segments.width).swapaxes(1, 2)
    whole = grid.reshape(segments.down * segments.height, segments.across * segments.width)
    return np.ascontiguousarray(whole[: page.height, : page.width])


def _decompressed_planes(page: TiffPage, planes: list[int], samples: int) -> Iterator[NDArray[np.uint8]]:
    """The decompressed bytes of the planes with the given indices: uint8 [rows, bytes per row].

    `samples` is the number of samples per pixel. Tiles come one below the other.
    """
    segments = page.segments
    row_bytes = (segments.width * samples * page.bits[0] + 7) // 8
    per_plane = segments.across * segments.down
    offsets, byte_counts = segments.offsets, segments.byte_counts
    if page.compression == tiff_tags.UNCOMPRESSED:  # some files state too many bytes, or none
        last = segments.height if segments.is_tiled else page.height - segments.height * (per_plane - 1)
        heights = (last if index % per_plane == per_plane - 1 else segments.height for index in range(len(offsets)))
        byte_counts = tuple(row_bytes * height for height in heights)
    needed = per_plane * (max(planes) + 1)
    if min(len(offsets), len(byte_counts)) < needed:
        raise ImageError("unreadable", f"a TIFF that lists {len(offsets)} strips or tiles instead of {needed}")
    if any(offset + size > len(page.data) for offset, size in zip(offsets, byte_counts, strict=False)):
        raise ImageError("truncated", "the file ends inside its pixels")
    slices = [slice(per_plane * plane, per_plane * (plane + 1)) for plane in planes]
    pages = [_tags_of_bytes(page, row_bytes, offsets[part], byte_counts[part]) for part in slices]
    return _decompress(page.data, pages)


def _tags_of_bytes(page: TiffPage, row_bytes: int, offsets: tuple[int, ...], byte_counts: tuple[int, ...]) -> Tags:
    """Tags that describe some segments of `page` as an 8-bit image with `row_bytes` bytes per row."""
    segments = page.segments
    samples = 1 if row_bytes % 3 else 3  # 3 if possible: Pillow limits the number of pixels
    return [
        (tiff_tags.WIDTH, (row_bytes // samples,)),
        (tiff_tags.HEIGHT, (len(offsets) * segments.height if segments.is_tiled else page.height,)),
        (tiff_tags.BITS, (8,) * samples),
        (tiff_tags.COMPRESSION, (page.compression,)),
        (tiff_tags.PHOTOMETRIC, (tiff_tags.BLACK_IS_ZERO if samples == 1 else tiff_tags.RGB,)),
        (tiff_tags.FILL_ORDER, (page.number(tiff_tags.FILL_ORDER, 1),)),
        (tiff_tags.STRIP_OFFSETS, offsets),
        (tiff_tags.SAMPLES, (samples,)),
        (tiff_tags.ROWS_PER_STRIP, (segments.height,)),
        (tiff_tags.STRIP_BYTES, byte_counts),
    ]


def _decompress(data: bytes, pages: list[Tags]) -> Iterator[NDArray[np.uint8]]:
    """Decompress `pages`, whose tags replace those of the file: uint8 [rows, bytes per row] each."""
    file = BytesIO()
    file.write(struct.pack("<2sHI", b"II", 42, len(data)) + data[8:])
    for tags in pages:
        values_start = file.tell() + 2 + 12 * len(tags) + 4  # where values are stored that do not fit into an entry
        entries, values = b"", b""
        for tag, numbers in tags:
            packed = struct.pack(f"<{len(numbers)}I", *numbers)
            value_or_offset = packed if len(packed) == 4 else struct.pack("<I", values_start + len(values))
            values += packed if len(packed) > 4 else b""
            entries += struct.pack("<HHI", tag, 4, len(numbers)) + value_or_offset
        next_page = values_start + len(values) if tags is not pages[-1] else 0
        file.write(struct.pack("<H", len(tags)) + entries + struct.pack("<I", next_page) + values)
    image = Image.open(file, formats=["TIFF"])
    for index in range(len(pages)):
        image.seek(index)
        yield np.asarray(image).reshape(image.height, -1)
