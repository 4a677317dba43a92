"""TIFF layouts that Pillow reads wrongly or not at all: odd depths, planes, WhiteIsZero in 16 bits, associated alpha.

libtiff still undoes the compression: it is handed each plane as an 8-bit image of the same bytes. What the bytes mean
(depth, byte order, predictor, planes, tiles) is worked out here.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from serving.errors import ImageError
from serving.samples import to_8_bits, with_alpha

SIGNATURES = (b"II*\0", b"MM\0*", b"II+\0")  # the last is BigTIFF
WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC, FILL_ORDER = 256, 257, 258, 259, 262, 266
STRIP_OFFSETS, SAMPLES, ROWS_PER_STRIP, STRIP_BYTES, PLANAR, PREDICTOR = 273, 277, 278, 279, 284, 317
COLOR_MAP, TILE_WIDTH, TILE_HEIGHT, TILE_OFFSETS, TILE_BYTES = 320, 322, 323, 324, 325
SUBFILE_TYPE, ORIENTATION, SUB_IFDS, INK_SET, EXTRA_SAMPLES, SAMPLE_FORMAT = 254, 274, 330, 332, 338, 339
YCBCR_SUBSAMPLING, XMP, DNG_VERSION = 530, 700, 50706

WHITE_IS_ZERO, BLACK_IS_ZERO, RGB, PALETTE, CMYK, YCBCR = 0, 1, 2, 3, 5, 6
COLOURS = {WHITE_IS_ZERO: 1, BLACK_IS_ZERO: 1, RGB: 3, PALETTE: 1, CMYK: 4}
OTHER_COLOURS = {4: "a transparency mask", YCBCR: "YCbCr", 8: "CIELab", 9: "ICCLab", 10: "ITULab", 32844: "LogL",
                 32845: "LogLuv", 32803: "a camera's raw samples", 34892: "a camera's raw samples"}  # fmt: skip
BYTEWISE = (1, 5, 8, 32773, 32946, 34925, 50000)  # none, LZW, deflate, PackBits, deflate, LZMA, Zstandard
PILLOWS = (2, 3, 4, 6, 7, 50001)  # compressions of images rather than bytes: CCITT, JPEG, WebP
PLAIN = {(WHITE_IS_ZERO, (1,)), (BLACK_IS_ZERO, (1,)), (WHITE_IS_ZERO, (8,)), (BLACK_IS_ZERO, (8,)), (RGB, (8, 8, 8))}
ASSOCIATED, UNASSOCIATED = (
    1,
    2,
)  # kinds of extra samples; 0 is none that matters here, Corel Draw writes 999 for the last
BLOCK = 2**20  # samples that are unpacked at a time


@dataclass(frozen=True)
class Segments:
    """The strips or tiles of an image: their size, where each begins in the file, how many bytes it has there, how many
    stand beside and below each other."""

    width: int
    height: int
    offsets: tuple[int, ...]
    counts: tuple[int, ...]
    tiled: bool
    across: int
    down: int


class Page:
    """The first page of a TIFF file, by its tags. The constructor raises whatever a broken header makes it."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.tags = ImageFileDirectory_v2(data[: 16 if data[2] == 43 else 8])
        file = BytesIO(data)
        file.seek(self.tags.next)
        self.tags.load(file)
        self.width, self.height = self._number(WIDTH, 0), self._number(HEIGHT, 0)
        self.compression = self._number(COMPRESSION, 1)
        # Pillow's default as well; the tag is not optional
        self.photometric = YCBCR if self.compression == 6 else self._number(PHOTOMETRIC, WHITE_IS_ZERO)
        self.samples = self._number(SAMPLES, 3 if self.compression == 6 else 1)
        bits = self._numbers(BITS) or (1,)
        self.bits = bits * self.samples if len(bits) == 1 and self.samples <= 64 else bits[: self.samples]
        if min(self.width, self.height, self.samples) < 1:
            raise ImageError("unreadable", "a TIFF without pixels")
        self.fill_order = self._number(FILL_ORDER, 1)
        self.is_planar = self._number(PLANAR, 1) == 2 and self.samples > 1

    def _numbers(self, tag: int, default: tuple[int, ...] = ()) -> tuple[int, ...]:
        value = self.tags.get(tag, default)
        value = value if isinstance(value, tuple) else (value,)
        if not all(isinstance(number, int) for number in value):
            raise ImageError("unreadable", f"TIFF tag {tag} is not a number")
        return value

    def _number(self, tag: int, default: int) -> int:
        return (self._numbers(tag) or (default,))[0]

    @property
    def is_for_pillow(self) -> bool:
        """Whether Pillow's pixels of such a page are right: the usual ones, and those of images' own compressions."""
        if self.compression in PILLOWS:
            return True
        if self.is_planar or self.fill_order != 1 or self._numbers(SAMPLE_FORMAT, (1,))[0] != 1:
            return False
        if self.photometric == YCBCR:  # of which libtiff makes RGB, but only when it has to uncompress
            return self.bits == (8, 8, 8) and (self.compression != 1 or self._numbers(YCBCR_SUBSAMPLING) == (1, 1))
        return (self.photometric, self.bits) in PLAIN

    @cached_property
    def unsupported(self) -> str | None:
        """Why nothing here gives this page's pixels; None where something does."""
        if DNG_VERSION in self.tags or self.data[8:10] == b"CR" or self._is_preview:
            return "a camera raw file; export it as JPEG or TIFF"
        formats = set(self._numbers(SAMPLE_FORMAT, (1,)))
        if not formats <= {1, 4}:
            kind = {2: "signed integers", 3: "floats"}.get(max(formats), "complex numbers")
            return f"a TIFF of {max(self.bits)}-bit {kind}, which have no defined range; save it with 8 or 16 bits"
        if self.compression in PILLOWS:
            return None
        if self.compression not in BYTEWISE:
            return f"a TIFF of compression {self.compression}; save it uncompressed or with LZW or deflate"
        if self.photometric not in COLOURS and not self.is_for_pillow:
            colours = OTHER_COLOURS.get(self.photometric, f"photometric interpretation {self.photometric}")
            return f"a TIFF of {colours}; save it as RGB or grey"
        if self.photometric == CMYK and self._number(INK_SET, 1) != 1:
            return "a TIFF of other inks than CMYK; save it as RGB"
        return self._unsupported_samples()

    @property
    def _is_preview(self) -> bool:
        """Whether this page is the preview of another one that is no page of its own, as cameras write it."""
        return bool(self._number(SUBFILE_TYPE, 0) & 1) and SUB_IFDS in self.tags

    def _unsupported_samples(self) -> str | None:
        if len(set(self.bits)) != 1 or not 1 <= self.bits[0] <= 16 or len(self.bits) != self.samples:
            return f"a TIFF of {', '.join(map(str, self.bits[:8]))} bits a sample; save it with 8 or 16"
        if self.photometric == PALETTE and self.bits[0] > 8:
            return f"a TIFF with a palette of {self.bits[0]} bits; save it as RGB"
        predictor = self._number(PREDICTOR, 1)
        if predictor not in (1, 2) or (predictor == 2 and self.bits[0] not in (8, 16) and not self.is_for_pillow):
            return f"a TIFF of {self.bits[0]} bits with predictor {predictor}; save it without a predictor"
        if ASSOCIATED in self._numbers(EXTRA_SAMPLES) and self.photometric not in (BLACK_IS_ZERO, RGB):
            return "a TIFF with associated alpha over inks, a palette or inverted grey; save it as RGB"
        return None

    @property
    def is_cut(self) -> bool:
        """Whether its pixels lie beyond the end of the file."""
        segments = self._segments
        return any(at + count > len(self.data) for at, count in zip(segments.offsets, segments.counts, strict=False))

    @cached_property
    def _segments(self) -> Segments:
        tiled = STRIP_OFFSETS not in self.tags
        width = self._number(TILE_WIDTH, 0) if tiled else self.width
        height = self._number(TILE_HEIGHT, 0) if tiled else min(self._number(ROWS_PER_STRIP, self.height), self.height)
        if min(width, height) < 1:
            raise ImageError("unreadable", f"a TIFF of strips or tiles of {width}x{height} pixels")
        offsets, counts = (TILE_OFFSETS, TILE_BYTES) if tiled else (STRIP_OFFSETS, STRIP_BYTES)
        across, down = -(-self.width // width), -(-self.height // height)
        return Segments(width, height, self._numbers(offsets), self._numbers(counts), tiled, across, down)

    @cached_property
    def _alpha(self) -> tuple[int, int] | None:
        """Which sample is the alpha, and of what kind; None without one."""
        colours = COLOURS[self.photometric]
        kinds = self._numbers(EXTRA_SAMPLES)
        if not kinds and self.photometric == RGB and self.samples == 4:
            return 3, UNASSOCIATED  # as Pillow takes it
        found = [(colours + index, kind) for index, kind in enumerate(kinds) if kind and colours + index < self.samples]
        return found[0] if found else None

    def read(self) -> Image.Image:
        """Mode L or RGB, LA or RGBA where there is alpha. Its orientation is in its EXIF or XMP, as Pillow has it."""
        colours = COLOURS[self.photometric]
        if self.samples < colours:
            raise ImageError("unreadable", f"a TIFF with {self.samples} of {colours} colours")
        planes = self._planes(colours + (self._alpha is not None))
        image = self._coloured(planes)
        if self._alpha:
            image = with_alpha(image, planes[-1], is_associated=self._alpha[1] == ASSOCIATED)
        if ORIENTATION in self.tags:
            image.getexif()[ORIENTATION] = self._number(ORIENTATION, 1)
        elif isinstance(xmp := self.tags.get(XMP), bytes):
            image.info["xmp"] = xmp
        return image

    def _coloured(self, planes: list[NDArray[np.uint8]]) -> Image.Image:
        if self.photometric in (RGB, CMYK):
            count = COLOURS[self.photometric]
            image = Image.merge("RGB" if count == 3 else "CMYK", [Image.fromarray(plane) for plane in planes[:count]])
            return image if count == 3 else image.convert("RGB")
        image = Image.fromarray(planes[0])
        if self.photometric != PALETTE:
            return image
        colours = np.array(self._numbers(COLOR_MAP)).reshape(3, -1)
        # some writers forget that these have 16 bits
        colours = colours >> 8 if colours.max() > 255 else colours
        tables = np.zeros((3, 256), np.uint8)
        tables[:, : colours.shape[1]] = colours
        return Image.merge("RGB", [image.point(table.tolist()) for table in tables])

    def _planes(self, count: int) -> list[NDArray[np.uint8]]:
        """Colours and alpha, `count` in all, scaled to 8 bits: uint8 [height, width] each; indices stay as they are."""
        scaled = to_8_bits(self.bits[0])
        tables = [scaled] * count
        if self.photometric == PALETTE:
            tables[0] = np.arange(len(scaled), dtype=np.uint8)
        elif self.photometric == WHITE_IS_ZERO:
            tables[0] = 255 - scaled
        samples = [*range(count)] if self._alpha is None else [*range(count - 1), self._alpha[0]]
        if not self.is_planar:
            (part,) = self._parts([0], self.samples)
            return self._scaled(part, self.samples, dict(zip(samples, tables, strict=True)))
        parts = self._parts(samples, 1)
        return [self._scaled(part, 1, {0: table})[0] for part, table in zip(parts, tables, strict=True)]

    def _parts(self, parts: list[int], samples: int) -> Iterator[NDArray[np.uint8]]:
        """The uncompressed bytes of `parts`, which hold `samples` each: uint8 [rows, bytes a row]. Tiles stand one
        below the other."""
        segments = self._segments
        row = (segments.width * samples * self.bits[0] + 7) // 8
        each = segments.across * segments.down
        if len(segments.offsets) < each * (max(parts) + 1) or len(segments.counts) < len(segments.offsets):
            raise ImageError("unreadable", f"a TIFF that lists {len(segments.offsets)} strips or tiles; it needs more")
        pages = [_as_bytes(self, row, segments, slice(each * part, each * (part + 1))) for part in parts]
        return _uncompressed(self.data, pages)

    def _scaled(
        self, part: NDArray[np.uint8], samples: int, tables: dict[int, NDArray[np.uint8]]
    ) -> list[NDArray[np.uint8]]:
        """The planes of `part` that `tables` names, uint8 [height, width] each."""
        segments = self._segments
        planes = {sample: np.empty((len(part), segments.width), np.uint8) for sample in tables}
        block = max(1, BLOCK // (segments.width * samples))
        for top in range(0, len(part), block):
            values = self._unpacked(part[top : top + block], segments.width * samples)
            pixels = values.reshape(len(values), segments.width, samples)
            if self._number(PREDICTOR, 1) == 2:
                pixels = np.cumsum(pixels, 1, dtype=pixels.dtype)
            for sample, plane in planes.items():
                plane[top : top + block] = tables[sample][pixels[..., sample]]
        return [self._joined(plane) if segments.tiled else plane for plane in planes.values()]

    def _unpacked(self, rows: NDArray[np.uint8], count: int) -> NDArray[Any]:
        """`count` samples a row, of 8 or 16 bits."""
        bits = self.bits[0]
        if bits == 8:
            return rows
        if bits == 16:
            return np.ascontiguousarray(rows).view("<u2" if self.data.startswith(b"II") else ">u2").astype(np.uint16)
        each = np.unpackbits(rows, axis=1, count=count * bits).reshape(len(rows), count, bits)
        return (each @ (1 << np.arange(bits)[::-1]).astype(np.uint16)).astype(np.uint16)

    def _joined(self, tiles: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """One plane of tiles that stand one below the other."""
        segments = self._segments
        grid = tiles.reshape(segments.down, segments.across, segments.height, segments.width).swapaxes(1, 2)
        whole = grid.reshape(segments.down * segments.height, segments.across * segments.width)
        return np.ascontiguousarray(whole[: self.height, : self.width])


def _as_bytes(page: Page, row: int, segments: Segments, part: slice) -> list[tuple[int, tuple[int, ...]]]:
    """Tags that make one part of `page` an image of 8 bits, of `row` bytes a row."""
    rows = segments.across * segments.down * segments.height if segments.tiled else page.height
    samples = 1 if row % 3 else 3  # the limit on pixels is Pillow's, so the fewer the better
    return [
        (WIDTH, (row // samples,)),
        (HEIGHT, (rows,)),
        (BITS, (8,) * samples),
        (COMPRESSION, (page.compression,)),
        (PHOTOMETRIC, (BLACK_IS_ZERO if samples == 1 else RGB,)),
        (FILL_ORDER, (page.fill_order,)),
        (STRIP_OFFSETS, segments.offsets[part]),
        (SAMPLES, (samples,)),
        (ROWS_PER_STRIP, (segments.height,)),
        (STRIP_BYTES, segments.counts[part]),
    ]


def _uncompressed(data: bytes, pages: list[list[tuple[int, tuple[int, ...]]]]) -> Iterator[NDArray[np.uint8]]:
    """The bytes of `pages`, whose tags replace those of the file: uint8 [rows, bytes a row]."""
    file = BytesIO()
    file.write(struct.pack("<2sHI", b"II", 42, len(data)) + data[8:])
    for tags in pages:
        values = file.tell() + 2 + 12 * len(tags) + 4
        entries, outside = b"", b""
        for tag, numbers in tags:
            packed = struct.pack(f"<{len(numbers)}I", *numbers)
            place = packed if len(packed) == 4 else struct.pack("<I", values + len(outside))
            outside += packed if len(packed) > 4 else b""
            entries += struct.pack("<HHI", tag, 4, len(numbers)) + place
        following = values + len(outside) if tags is not pages[-1] else 0
        file.write(struct.pack("<H", len(tags)) + entries + struct.pack("<I", following) + outside)
    image = Image.open(file, formats=["TIFF"])
    for index in range(len(pages)):
        image.seek(index)
        yield np.asarray(image).reshape(image.height, -1)


def first_page(data: bytes) -> Page | None:
    """None where its tags cannot be read."""
    try:
        return Page(data)
    except Exception:  # whatever a malformed file makes Pillow stumble over
        return None
