"""The image formats that are read (FORMATS): add one here. Opens and decodes files with Pillow.

Where Pillow's pixels would be wrong, the decoders beside this module are used. A file that cannot be decoded gets its
reason code here; `unsupported_formats` then says what kind of file it is.
"""

from __future__ import annotations

import warnings
from io import BytesIO

from PIL import Image, UnidentifiedImageError

from convline.decoders import heif, jpeg2000, png_transparency, tiff_pixels, tiff_tags, unsupported_formats
from convline.decoders.unsupported_formats import CONVERT
from convline.errors import ImageError

# Pillow's names. A fixed list: otherwise Pillow would, for instance, start Ghostscript for an .eps file
FORMATS = ("JPEG", "MPO", "PNG", "GIF", "WEBP", "TIFF", "BMP", "PPM", "JPEG2000", "AVIF", "HEIF")
MAX_PIXELS = 178_956_970  # Pillow's own limit: 512 MiB as RGB

JPEG, PNG, GIF, BMP = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF8", b"BM"
SIGNATURES = (JPEG, PNG, GIF, BMP, *tiff_tags.SIGNATURES, *jpeg2000.SIGNATURES)
END_MARKERS = {JPEG: b"\xff\xd9", PNG: b"IEND\xae\x42\x60\x82", GIF: b";"}
# JPEG markers of frames that are not decoded
UNSUPPORTED_JPEGS = {
    0xC3: "lossless", 0xC5: "hierarchical", 0xC6: "hierarchical", 0xC7: "hierarchical", 0xCB: "lossless",
    0xCD: "hierarchical", 0xCE: "hierarchical", 0xCF: "hierarchical", 0xF7: "JPEG-LS",
}  # fmt: skip
FRAME_MARKERS = {*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC}  # JPEG markers that begin a frame
# parts of decoders' error messages for a valid file that they do not support, the last two of AVIF
UNSUPPORTED_MESSAGES = ("unsupported", "not supported", "cannot handle", "not implemented", "no codec",
                        "missing or empty image item")  # fmt: skip

# Pillow warns of large and damaged files; here they are rejected with a reason code, or decoded
warnings.filterwarnings("ignore", module=r"PIL\.")


def open_image(data: bytes) -> Image.Image:
    """The first frame, checked for damage and size; its pixels are usually not decoded yet."""
    if data.startswith(tiff_tags.SIGNATURES) and (page := tiff_tags.first_page(data)):
        if page.unsupported:
            raise ImageError("truncated" if tiff_tags.is_truncated(data) else "unsupported", page.unsupported)
        check_pixels(page.width, page.height)
        if not page.is_for_pillow:
            return tiff_pixels.read(page)
    image = _open_with_pillow(data)
    if image.format == "PNG":
        image.verify()  # the checksums, which decoding ignores; the object cannot be used afterwards
        image = _open_with_pillow(data)
    if image.format == "HEIF":
        if heif.is_truncated(data):
            raise ImageError("truncated", "the HEIC file ends too early")
        image.info.pop("xmp", None)  # it may state the orientation once more; pi-heif resets that of EXIF
    check_pixels(image.width, image.height)
    return image


def check_pixels(width: int, height: int) -> None:
    """Raises ImageError ("too-large") for more than MAX_PIXELS, as a decompression bomb may have."""
    if width * height > MAX_PIXELS:
        raise ImageError("too-large", f"{width}x{height}; the limit is {MAX_PIXELS} pixels")


def _open_with_pillow(data: bytes) -> Image.Image:
    Image.init()
    if heif.is_heif(data):
        heif.register()
    return Image.open(BytesIO(data), formats=[name for name in FORMATS if name in Image.OPEN])


def load_pixels(image: Image.Image, data: bytes) -> Image.Image:
    """Decode the pixels of `image`, which `open_image` opened from `data`."""
    if image.format == "JPEG2000":
        return jpeg2000.load(image, data)
    image.load()
    if image.format == "PNG":
        png_transparency.fix_transparency(image, data)
    # mode I holds 16-bit values for PNG and PGM; in other formats its 32-bit values have no known maximum
    if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")):
        raise ImageError("unsupported", "32-bit pixels have no defined range; save it with 8 or 16 bits")
    return image


def as_image_error(error: Exception, data: bytes) -> ImageError:
    """The reject for `data`, given the exception that opening or decoding it raised."""
    if isinstance(error, ImageError):
        is_cut = error.reason == "unreadable" and _is_truncated(data)
        return ImageError("truncated", error.detail) if is_cut else error
    if isinstance(error, MemoryError):
        return ImageError("too-large", "not enough memory to decode it")
    if isinstance(error, Image.DecompressionBombError):
        return ImageError("too-large", f"over {MAX_PIXELS} pixels")
    if problem := _unsupported_variant(data):
        return ImageError("unsupported", problem)
    if isinstance(error, UnidentifiedImageError):
        return _unidentified(data)
    message = str(error).lower()
    if isinstance(error, EOFError) or any(words in message for words in ("truncated", "end of", "not enough")):
        return ImageError("truncated", str(error) or "the file ends too early")
    if any(words in message for words in UNSUPPORTED_MESSAGES):
        return ImageError("unsupported", f"{error}; {CONVERT}")
    return ImageError("truncated" if _is_truncated(data) else "unreadable", str(error) or type(error).__name__)


def _unidentified(data: bytes) -> ImageError:
    """The reject for a file whose header Pillow cannot read."""
    is_cut_signature = len(data) > 1 and any(signature.startswith(data) for signature in SIGNATURES)
    if not data.startswith(SIGNATURES) and data[8:12] != b"WEBP" and not is_cut_signature:
        return unsupported_formats.identify(data)
    if data.startswith(tiff_tags.SIGNATURES) and tiff_tags.first_page(data) and not tiff_tags.is_truncated(data):
        return ImageError("unsupported", f"a TIFF of a layout that is not supported; {CONVERT}")
    end = next((end for start, end in END_MARKERS.items() if data.startswith(start)), None)
    if end and data.rstrip(b"\0\r\n").endswith(end):
        return ImageError("unreadable", "its header is damaged")
    return ImageError("truncated", "the file ends or breaks inside its header")


def _is_truncated(data: bytes) -> bool:
    """Whether the headers say that the file should be longer, for formats whose decoders do not report it."""
    if data[8:12] == b"WEBP":
        return int.from_bytes(data[4:8], "little") + 8 > len(data)
    if data.startswith(jpeg2000.SIGNATURES):
        return jpeg2000.is_truncated(data)
    if heif.is_heif(data):
        return heif.is_truncated(data)
    return data.startswith(tiff_tags.SIGNATURES) and tiff_tags.is_truncated(data)


def _unsupported_variant(data: bytes) -> str | None:
    """What is not supported about a file of a supported format, such as lossless JPEG; None if nothing is known."""
    if data.startswith(JPEG):
        return _unsupported_jpeg(data)
    if data.startswith(PNG) and data[12:16] == b"CgBI":
        return f"a PNG in Apple's format for iPhone apps (CgBI); {CONVERT}"
    return jpeg2000.unsupported(data) if data.startswith(jpeg2000.SIGNATURES) else None


def _unsupported_jpeg(data: bytes) -> str | None:
    """Found by the marker and header of the first frame."""
    position = 2
    while position + 10 <= len(data):
        marker, length = data[position + 1], int.from_bytes(data[position + 2 : position + 4], "big")
        if marker == 0xFF:  # padding
            position += 1
            continue
        if marker in FRAME_MARKERS:
            bits, components = data[position + 4], data[position + 9]
            if kind := UNSUPPORTED_JPEGS.get(marker):
                return f"a {kind} JPEG; {CONVERT}"
            is_supported = bits == 8 and components in (1, 3, 4)
            return None if is_supported else f"a JPEG of {components} components of {bits} bits; {CONVERT}"
        position += 2 + length
    return None
