"""Opens and decodes image files by Pillow, and by our own readers where Pillow's pixels would be wrong.

What cannot be decoded gets its reason here: a whole file of another kind is no truncated one.
"""

from __future__ import annotations

import warnings
from io import BytesIO

from PIL import Image, UnidentifiedImageError

from convline.decoders import jpeg2000, png, tiff_pixels, tiff_tags, unsupported
from convline.errors import ImageError

# a fixed list: Pillow would also start Ghostscript on an .eps that somebody dropped into the folder
FORMATS = ("JPEG", "MPO", "PNG", "GIF", "WEBP", "TIFF", "BMP", "PPM", "JPEG2000", "AVIF")
MAX_PIXELS = 178_956_970  # where Pillow itself refuses: 512 MiB as RGB

JPEG, PNG, GIF, BMP = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF8", b"BM"
SIGNATURES = (JPEG, PNG, GIF, BMP, *tiff_tags.SIGNATURES, *jpeg2000.SIGNATURES)
ENDS = {JPEG: b"\xff\xd9", PNG: b"IEND\xae\x42\x60\x82", GIF: b";"}
UNREAD_JPEGS = {0xC3: "lossless", 0xC5: "hierarchical", 0xC6: "hierarchical", 0xC7: "hierarchical", 0xCB: "lossless",
                0xCD: "hierarchical", 0xCE: "hierarchical", 0xCF: "hierarchical", 0xF7: "JPEG-LS"}  # fmt: skip
FRAMES = {*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC}  # markers that begin one
# what decoders say of a whole file that is beyond them, the last two of AVIF
BEYOND = ("unsupported", "not supported", "cannot handle", "not implemented", "no codec", "missing or empty image item")

# Pillow warns of what is decided here: sizes by MAX_PIXELS, damage by reason codes
warnings.filterwarnings("ignore", module=r"PIL\.")


def open_image(data: bytes) -> Image.Image:
    """The first frame, verified but usually not decoded yet; its size is checked."""
    if data.startswith(tiff_tags.SIGNATURES) and (page := tiff_tags.first_page(data)):
        if page.unsupported:
            raise ImageError("truncated" if tiff_tags.is_cut(data) else "unsupported", page.unsupported)
        check_size(page.width, page.height)
        if not page.is_for_pillow:
            return tiff_pixels.read(page)
    image = _identify(data)
    if image.format == "PNG":
        image.verify()  # checksums, which decoding skips; ends the object's use
        image = _identify(data)
    check_size(image.width, image.height)
    return image


def check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise ImageError("too-large", f"{width}x{height}; the limit is {MAX_PIXELS} pixels")


def _identify(data: bytes) -> Image.Image:
    Image.init()
    return Image.open(BytesIO(data), formats=[name for name in FORMATS if name in Image.OPEN])


def load(image: Image.Image, data: bytes) -> Image.Image:
    """The image with its pixels decoded."""
    if image.format == "JPEG2000":
        return jpeg2000.load(image, data)
    image.load()
    if image.format == "PNG":
        png.mend_transparency(image, data)
    # 16-bit PNG and PGM come as mode I too; any other file of 32-bit integers may mean anything by them
    if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")):
        raise ImageError("unsupported", "32-bit pixels have no defined range; save it with 8 or 16 bits")
    return image


def refusal(error: Exception, data: bytes) -> ImageError:
    """Why `data` is not decoded, given what opening or decoding it raised."""
    if isinstance(error, ImageError):
        return ImageError("truncated", error.detail) if error.reason == "unreadable" and _is_cut(data) else error
    if isinstance(error, MemoryError):
        return ImageError("too-large", "not enough memory to decode it")
    if isinstance(error, Image.DecompressionBombError):
        return ImageError("too-large", f"over {MAX_PIXELS} pixels")
    if problem := _unread_kind(data):
        return ImageError("unsupported", problem)
    if isinstance(error, UnidentifiedImageError):
        return _unidentified(data)
    message = str(error).lower()
    if isinstance(error, EOFError) or any(word in message for word in ("truncated", "end of", "not enough")):
        return ImageError("truncated", str(error) or "the file ends too early")
    if any(words in message for words in BEYOND):
        return ImageError("unsupported", f"{error}; {unsupported.CONVERT}")
    return ImageError("truncated" if _is_cut(data) else "unreadable", str(error) or type(error).__name__)


def _unidentified(data: bytes) -> ImageError:
    """Of a file of which Pillow cannot even read the header."""
    is_begun = len(data) > 1 and any(signature.startswith(data) for signature in SIGNATURES)
    if not data.startswith(SIGNATURES) and data[8:12] != b"WEBP" and not is_begun:
        return unsupported.explain(data)
    if data.startswith(tiff_tags.SIGNATURES) and tiff_tags.first_page(data) and not tiff_tags.is_cut(data):
        return ImageError("unsupported", f"a TIFF of a layout that is not read here; {unsupported.CONVERT}")
    end = next((end for begin, end in ENDS.items() if data.startswith(begin)), None)
    if end and data.rstrip(b"\0\r\n").endswith(end):
        return ImageError("unreadable", "its header is damaged")
    return ImageError("truncated", "the file ends or breaks inside its header")


def _is_cut(data: bytes) -> bool:
    """Whether a file says itself that it should be longer, where its decoder does not."""
    if data[8:12] == b"WEBP":
        return int.from_bytes(data[4:8], "little") + 8 > len(data)
    if data.startswith(jpeg2000.SIGNATURES):
        return jpeg2000.is_cut(data)
    return data.startswith(tiff_tags.SIGNATURES) and tiff_tags.is_cut(data)


def _unread_kind(data: bytes) -> str | None:
    """What a file of a format that is read otherwise is, where none of its kind is read."""
    if data.startswith(JPEG):
        return _unread_jpeg(data)
    if data.startswith(PNG) and data[12:16] == b"CgBI":
        return f"a PNG as Apple's tools pack it for iPhones; {unsupported.CONVERT}"
    return jpeg2000.unread_kind(data) if data.startswith(jpeg2000.SIGNATURES) else None


def _unread_jpeg(data: bytes) -> str | None:
    """By the marker that begins its frame."""
    at = 2
    while at + 10 <= len(data):
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        if marker == 0xFF:
            at += 1
            continue
        if marker in FRAMES:
            bits, components = data[at + 4], data[at + 9]
            if kind := UNREAD_JPEGS.get(marker):
                return f"a {kind} JPEG; {unsupported.CONVERT}"
            is_usual = bits == 8 and components in (1, 3, 4)
            return None if is_usual else f"a JPEG of {components} components of {bits} bits; {unsupported.CONVERT}"
        at += 2 + length
    return None
