"""THE one way a file becomes pixels. Preparing a dataset and serving a model both call `decode`.

In order: open and verify; orientation by EXIF or XMP; 16 bits scaled to 8; alpha composited on white; palette,
1-bit, CMYK and the like converted; to grey or RGB; shorter side resized with an antialiasing filter, then
centre-cropped (or as the spec says). Animations give their first frame. Colour profiles and gamma are ignored.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from convline.decoders.formats import MAX_PIXELS, load, open_image, refusal
from convline.errors import ConvlineError, ImageError
from convline.time_limit import time_limited

MAX_BYTES = 512 * 2**20
ORIENTATION = 0x112  # EXIF's tag
XMP_ORIENTATION = re.compile(rb"""tiff:Orientation\s*(?:=\s*["']|>)\s*([1-8])\b""")
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
REDUCED = 3  # times the size that is resized to: with 2, a pixel of a photograph moved by 1.8 of 255 on average

Fit = Literal["crop", "stretch", "pad"]
Resample = Literal["box", "bilinear", "bicubic", "lanczos"]


@dataclass(frozen=True)
class ImageSpec:
    """How files become pixels. It travels in `meta.json` and in the ONNX file.

    `height` and `width` in pixels, None for the size as stored; `channels` 1 (grey) or 3 (RGB);
    `fit`: "crop" resizes until the image covers height x width (or its shorter side to `resize`, as torchvision's
    Resize), then crops the centre, on black where it is smaller; "stretch" ignores the aspect ratio; "pad" resizes
    until the image fits inside and centres it on black, as Pillow's ImageOps.pad;
    `resample`: Pillow's name of the (antialiasing) filter; `version` 2 truncates the resized side and rounds the crop
    as torchvision does, 1 rounds the side and truncates the crop. `jpeg`: "reduced" has the JPEG decoder give a half,
    a quarter or an eighth of the size where that is at least three times what is resized to, two to six times as fast.

    Raises ConvlineError for what this version of convline does not decode.
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
            raise ConvlineError(f"{self.height}x{self.width} is no size of an image")
        known = self.version in (1, 2) and self.channels in (1, 3) and self.jpeg in ("full", "reduced")
        if not known or self.fit not in get_args(Fit) or self.resample not in get_args(Resample):
            raise ConvlineError(f"unknown image decoding spec {asdict(self)}; a newer convline may read it")
        if self.version == 1 and (self.fit == "pad" or self.resize is not None):
            raise ConvlineError("an image decoding spec of version 1 has no pad and no resize")
        if self.resize is None:
            return
        if self.fit != "crop" or self.height is None:
            raise ConvlineError(f"resize {self.resize} is the shorter side before a crop: it goes with a size and crop")
        if not _is_size(self.resize, self.resize):
            raise ConvlineError(f"{self.resize} is no side that an image can be resized to")

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> ImageSpec:
        """Raises ConvlineError where this version of convline would decode differently."""
        try:
            return cls(**{"version": 1, **fields})
        except TypeError as error:
            raise ConvlineError(f"unknown image decoding spec {fields}; a newer convline may read it") from error

    def to_dict(self) -> dict[str, Any]:
        fields = asdict(self)
        for field, default in (("jpeg", "full"), ("resize", None)):
            if fields[field] == default:  # as files say that were written before there was a choice
                del fields[field]
        return fields


def _is_size(height: int | None, width: int | None) -> bool:
    """Whether it is one that can be, or none at all."""
    if height is None or width is None:
        return height is width
    return type(height) is type(width) is int and min(height, width) > 0 and height * width <= MAX_PIXELS


@time_limited()
def decode(data: bytes, spec: ImageSpec) -> NDArray[np.uint8]:
    """The pixels of an image file: uint8 [height, width, channels].

    Raises ImageError, and nothing else, for data that cannot be used.
    """
    if not data:
        raise ImageError("empty", "the file has no bytes")
    if len(data) > MAX_BYTES:
        raise ImageError("too-large", f"{len(data)} bytes; the limit is {MAX_BYTES}")
    try:
        image = open_image(data)
        full = _reduce(image, spec) if spec.jpeg == "reduced" else None
        image = _convert(_upright(load(image, data)), spec.channels)
        image = _fit(image, spec, full or image.size)
        return np.asarray(image, dtype=np.uint8).reshape(image.height, image.width, spec.channels)
    # Pillow's readers raise whatever a malformed file makes them stumble over
    except Exception as error:
        raise refusal(error, data) from error


def _reduce(image: Image.Image, spec: ImageSpec) -> tuple[int, int] | None:
    """Have the JPEG decoder scale down; the size that the image would have had, upright."""
    if image.format not in ("JPEG", "MPO") or spec.height is None:
        return None
    is_turned = _orientation(image) >= 5
    full = image.size[::-1] if is_turned else image.size
    wanted = _resized(full, spec)
    height, width = (REDUCED * side for side in (wanted if is_turned else wanted[::-1]))
    image.draft(None, (width, height))
    return full


def _upright(image: Image.Image) -> Image.Image:
    turn = TURNS.get(_orientation(image))
    return image if turn is None else image.transpose(turn)


def _orientation(image: Image.Image) -> int:
    """As EXIF says, or else XMP, from 1 (upright) to 8; from 5 on the sides change places.

    Unreadable EXIF is as good as none, as in every viewer.
    """
    try:
        orientation = image.getexif().get(ORIENTATION)
    except Exception:
        orientation = None
    xmp = image.info.get("xmp")
    if orientation is None and isinstance(xmp, bytes) and (found := XMP_ORIENTATION.search(xmp)):
        orientation = int(found[1])
    return orientation if isinstance(orientation, int) else 1


def _convert(image: Image.Image, channels: int) -> Image.Image:
    """To 8-bit grey or RGB on white."""
    if image.mode.startswith("I"):
        image = _from_16_bit(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image).convert("RGB")
    mode = "L" if channels == 1 else "RGB"
    return image if image.mode == mode else image.convert(mode)  # which copies, if only that


def _from_16_bit(image: Image.Image) -> Image.Image:
    """round(v / 257): 65535 becomes 255."""
    values = np.asarray(image).astype(np.int64)
    if isinstance(transparent := image.info.get("transparency"), int):
        values[values == transparent] = 65535
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))


def _fit(image: Image.Image, spec: ImageSpec, full: tuple[int, int]) -> Image.Image:
    """Resized and cropped or padded as `spec` says; `full` is the image's size before the decoder scaled it down."""
    if spec.height is None or spec.width is None:
        return image
    size = _resized(full, spec)
    if image.size != size:
        image = image.resize(size, Image.Resampling[spec.resample.upper()])
    left, top = (_offset(side, wanted, spec) for side, wanted in zip(size, (spec.width, spec.height), strict=True))
    # Pillow fills with black what a crop takes from outside of the image
    return image if size == (spec.width, spec.height) else image.crop((left, top, left + spec.width, top + spec.height))


def _resized(size: tuple[int, int], spec: ImageSpec) -> tuple[int, int]:
    """Width and height that an image is resized to, before its centre is cropped."""
    assert spec.width is not None and spec.height is not None
    if spec.fit == "stretch":
        return spec.width, spec.height
    if spec.fit == "pad":
        width, height = _contained(size, (spec.width, spec.height))
    elif spec.version == 1:
        scale = max(spec.width / size[0], spec.height / size[1])
        width, height = max(spec.width, round(size[0] * scale)), max(spec.height, round(size[1] * scale))
    else:
        width, height = _covering(size, (spec.resize or spec.width, spec.resize or spec.height))
    if width * height > MAX_PIXELS:  # a strip one pixel high would grow without bound
        raise ImageError("too-large", f"{size[0]}x{size[1]} would be resized to {width}x{height}")
    return width, height


def _covering(size: tuple[int, int], wanted: tuple[int, int]) -> tuple[int, int]:
    """One side as wanted, the other truncated and at least as wanted; torchvision's Resize where both are equal."""
    if wanted[0] * size[1] >= wanted[1] * size[0]:
        return wanted[0], int(wanted[0] * size[1] / size[0])
    return int(wanted[1] * size[0] / size[1]), wanted[1]


def _contained(size: tuple[int, int], wanted: tuple[int, int]) -> tuple[int, int]:
    """One side as wanted, the other rounded and at most as wanted, as Pillow's ImageOps.contain."""
    if size[0] * wanted[1] >= size[1] * wanted[0]:
        return wanted[0], max(1, round(size[1] / size[0] * wanted[0]))
    return max(1, round(size[0] / size[1] * wanted[1])), wanted[1]


def _offset(side: int, wanted: int, spec: ImageSpec) -> int:
    """Where the centre of `wanted` pixels begins; how far before the image, as a negative, where a side has fewer."""
    if spec.version == 1:
        return (side - wanted) // 2
    if spec.fit == "crop" and side < wanted:
        return -((wanted - side) // 2)
    return round((side - wanted) / 2)  # to even, as torchvision's CenterCrop and Pillow's ImageOps.pad


def fit_pixels(image: Image.Image, spec: ImageSpec) -> NDArray[np.uint8]:
    """As `decode`, of an image whose pixels are there already: uint8 [height, width, channels].

    Raises ImageError, and nothing else, for an image that cannot be used.
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
    # Pillow raises whatever an image in one of its rarer modes makes it stumble over
    except Exception as error:
        raise ImageError("unsupported", f"{image.mode}: {error or type(error).__name__}") from error
