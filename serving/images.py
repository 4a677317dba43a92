"""THE one way a file becomes pixels. Preparing a dataset and serving a model both call `decode`.

In order: open and verify; EXIF orientation; 16 bits scaled to 8; alpha composited on white; palette,
1-bit, CMYK and the like converted; to grey or RGB; shorter side resized with an antialiasing filter,
then centre-cropped. Animations give their first frame.
"""

from __future__ import annotations

import warnings
from dataclasses import asdict, dataclass
from io import BytesIO
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from serving.errors import ConvlineError, ImageError, Reason

# a fixed list: Pillow would also start Ghostscript on an .eps that somebody dropped into the folder
FORMATS = ("JPEG", "MPO", "PNG", "GIF", "WEBP", "TIFF", "BMP", "PPM", "JPEG2000", "AVIF")
MAX_PIXELS = 178_956_970  # where Pillow itself refuses: 512 MiB as RGB
MAX_BYTES = 512 * 2**20
ORIENTATION = 0x112  # EXIF's tag
REDUCED = 3  # times the size that is resized to: with 2, a pixel of a photograph moved by 1.8 of 255 on average

SIGNATURES = (
    b"\xff\xd8\xff",
    b"\x89PNG\r\n\x1a\n",
    b"GIF8",
    b"BM",
    b"II*\x00",
    b"MM\x00*",
    b"\x00\x00\x00\x0cjP  ",
    b"\xff\x4f\xff\x51",
)

# Pillow warns of what is decided here: sizes by MAX_PIXELS, damage by reason codes
warnings.filterwarnings("ignore", module=r"PIL\.")


@dataclass(frozen=True)
class ImageSpec:
    """How files become pixels. It travels in `meta.json` and in the ONNX file.

    `height` and `width` in pixels, None for the size as stored; `channels` 1 (grey) or 3 (RGB);
    `fit`: "crop" resizes the shorter side, then crops the centre; "stretch" ignores the aspect ratio;
    `resample`: Pillow's name of the (antialiasing) filter. `jpeg`: "reduced" has the JPEG decoder give a half, a
    quarter or an eighth of the size where that is at least three times what is resized to, two to six times as fast.
    """

    height: int | None
    width: int | None
    channels: int
    fit: Literal["crop", "stretch"] = "crop"
    resample: Literal["box", "bilinear", "bicubic", "lanczos"] = "bilinear"
    version: int = 1
    jpeg: Literal["full", "reduced"] = "full"

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> ImageSpec:
        """Raises ConvlineError where this version of convline would decode differently."""
        try:
            spec = cls(**fields)
        except TypeError as error:
            raise ConvlineError(f"unknown image decoding spec {fields}; a newer convline may read it") from error
        if not _is_size(spec.height, spec.width):
            raise ConvlineError(f"{spec.height}x{spec.width} is no size of an image")
        known = spec.version == 1 and spec.channels in (1, 3) and spec.fit in ("crop", "stretch")
        known = known and spec.jpeg in ("full", "reduced")
        if not known or spec.resample not in ("box", "bilinear", "bicubic", "lanczos"):
            raise ConvlineError(f"unknown image decoding spec {fields}; a newer convline may read it")
        return spec

    def to_dict(self) -> dict[str, Any]:
        fields = asdict(self)
        if self.jpeg == "full":  # as files say that were written before there was a choice
            del fields["jpeg"]
        return fields


def _is_size(height: int | None, width: int | None) -> bool:
    """Whether it is one that can be, or none at all."""
    if height is None or width is None:
        return height is width
    return type(height) is type(width) is int and min(height, width) > 0 and height * width <= MAX_PIXELS


def decode(data: bytes, spec: ImageSpec) -> NDArray[np.uint8]:
    """The pixels of an image file: uint8 [height, width, channels].

    Raises ImageError, and nothing else, for data that cannot be used.
    """
    if not data:
        raise ImageError("empty", "the file has no bytes")
    if len(data) > MAX_BYTES:
        raise ImageError("too-large", f"{len(data)} bytes; the limit is {MAX_BYTES}")
    try:
        image = _open(data)
        full = _reduce(image, spec) if spec.jpeg == "reduced" else None
        image = _convert(_upright(_load(image)), spec.channels)
        image = _fit(image, spec, full or image.size)
        return np.asarray(image, dtype=np.uint8).reshape(image.height, image.width, spec.channels)
    except ImageError:
        raise
    except MemoryError as error:
        raise ImageError("too-large", "not enough memory to decode it") from error
    # Pillow's readers raise whatever a malformed file makes them stumble over
    except Exception as error:
        raise ImageError(_reason(error, data), str(error) or type(error).__name__) from error


def _open(data: bytes) -> Image.Image:
    """The first frame, verified but not decoded; its size is checked."""
    try:
        image = _identify(data)
        if image.format == "PNG":
            image.verify()  # checksums, which decoding skips; ends the object's use
            image = _identify(data)
    except UnidentifiedImageError as error:
        if data.startswith(SIGNATURES) or data[8:12] == b"WEBP" or data[4:12] in (b"ftypavif", b"ftypavis"):
            raise ImageError("truncated", "the file ends or breaks inside its header") from error
        raise ImageError("not-an-image", "no image format that is read here begins like this") from error
    except Image.DecompressionBombError as error:
        raise ImageError("too-large", f"over {MAX_PIXELS} pixels") from error
    if image.width * image.height > MAX_PIXELS:
        raise ImageError("too-large", f"{image.width}x{image.height}; the limit is {MAX_PIXELS} pixels")
    return image


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


def _load(image: Image.Image) -> Image.Image:
    """The image with its pixels decoded."""
    image.load()
    # 16-bit PNG and PGM come as mode I too; any other file of 32-bit integers may mean anything by them
    if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")):
        raise ImageError("unsupported", "32-bit pixels have no defined range")
    return image


def _identify(data: bytes) -> Image.Image:
    Image.init()
    return Image.open(BytesIO(data), formats=[name for name in FORMATS if name in Image.OPEN])


def _upright(image: Image.Image) -> Image.Image:
    """Turned as EXIF says; unreadable EXIF is as good as none, as in every viewer."""
    try:
        # exif_transpose copies what it need not turn: a tenth of the time that a photograph takes
        return image if _orientation(image) == 1 else ImageOps.exif_transpose(image)
    except Exception:
        return image


def _orientation(image: Image.Image) -> int:
    """EXIF's, from 1 (upright) to 8; from 5 on the sides change places."""
    try:
        orientation = image.getexif().get(ORIENTATION, 1)
    except Exception:
        return 1
    return orientation if isinstance(orientation, int) and 1 <= orientation <= 8 else 1


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
    """Resized and cropped as `spec` says; `full` is the image's size before the decoder scaled it down."""
    if spec.height is None or spec.width is None or image.size == (spec.width, spec.height):
        return image
    width, height = _resized(full, spec)
    image = image.resize((width, height), Image.Resampling[spec.resample.upper()])
    left, top = (width - spec.width) // 2, (height - spec.height) // 2
    return image.crop((left, top, left + spec.width, top + spec.height))


def _resized(size: tuple[int, int], spec: ImageSpec) -> tuple[int, int]:
    """Width and height that an image is resized to, before its centre is cropped."""
    assert spec.width is not None and spec.height is not None
    if spec.fit == "stretch":
        return spec.width, spec.height
    scale = max(spec.width / size[0], spec.height / size[1])
    width, height = max(spec.width, round(size[0] * scale)), max(spec.height, round(size[1] * scale))
    if width * height > MAX_PIXELS:  # a strip one pixel high would grow without bound
        raise ImageError("too-large", f"{size[0]}x{size[1]} would be resized to {width}x{height}")
    return width, height


def _reason(error: Exception, data: bytes) -> Reason:
    message = str(error).lower()
    if isinstance(error, EOFError) or any(word in message for word in ("truncated", "end of", "not enough")):
        return "truncated"
    # WebP's decoder does not say why it failed, but the file says how long it should be
    is_cut_webp = data[8:12] == b"WEBP" and int.from_bytes(data[4:8], "little") + 8 > len(data)
    return "truncated" if is_cut_webp else "unreadable"
