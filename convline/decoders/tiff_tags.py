"""TIFF tags: parses the first page's tags and decides whether Pillow, `tiff_pixels` or no decoder can read it."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO

from PIL.TiffImagePlugin import ImageFileDirectory_v2

from convline.errors import ImageError

SIGNATURES = (b"II*\0", b"MM\0*", b"II+\0")  # little-endian, big-endian, BigTIFF
SUBFILE_TYPE, WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC, FILL_ORDER = 254, 256, 257, 258, 259, 262, 266
STRIP_OFFSETS, ORIENTATION, SAMPLES, ROWS_PER_STRIP, STRIP_BYTES, PLANAR, PREDICTOR = 273, 274, 277, 278, 279, 284, 317
COLOR_MAP, TILE_WIDTH, TILE_HEIGHT, TILE_OFFSETS, TILE_BYTES, SUB_IFDS, INK_SET = 320, 322, 323, 324, 325, 330, 332
EXTRA_SAMPLES, SAMPLE_FORMAT, YCBCR_SUBSAMPLING, XMP, DNG_VERSION = 338, 339, 530, 700, 50706
VALUE_SIZES = (0, 1, 1, 2, 4, 8, 1, 1, 2, 4, 8, 4, 8, 4, 0, 0, 8, 8, 8)  # bytes of a value of each field type

WHITE_IS_ZERO, BLACK_IS_ZERO, RGB, PALETTE, CMYK, YCBCR = 0, 1, 2, 3, 5, 6
COLOUR_COUNTS = {WHITE_IS_ZERO: 1, BLACK_IS_ZERO: 1, RGB: 3, PALETTE: 1, CMYK: 4}
UNSUPPORTED_COLOURS = {
    4: "a transparency mask",
    YCBCR: "YCbCr",
    8: "CIELab",
    9: "ICCLab",
    10: "ITULab",
    32844: "LogL",
    32845: "LogLuv",
    32803: "a camera's raw samples",
    34892: "a camera's raw samples",
}
UNCOMPRESSED, OLD_JPEG = 1, 6
# compressions of any bytes: LZW, deflate, PackBits, LZMA, Zstandard
BYTE_COMPRESSIONS = (UNCOMPRESSED, 5, 8, 32773, 32946, 34925, 50000)
IMAGE_COMPRESSIONS = (2, 3, 4, OLD_JPEG, 7)  # CCITT and JPEG, which only Pillow decodes
# (photometric interpretation, bits per sample) that Pillow decodes correctly
PILLOW_LAYOUTS = {
    (WHITE_IS_ZERO, (1,)),
    (BLACK_IS_ZERO, (1,)),
    (WHITE_IS_ZERO, (8,)),
    (BLACK_IS_ZERO, (8,)),
    (RGB, (8, 8, 8)),
}
# kinds of alpha: premultiplied or not. Other values: 0 is an extra sample that is no alpha; Corel Draw writes 999 for 2
ASSOCIATED, UNASSOCIATED = 1, 2


@dataclass(frozen=True)
class TiffSegments:
    """The strips or tiles of a page.

    `width`, `height`: of one, in pixels; `offsets`: where each begins in the file; `byte_counts`: their sizes there;
    `across`, `down`: their number per row and per column.
    """

    width: int
    height: int
    offsets: tuple[int, ...]
    byte_counts: tuple[int, ...]
    is_tiled: bool
    across: int
    down: int


class TiffPage:
    """The first page of a TIFF file, by its tags.

    For a broken header the constructor raises exceptions of many kinds.
    """

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.tags = ImageFileDirectory_v2(data[: 16 if data[2] == 43 else 8])
        file = BytesIO(data)
        file.seek(self.tags.next)
        self.tags.load(file)
        self.width, self.height = self.number(WIDTH, 0), self.number(HEIGHT, 0)
        self.compression = self.number(COMPRESSION, UNCOMPRESSED)
        # the tag is required; without it, Pillow assumes the same
        self.photometric = YCBCR if self.compression == OLD_JPEG else self.number(PHOTOMETRIC, WHITE_IS_ZERO)
        self.samples = self.number(SAMPLES, 3 if self.compression == OLD_JPEG else 1)
        if min(self.width, self.height, self.samples) < 1:
            raise ImageError("unreadable", "a TIFF without pixels")
        bits = self.numbers(BITS) or (1,)
        self.bits = bits * self.samples if len(bits) == 1 and self.samples <= 64 else bits[: self.samples]
        self.is_planar = self.number(PLANAR, 1) == 2 and self.samples > 1

    def numbers(self, tag: int) -> tuple[int, ...]:
        """The values of a tag; empty if it is missing."""
        value = self.tags.get(tag, ())
        value = value if isinstance(value, tuple) else (value,)
        if not all(isinstance(number, int) for number in value):
            raise ImageError("unreadable", f"TIFF tag {tag} is not a number")
        return value

    def number(self, tag: int, default: int) -> int:
        return (self.numbers(tag) or (default,))[0]

    @property
    def sample_formats(self) -> set[int]:
        """1 for unsigned integers, 2 signed, 3 floats; 4 is undefined, and read as unsigned."""
        return set(self.numbers(SAMPLE_FORMAT)) or {1}

    @property
    def is_for_pillow(self) -> bool:
        """Whether Pillow decodes this page correctly: the usual layouts, and CCITT and JPEG compression."""
        if self.compression in IMAGE_COMPRESSIONS:
            return True
        if self.is_planar or self.number(FILL_ORDER, 1) != 1 or self.sample_formats != {1}:
            return False
        if self.photometric == YCBCR:  # libtiff converts it to RGB, but only if it is compressed
            is_not_subsampled = self.numbers(YCBCR_SUBSAMPLING) == (1, 1)
            return self.bits == (8, 8, 8) and (self.compression in BYTE_COMPRESSIONS[1:] or is_not_subsampled)
        return self.compression in BYTE_COMPRESSIONS and (self.photometric, self.bits) in PILLOW_LAYOUTS

    @cached_property
    def unsupported(self) -> str | None:
        """What about this page is not supported, with advice; None if it can be decoded."""
        if DNG_VERSION in self.tags or self._is_preview:
            return "a camera raw file; export it as JPEG or TIFF"
        if not self.sample_formats <= {1, 4}:
            kind = {2: "signed integers", 3: "floats"}.get(max(self.sample_formats), "complex numbers")
            return f"a TIFF of {max(self.bits)}-bit {kind}, which have no defined range; save it with 8 or 16 bits"
        if self.compression in IMAGE_COMPRESSIONS:
            return None
        if self.compression not in BYTE_COMPRESSIONS:
            return f"a TIFF of compression {self.compression}; save it uncompressed or with LZW or deflate"
        if self.photometric not in COLOUR_COUNTS and not self.is_for_pillow:
            colours = UNSUPPORTED_COLOURS.get(self.photometric, f"photometric interpretation {self.photometric}")
            return f"a TIFF of {colours}; save it as RGB or grey"
        if self.photometric == CMYK and self.number(INK_SET, 1) != 1:
            return "a TIFF whose inks are not CMYK; save it as RGB"
        return self._unsupported_samples()

    @property
    def _is_preview(self) -> bool:
        """Whether this page is a preview of the real image, as in camera raw files."""
        is_canon = self.data[8:12] == b"CR\2\0" and self.compression == OLD_JPEG
        return is_canon or (bool(self.number(SUBFILE_TYPE, 0) & 1) and SUB_IFDS in self.tags)

    def _unsupported_samples(self) -> str | None:
        if len(set(self.bits)) != 1 or not 1 <= self.bits[0] <= 16 or len(self.bits) != self.samples:
            depths = " and ".join(map(str, sorted(set(self.bits))))
            return f"a TIFF of {self.samples} samples of {depths} bits; save it with 8 or 16 bits"
        if self.photometric == PALETTE and self.bits[0] > 8:
            return f"a TIFF with a palette of {self.bits[0]} bits; save it as RGB"
        predictor = self.number(PREDICTOR, 1)
        if predictor not in (1, 2) or (predictor == 2 and self.bits[0] not in (8, 16)):
            return f"a TIFF of {self.bits[0]} bits with predictor {predictor}; save it without a predictor"
        if ASSOCIATED in self.numbers(EXTRA_SAMPLES) and self.photometric not in (BLACK_IS_ZERO, RGB):
            return "a TIFF with associated alpha over inks, a palette or inverted grey; save it as RGB"
        return None

    @cached_property
    def segments(self) -> TiffSegments:
        """Raises ImageError if their size is not valid."""
        is_tiled = STRIP_OFFSETS not in self.tags
        width = self.number(TILE_WIDTH, 0) if is_tiled else self.width
        height = self.number(TILE_HEIGHT, 0) if is_tiled else min(self.number(ROWS_PER_STRIP, self.height), self.height)
        if min(width, height) < 1:
            raise ImageError("unreadable", f"a TIFF of strips or tiles of {width}x{height} pixels")
        offsets, byte_counts = (TILE_OFFSETS, TILE_BYTES) if is_tiled else (STRIP_OFFSETS, STRIP_BYTES)
        across, down = -(-self.width // width), -(-self.height // height)
        return TiffSegments(width, height, self.numbers(offsets), self.numbers(byte_counts), is_tiled, across, down)


def first_page(data: bytes) -> TiffPage | None:
    """The first page; None if its tags cannot be read."""
    try:
        return TiffPage(data)
    except Exception:  # for malformed files Pillow raises exceptions of many kinds
        return None


def is_truncated(data: bytes) -> bool:
    """Whether tags or pixels of the first page lie beyond the end of the file."""
    order, is_big = "<" if data.startswith(b"II") else ">", data[2] == 43
    entry = f"{order}HHQQ" if is_big else f"{order}HHII"
    try:
        start = struct.unpack_from(f"{order}Q" if is_big else f"{order}I", data, 8 if is_big else 4)[0]
        (count,) = struct.unpack_from(f"{order}Q" if is_big else f"{order}H", data, start)
        for number in range(count):
            tag = struct.unpack_from(entry, data, start + (8 if is_big else 2) + number * struct.calcsize(entry))
            length = tag[2] * (VALUE_SIZES[tag[1]] if tag[1] < len(VALUE_SIZES) else 0)
            if length > (8 if is_big else 4) and tag[3] + length > len(data):
                return True
        segments = TiffPage(data).segments
    except struct.error:  # beyond the end
        return True
    except Exception:  # damaged in another way
        return False
    return any(offset + size > len(data) for offset, size in zip(segments.offsets, segments.byte_counts, strict=False))
