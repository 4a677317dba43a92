"""Decodes image files and resizes, crops or pads them: `decode` is the ONLY function that turns a file into pixels (and
`decode_with_size`, which it calls).

Both `pipeline preprocess` and serving call it, so that training and serving cannot differ. In order: open and verify;
apply the orientation of EXIF or XMP; scale 16 bits to 8; composite alpha on white; convert palettes, 1-bit, CMYK and
the like to grey or RGB; resize the shorter side with an antialiasing filter and crop the centre (or as the spec says).
Of an animation, the first frame is decoded. Colour profiles and gamma are ignored.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from convline.decoders.supported_formats import MAX_PIXELS, as_image_error, load_pixels, open_image
from convline.errors import ConvlineError, ImageError
from convline.time_limit import time_limited

MAX_BYTES = 512 * 2**20
ORIENTATION = 0x112  # the EXIF tag
XMP_ORIENTATION = re.compile(rb"""tiff:Orientation\s*(?:=\s*["']|>)\s*([1-8])\b""")
TRANSPOSE_OF_ORIENTATION = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# a JPEG decoded at reduced size stays at least this many times as large as what it is resized to: with 2 instead of 3,
# the pixels of photographs change by 1.8 of 255 on average
MIN_REDUCED_RATIO = 3

Fit = Literal["crop", "stretch", "pad"]
Resample = Literal["box", "bilinear", "bicubic", "lanczos"]


@dataclass(frozen=True)
class ImageSpec:
    """How image files are decoded and resized. Stored in `meta.json` and in the metadata of the ONNX file.

    `height`, `width`: in pixels; None keeps the size as stored.
    `channels`: 1 (grey) or 3 (RGB).
    `fit`: "crop" resizes until the image covers height x width (or its shorter side to `resize`, as torchvision's
        Resize), then crops the centre, with black borders if the image is smaller; "stretch" ignores the aspect ratio;
        "pad" resizes until the image fits inside and centres it on black, as Pillow's ImageOps.pad.
    `resample`: Pillow's name of the (antialiasing) filter.
    `version`: 2 truncates the resized side and rounds the crop offset, as torchvision; 1 rounds the side and truncates
        the offset.
    `jpeg`: "reduced" lets the JPEG decoder scale down to a half, a quarter or an eighth, as long as the result is at
        least three times as large as what it is resized to; two to six times as fast.

    Raises ConvlineError for values that this version of convline does not support.
    """

    height: int | None
    width: int | None
    channels: int
    fit: Fit = "crop"
    resample: Resample = "bilinear"
    version: int = 2
    jpeg: Literal["full", "reduced"] = "full"
    resize: int | None = None

    def __post_init__(self) -> None:
        if not _is_size(self.height, self.width):
            raise ConvlineError(f"{self.height}x{self.width} is not a valid image size")
        is_known = self.version in (1, 2) and self.channels in (1, 3) and self.jpeg in ("full", "reduced")
        if not is_known or self.fit not in get_args(Fit) or self.resample not in get_args(Resample):
            raise ConvlineError(
                f"unknown image decoding spec {asdict(self)}; a newer version of convline may support it"
            )
        if self.version == 1 and (self.fit == "pad" or self.resize is not None):
            raise ConvlineError("an image decoding spec of version 1 supports neither fit=pad nor resize")
        if self.resize is None:
            return
        if self.fit != "crop" or self.height is None:
            raise ConvlineError(
                f"resize {self.resize} is the shorter side before a centre crop; it needs height, width and fit=crop"
            )
        if not _is_size(self.resize, self.resize):
            raise ConvlineError(f"{self.resize} is not a valid size for resize")

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> ImageSpec:
        """Raises ConvlineError for a spec that this version of convline would decode differently."""
        try:
            return cls(**{"version": 1, **fields})
        except TypeError as error:
            raise ConvlineError(
                f"unknown image decoding spec {fields}; a newer version of convline may support it"
            ) from error

    def to_dict(self) -> dict[str, Any]:
        fields = asdict(self)
        for field, default in (("jpeg", "full"), ("resize", None)):
            if fields[field] == default:  # omitted, as in files that are older than the field
                del fields[field]
        return fields


def _is_size(height: int | None, width: int | None) -> bool:
    """Whether an image can have this size; both None (the size as stored) are valid."""
    if height is None or width is None:
        return height is width
    return type(height) is type(width) is int and min(height, width) > 0 and height * width <= MAX_PIXELS


def decode(data: bytes, spec: ImageSpec) -> NDArray[np.uint8]:
    """Decode an image file: uint8 [height, width, channels].

    Raises ImageError, and no other exception, for data that cannot be used.
    """
    return decode_with_size(data, spec)[0]


@time_limited()
def decode_with_size(data: bytes, spec: ImageSpec) -> tuple[NDArray[np.uint8], tuple[int, int]]:
    """As `decode`; also the (height, width) that the upright image had before it was resized."""
    if not data:
        raise ImageError("empty", "the file has no bytes")
    if len(data) > MAX_BYTES:
        raise ImageError("too-large", f"{len(data)} bytes; the limit is {MAX_BYTES}")
    try:
        image = open_image(data)
        full_size = _reduce_jpeg(image, spec) if spec.jpeg == "reduced" else None
        image = _convert(_upright(load_pixels(image, data)), spec.channels)
        width, height = full_size or image.size
        image = _fit(image, spec, (width, height))
        pixels = np.asarray(image, dtype=np.uint8).reshape(image.height, image.width, spec.channels)
        return pixels, (height, width)
    # for malformed files Pillow raises exceptions of many kinds
    except Exception as error:
        raise as_image_error(error, data) from error


def _reduce_jpeg(image: Image.Image, spec: ImageSpec) -> tuple[int, int] | None:
    """Let the JPEG decoder scale down, if possible.

    Returns the (width, height) that the upright image would have had; None for other formats, or without a target size.
    """
    if image.format not in ("JPEG", "MPO") or spec.height is None:
        return None
    is_rotated = _orientation(image) >= 5
    full_size = image.size[::-1] if is_rotated else image.size
    target = _resized_size(full_size, spec)
    height, width = (MIN_REDUCED_RATIO * side for side in (target if is_rotated else target[::-1]))
    image.draft(None, (width, height))
    return full_size


def _upright(image: Image.Image) -> Image.Image:
    transpose = TRANSPOSE_OF_ORIENTATION.get(_orientation(image))
    return image if transpose is None else image.transpose(transpose)


def _orientation(image: Image.Image) -> int:
    """The orientation by EXIF, else by XMP: 1 (upright) to 8; from 5 on, width and height are swapped.

    Unreadable EXIF is ignored, as image viewers do.
    """
    try:
        orientation = image.getexif().get(ORIENTATION)
    except Exception:
        orientation = None
    xmp = image.info.get("xmp")
    if orientation is None and isinstance(xmp, bytes) and (match := XMP_ORIENTATION.search(xmp)):
        orientation = int(match[1])
    return orientation if isinstance(orientation, int) else 1


def _convert(image: Image.Image, channels: int) -> Image.Image:
    """Convert to 8-bit grey or RGB; transparent pixels become white."""
    if image.mode.startswith("I"):
        image = _from_16_bit(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image).convert("RGB")
    mode = "L" if channels == 1 else "RGB"
    return image if image.mode == mode else image.convert(mode)  # it would copy the pixels even if the mode is the same


def _from_16_bit(image: Image.Image) -> Image.Image:
    """round(v / 257): 65535 becomes 255."""
    values = np.asarray(image).astype(np.int64)
    if isinstance(transparent := image.info.get("transparency"), int):
        values[values == transparent] = 65535
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))


def _fit(image: Image.Image, spec: ImageSpec, full_size: tuple[int, int]) -> Image.Image:
    """Resize and crop or pad by `spec`; `full_size` (width, height) is the size before the JPEG decoder scaled down."""
    if spec.height is None or spec.width is None:
        return image
    size = _resized_size(full_size, spec)
    if image.size != size:
        image = image.resize(size, Image.Resampling[spec.resample.upper()])
    left, top = (_crop_offset(side, target, spec) for side, target in zip(size, (spec.width, spec.height), strict=True))
    # where a crop reaches beyond the image, Pillow fills with black
    return image if size == (spec.width, spec.height) else image.crop((left, top, left + spec.width, top + spec.height))


def _resized_size(size: tuple[int, int], spec: ImageSpec) -> tuple[int, int]:
    """The (width, height) that an image of `size` is resized to, before it is cropped or padded."""
    assert spec.width is not None and spec.height is not None
    if spec.fit == "stretch":
        return spec.width, spec.height
    if spec.fit == "pad":
        width, height = contained_size(size, (spec.width, spec.height))
    elif spec.version == 1:
        scale = max(spec.width / size[0], spec.height / size[1])
        width, height = max(spec.width, round(size[0] * scale)), max(spec.height, round(size[1] * scale))
    else:
        width, height = _covering_size(size, (spec.resize or spec.width, spec.resize or spec.height))
    if width * height > MAX_PIXELS:  # as for a very wide image that is one pixel high
        raise ImageError("too-large", f"{size[0]}x{size[1]} would be resized to {width}x{height}")
    return width, height


def _covering_size(size: tuple[int, int], target: tuple[int, int]) -> tuple[int, int]:
    """One side as in `target`, the other truncated and at least as in `target`; as torchvision's Resize for squares."""
    if target[0] * size[1] >= target[1] * size[0]:
        return target[0], int(target[0] * size[1] / size[0])
    return int(target[1] * size[0] / size[1]), target[1]


def contained_size(size: tuple[int, int], target: tuple[int, int]) -> tuple[int, int]:
    """One side as in `target`, the other rounded and at most as in `target`, as Pillow's ImageOps.contain."""
    if size[0] * target[1] >= size[1] * target[0]:
        return target[0], max(1, round(size[1] / size[0] * target[0]))
    return max(1, round(size[0] / size[1] * target[1])), target[1]


def _crop_offset(side: int, target: int, spec: ImageSpec) -> int:
    """Where the central `target` pixels of a side begin; negative if the side has fewer pixels."""
    if spec.version == 1:
        return (side - target) // 2
    if spec.fit == "crop" and side < target:
        return -((target - side) // 2)
    return round((side - target) / 2)  # halves to even, as torchvision's CenterCrop and Pillow's ImageOps.pad


def fit_pixels(image: Image.Image, spec: ImageSpec) -> NDArray[np.uint8]:
    """Like `decode`, for an image that Pillow has decoded already: uint8 [height, width, channels].

    Raises ImageError, and no other exception, for an image that cannot be used.
    """
    if image.width * image.height > MAX_PIXELS:
        raise ImageError("too-large", f"{image.width}x{image.height}; the limit is {MAX_PIXELS} pixels")
    if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")):
        raise ImageError("unsupported", "32-bit pixels have no defined range")
    try:
        image = _convert(_upright(image), spec.channels)
        image = _fit(image, spec, image.size)
        return np.asarray(image, dtype=np.uint8).reshape(image.height, image.width, spec.channels)
    except ImageError:
        raise
    # for images of rare modes Pillow raises exceptions of many kinds
    except Exception as error:
        raise ImageError("unsupported", f"{image.mode}: {error or type(error).__name__}") from error
