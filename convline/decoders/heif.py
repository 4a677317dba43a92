"""Opens HEIC and other HEIF files, as iPhones write them, where the optional package pi-heif is installed.

Its reader of Pillow turns the image as the file's own `irot` and `imir` say. The orientation in EXIF it resets: the
standard (ISO 23008-12) has readers ignore it, as the files of iPhones state the same rotation in both.
"""

from __future__ import annotations

from functools import cache

BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"mif2", b"msf1", b"miaf")
PARTS = (b"ftyp", b"meta", b"mdat", b"moov")  # boxes that are needed to decode; others may follow, or padding
INSTALL = "pip install 'convline[heic]' reads it"


def is_heif(data: bytes) -> bool:
    """By its main brand; the image in it may be of another kind than HEVC."""
    return data[4:8] == b"ftyp" and data[8:12] in BRANDS


@cache
def register() -> bool:
    """Make Pillow open HEIF files. False where the package is missing. Only for such files: importing takes 40 ms."""
    try:
        from pi_heif import register_heif_opener
    except ImportError:
        return False
    # one thread: images are decoded on every CPU already
    register_heif_opener(decode_threads=1, thumbnails=False, depth_images=False, aux_images=False)
    return True


def is_truncated(data: bytes) -> bool:
    """Whether the file ends within a box that is needed: libheif would decode a part of the image."""
    position = 0
    while position + 8 <= len(data) and data[position + 4 : position + 8] in PARTS:
        length = int.from_bytes(data[position : position + 4], "big")
        if length == 1:  # a 64-bit length follows
            length = int.from_bytes(data[position + 8 : position + 16], "big")
        if length < 8:  # 0: to the end of the file
            return False
        position += length
    return position > len(data)
