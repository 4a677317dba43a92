"""The pixels of TIFF pages of any depth, order of bytes, samples, planes and tiles.

libtiff still undoes the compression: it is handed each plane as an 8-bit image of the same bytes. What the bytes mean
is worked out here.
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
from convline.decoders.sample_depth import to_8_bits, with_alpha
from convline.decoders.tiff_tags import Page
from convline.errors import ImageError

BLOCK = 2**20  # samples that are unpacked at a time
Tags = list[tuple[int, tuple[int, ...]]]


def read(page: Page) -> Image.Image:
    """Mode L or RGB, LA or RGBA where there is alpha. Its orientation is in its EXIF or XMP, as Pillow has it.

    Raises ImageError, and what Pillow raises of damaged data.
    """
    colours, alpha = tiff_tags.COLOURS[page.photometric], _alpha(page)
    if page.samples < colours:
        raise ImageError("unreadable", f"a TIFF with {page.samples} of {colours} colours")
    planes = _planes(page, [*range(colours)] if alpha is None else [*range(colours), alpha[0]])
    image = _coloured(page, planes[:colours])
    if alpha:
        image = with_alpha(image, planes[colours], is_associated=alpha[1] == tiff_tags.ASSOCIATED)
    if tiff_tags.ORIENTATION in page.tags:
        image.getexif()[tiff_tags.ORIENTATION] = page.number(tiff_tags.ORIENTATION, 1)
    elif xmp := page.tags.get(tiff_tags.XMP):
        image.info["xmp"] = xmp[0] if isinstance(xmp, tuple) else xmp
    return image


def _alpha(page: Page) -> tuple[int, int] | None:
    """Which sample is the alpha, and of what kind; None without one."""
    colours, kinds = tiff_tags.COLOURS[page.photometric], page.numbers(tiff_tags.EXTRA_SAMPLES)
    if not kinds and page.photometric == tiff_tags.RGB and page.samples == 4:
        return 3, tiff_tags.UNASSOCIATED  # as Pillow takes it
    return next(((at, kind) for at, kind in enumerate(kinds, colours) if kind and at < page.samples), None)


def _coloured(page: Page, planes: list[NDArray[np.uint8]]) -> Image.Image:
    """Mode L or RGB."""
    bands = [Image.fromarray(plane) for plane in planes]
    if page.photometric == tiff_tags.CMYK:
        return Image.merge("CMYK", bands).convert("RGB")
    if page.photometric == tiff_tags.PALETTE:
        colours = np.array(page.numbers(tiff_tags.COLOR_MAP)).reshape(3, -1)
        # they have 16 bits, which some writers forget
        colours = colours >> 8 if colours.max() > 255 else colours
        tables = np.zeros((3, 256), np.uint8)
        tables[:, : colours.shape[1]] = colours
        bands = [bands[0].point(table.tolist()) for table in tables]
    return bands[0] if len(bands) == 1 else Image.merge("RGB", bands)


def _planes(page: Page, samples: list[int]) -> list[NDArray[np.uint8]]:
    """`samples` of each pixel, scaled to 8 bits: uint8 [height, width] each; indices into a palette as they are."""
    scaled = to_8_bits(page.bits[0])
    tables = dict.fromkeys(samples, scaled)
    if page.photometric == tiff_tags.PALETTE:
        tables[0] = np.arange(len(scaled), dtype=np.uint8)
    elif page.photometric == tiff_tags.WHITE_IS_ZERO:
        tables[0] = 255 - scaled
    if not page.is_planar:
        (part,) = _parts(page, [0], page.samples)
        return _scaled(page, part, page.samples, tables)
    parts = _parts(page, samples, 1)
    return [
        plane
        for part, table in zip(parts, tables.values(), strict=True)
        for plane in _scaled(page, part, 1, {0: table})
    ]


def _scaled(
    page: Page, part: NDArray[np.uint8], count: int, tables: dict[int, NDArray[np.uint8]]
) -> list[NDArray[np.uint8]]:
    """The samples that `tables` names of the `count` a pixel that are in `part`: uint8 [height, width] each."""
    width = page.segments.width
    planes = {sample: np.empty((len(part), width), np.uint8) for sample in tables}
    block = max(1, BLOCK // (width * count))
    is_predicted = page.number(tiff_tags.PREDICTOR, 1) == 2
    for top in range(0, len(part), block):
        pixels = _unpacked(page, part[top : top + block], width * count).reshape(-1, width, count)
        if is_predicted:  # each was stored as the difference from its neighbour
            pixels = np.cumsum(pixels, 1, dtype=pixels.dtype)
        for sample, plane in planes.items():
            plane[top : top + block] = tables[sample][pixels[..., sample]]
    return [_joined(page, plane) if page.segments.tiled else plane for plane in planes.values()]


def _unpacked(page: Page, rows: NDArray[np.uint8], count: int) -> NDArray[Any]:
    """`count` samples a row, of 8 or 16 bits."""
    bits = page.bits[0]
    if bits == 8:
        return rows
    if bits == 16:
        return np.ascontiguousarray(rows).view("<u2" if page.data.startswith(b"II") else ">u2").astype(np.uint16)
    each = np.unpackbits(rows, axis=1, count=count * bits).reshape(len(rows), count, bits)
    return (each @ (1 << np.arange(bits)[::-1]).astype(np.uint16)).astype(np.uint16)


def _joined(page: Page, tiles: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """One plane of tiles that stand one below the other."""
    segments = page.segments
    grid = tiles.reshape(segments.down, segments.across, segments.height, segments.width).swapaxes(1, 2)
    whole = grid.reshape(segments.down * segments.height, segments.across * segments.width)
    return np.ascontiguousarray(whole[: page.height, : page.width])


def _parts(page: Page, parts: list[int], samples: int) -> Iterator[NDArray[np.uint8]]:
    """The uncompressed bytes of `parts` of the file, which hold `samples` a pixel: uint8 [rows, bytes a row]. Tiles
    stand one below the other."""
    segments = page.segments
    row = (segments.width * samples * page.bits[0] + 7) // 8
    each = segments.across * segments.down
    offsets, counts = segments.offsets, segments.counts
    if page.compression == tiff_tags.UNCOMPRESSED:  # files say more now and then, or nothing
        last = segments.height if segments.tiled else page.height - segments.height * (each - 1)
        counts = tuple(row * (last if index % each == each - 1 else segments.height) for index in range(len(offsets)))
    if min(len(offsets), len(counts)) < each * (max(parts) + 1):
        raise ImageError("unreadable", f"a TIFF that lists {len(offsets)} strips or tiles; it needs more")
    if any(at + count > len(page.data) for at, count in zip(offsets, counts, strict=False)):
        raise ImageError("truncated", "the file ends inside its pixels")
    pages = [
        _as_bytes(page, row, offsets[each * part : each * (part + 1)], counts[each * part : each * (part + 1)])
        for part in parts
    ]
    return _uncompressed(page.data, pages)


def _as_bytes(page: Page, row: int, offsets: tuple[int, ...], counts: tuple[int, ...]) -> Tags:
    """Tags that make some segments of `page` an image of 8 bits, of `row` bytes a row."""
    segments = page.segments
    samples = 1 if row % 3 else 3  # the limit on pixels is Pillow's, so the fewer the better
    return [
        (tiff_tags.WIDTH, (row // samples,)),
        (tiff_tags.HEIGHT, (len(offsets) * segments.height if segments.tiled else page.height,)),
        (tiff_tags.BITS, (8,) * samples),
        (tiff_tags.COMPRESSION, (page.compression,)),
        (tiff_tags.PHOTOMETRIC, (tiff_tags.BLACK_IS_ZERO if samples == 1 else tiff_tags.RGB,)),
        (tiff_tags.FILL_ORDER, (page.number(tiff_tags.FILL_ORDER, 1),)),
        (tiff_tags.STRIP_OFFSETS, offsets),
        (tiff_tags.SAMPLES, (samples,)),
        (tiff_tags.ROWS_PER_STRIP, (segments.height,)),
        (tiff_tags.STRIP_BYTES, counts),
    ]


def _uncompressed(data: bytes, pages: list[Tags]) -> Iterator[NDArray[np.uint8]]:
    """The bytes of `pages`, whose tags replace those of the file: uint8 [rows, bytes a row]."""
    file = BytesIO()
    file.write(struct.pack("<2sHI", b"II", 42, len(data)) + data[8:])
    for tags in pages:
        begin = file.tell() + 2 + 12 * len(tags) + 4  # of values that do not fit into their entries
        entries, values = b"", b""
        for tag, numbers in tags:
            packed = struct.pack(f"<{len(numbers)}I", *numbers)
            place = packed if len(packed) == 4 else struct.pack("<I", begin + len(values))
            values += packed if len(packed) > 4 else b""
            entries += struct.pack("<HHI", tag, 4, len(numbers)) + place
        following = begin + len(values) if tags is not pages[-1] else 0
        file.write(struct.pack("<H", len(tags)) + entries + struct.pack("<I", following) + values)
    image = Image.open(file, formats=["TIFF"])
    for index in range(len(pages)):
        image.seek(index)
        yield np.asarray(image).reshape(image.height, -1)
