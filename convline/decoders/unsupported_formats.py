"""Recognises files that are not supported (camera raw, PSD, PDF, video, …) or no images, by their first bytes.

The reject names the kind of file and says what to do with it.
"""

from __future__ import annotations

import re

from convline.decoders import heif
from convline.errors import ImageError

CONVERT = "convert it to JPEG or PNG"
DEVELOP = "export it from the camera's software as JPEG or TIFF"
RENDER = "render it to PNG"
MAP_RANGE = "map it to 8 or 16 bits, as PNG or TIFF"
EXTRACT_FRAMES = "extract its frames as JPEG or PNG"
SAVE_AS = "save it as JPEG or PNG"
UNPACK = "unpack it and give the images in it"

# images and videos of unsupported formats: (offset, the bytes there, name, what to do)
UNSUPPORTED: tuple[tuple[int, bytes, str, str], ...] = (
    (0, b"\xff\x0a", "JPEG XL", CONVERT),
    (0, b"\0\0\0\x0cJXL ", "JPEG XL", CONVERT),
    (0, b"8BPS", "Photoshop", SAVE_AS),
    (0, b"gimp xcf", "GIMP", SAVE_AS),
    (0, b"%!PS", "PostScript", RENDER),
    (0, b"\xc5\xd0\xd3\xc6", "EPS", RENDER),
    (0, b"%PDF-", "PDF", RENDER),
    (0, b"\xd7\xcd\xc6\x9a", "Windows metafile", RENDER),
    (40, b" EMF", "Windows metafile", RENDER),
    (0, b"AT&TFORM", "DjVu", RENDER),
    (0, b"MM\0+", "big-endian BigTIFF", "save it as little-endian BigTIFF or as TIFF"),
    (8, b"CR\2\0", "Canon camera raw (CR2)", DEVELOP),
    (6, b"HEAPCCDR", "Canon camera raw (CRW)", DEVELOP),
    (0, b"FUJIFILMCCD-RAW", "Fujifilm camera raw (RAF)", DEVELOP),
    (0, b"IIU\0", "Panasonic camera raw (RW2)", DEVELOP),
    (0, b"IIRO", "Olympus camera raw (ORF)", DEVELOP),
    (0, b"IIRS", "Olympus camera raw (ORF)", DEVELOP),
    (0, b"MMOR", "Olympus camera raw (ORF)", DEVELOP),
    (0, b"FOVb", "Sigma camera raw (X3F)", DEVELOP),
    (0, b"\0MRM", "Minolta camera raw (MRW)", DEVELOP),
    (0, b"\x76\x2f\x31\x01", "OpenEXR", MAP_RANGE),
    (0, b"#?RADIANCE", "Radiance HDR", MAP_RANGE),
    (0, b"#?RGBE", "Radiance HDR", MAP_RANGE),
    (0, b"PF\n", "portable float map", MAP_RANGE),
    (0, b"P7\n", "PAM", CONVERT),
    (0, b"II\xbc\x01", "JPEG XR", CONVERT),
    (128, b"DICM", "DICOM", "export its pictures as PNG, with the window that shows what matters"),
    (0, b"SIMPLE  =", "FITS", MAP_RANGE),
    (0, b"\0\0\1\0", "Windows icon", CONVERT),
    (0, b"icns", "Apple icon", CONVERT),
    (0, b"qoif", "QOI", CONVERT),
    (0, b"DDS ", "DirectDraw surface", CONVERT),
    (0, b"\xabKTX", "KTX texture", CONVERT),
    (0, b"BPG\xfb", "BPG", CONVERT),
    (0, b"FLIF", "FLIF", CONVERT),
    (0, b"\x8aMNG", "MNG", CONVERT),
    (0, b"\x8bJNG", "JNG", CONVERT),
    (0, b"\x59\xa6\x6a\x95", "Sun raster", CONVERT),
    (0, b"/* XPM", "XPM", CONVERT),
    (0, b"\x01\xda\0", "SGI", CONVERT),
    (0, b"\x01\xda\1", "SGI", CONVERT),
    (-18, b"TRUEVISION-XFILE.", "TGA", CONVERT),
    (0, b"\x1a\x45\xdf\xa3", "Matroska or WebM video", EXTRACT_FRAMES),
    (0, b"\0\0\1\xba", "MPEG video", EXTRACT_FRAMES),
    (0, b"\0\0\1\xb3", "MPEG video", EXTRACT_FRAMES),
    (0, b"FLV\1", "Flash video", EXTRACT_FRAMES),
    (0, b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", "Windows Media video", EXTRACT_FRAMES),
    (8, b"AVI LIST", "AVI video", EXTRACT_FRAMES),
    (8, b"ACON", "Windows cursor", CONVERT),
)

# brands of ISO base media files, the family of MP4
HEIC_HELP = f"{heif.INSTALL}, or {CONVERT}; an iPhone takes JPEGs with Settings, Camera, Formats, Most Compatible"
AVIF = (b"avif", b"avis")

# files that are not images: (offset, the bytes there, name)
NOT_IMAGES: tuple[tuple[int, bytes, str], ...] = (
    (0, b"version https://git-lfs.github.com/spec/", "a Git LFS pointer; fetch the file itself by `git lfs pull`"),
    (0, b"PK\3\4", f"a ZIP archive or an office document; {UNPACK}"),
    (0, b"\x1f\x8b", f"gzip-compressed; {UNPACK}"),
    (0, b"BZh", f"bzip2-compressed; {UNPACK}"),
    (0, b"\xfd7zXZ\0", f"xz-compressed; {UNPACK}"),
    (0, b"\x28\xb5\x2f\xfd", f"Zstandard-compressed; {UNPACK}"),
    (0, b"7z\xbc\xaf\x27\x1c", f"a 7z archive; {UNPACK}"),
    (0, b"Rar!", f"a RAR archive; {UNPACK}"),
    (257, b"ustar", f"a tar archive; {UNPACK}"),
    (0, b"\0\5\x16\7", "file metadata of macOS (AppleDouble); delete it"),
    (0, b"\0\0\0\1Bud1", "folder settings of macOS (.DS_Store); delete it"),
    (0, b"\xd0\xcf\x11\xe0", "a Windows compound file, such as Thumbs.db or an old office document"),
    (0, b"L\0\0\0\1\x14\2\0", "a Windows shortcut; give the file it points to"),
    (0, b"bplist00", "an Apple property list"),
    (0, b"\x93NUMPY", "a NumPy array"),
    (0, b"\x89HDF\r\n", "an HDF5 file"),
    (0, b"SQLite format 3\0", "an SQLite database"),
    (0, b"\x7fELF", "a program"),
    (0, b"MZ", "a Windows program"),
    (0, b"ID3", "audio"),
    (0, b"OggS", "Ogg audio or video"),
    (0, b"fLaC", "audio"),
    (8, b"WAVE", "audio"),
)

TEXT_HEAD = 4096  # bytes that are searched to recognise a text file
PROLOGUE = re.compile(rb"(?:\s+|<!--.*?-->|<\?.*?\?>)*", re.S)
TAG = re.compile(rb"<(?:!doctype\s+)?(?:[\w.-]+:)?([a-z][\w.-]*)", re.I)
TITLE = re.compile(rb"<title[^>]*>\s*([^<]{1,60})", re.I)
HTML_TAGS = ("html", "head", "body", "script", "meta", "title", "div", "p", "h1", "center", "a", "style", "iframe")
NOT_TEXT = bytes({*range(32)} - set(b"\t\n\f\r\x1b")) + b"\x7f"


def identify(data: bytes) -> ImageError:
    """The reject for a file that is not of a supported format."""
    if not data.strip(b"\0"):
        return ImageError("not-an-image", "nothing but zeros, as after an interrupted copy; copy it again")
    for offset, magic, name, advice in UNSUPPORTED:
        if data[offset:].startswith(magic):
            return _unsupported(name, advice)
    if data[4:8] == b"ftyp":
        return _iso_media(data)
    if data[4:8] in (b"moov", b"mdat", b"wide", b"pnot"):
        return _unsupported("QuickTime video", EXTRACT_FRAMES)
    if format_name := _format_without_signature(data):
        return _unsupported(format_name, CONVERT)
    for offset, magic, name in NOT_IMAGES:
        if data.startswith(magic, offset):
            return ImageError("not-an-image", name)
    return _text(data[:TEXT_HEAD]) or ImageError("not-an-image", "no known image format begins like this")


def _unsupported(name: str, advice: str) -> ImageError:
    return ImageError("unsupported", f"{name}, which is not supported; {advice}")


def _iso_media(data: bytes) -> ImageError:
    """The reject for a file of ISO base media (HEIC, AVIF, MP4, …), by the brands in its first box."""
    end = min(int.from_bytes(data[:4], "big"), 1024)
    brands = [data[8:12], *(data[start : start + 4] for start in range(16, end, 4))]
    if any(brand in AVIF for brand in brands):
        if not _is_complete_iso_media(data):
            return ImageError("truncated", "the AVIF file ends too early")
        return _unsupported("an AVIF of an unusual kind", CONVERT)
    if any(brand in heif.BRANDS for brand in brands):
        if not heif.register():
            return _unsupported("HEIC (HEIF)", HEIC_HELP)
        if heif.is_truncated(data):
            return ImageError("truncated", "the HEIC file ends too early")
        return _unsupported("a HEIC (HEIF) of an unusual kind", CONVERT)
    if brands[0] == b"crx ":
        return _unsupported("Canon camera raw (CR3)", DEVELOP)
    if brands[0] == b"jxl ":
        return _unsupported("JPEG XL", CONVERT)
    if brands[0] in (b"M4A ", b"M4B "):
        return ImageError("not-an-image", "audio")
    kind = "QuickTime" if brands[0] == b"qt  " else f"MP4 ({brands[0].decode('ascii', 'replace').strip()})"
    return _unsupported(f"{kind} video", EXTRACT_FRAMES)


def _is_complete_iso_media(data: bytes) -> bool:
    """Whether the top-level boxes end at the end of the file."""
    position = 0
    while position + 8 <= len(data):
        length = int.from_bytes(data[position : position + 4], "big")
        if length == 1:  # a 64-bit length follows
            length = int.from_bytes(data[position + 8 : position + 16], "big")
        if length == 0:  # to the end of the file
            return True
        if length < 8:
            return False
        position += length
    return position == len(data)


def _format_without_signature(data: bytes) -> str | None:
    """PCX and TGA have no signature: their headers are recognised by plausible values."""
    if len(data) > 128 and data[0] == 10 and data[1] in (0, 2, 3, 4, 5) and data[2] == 1 and data[3] in (1, 2, 4, 8):
        return "PCX"
    if len(data) < 18:
        return None
    has_map, kind, map_depth, depth, flags = data[1], data[2], data[7], data[16], data[17]
    has_size = any(data[12:14]) and any(data[14:16]) and depth in (8, 15, 16, 24, 32) and not flags & 0xC0
    with_map = has_map == 1 and kind in (1, 9) and map_depth in (15, 16, 24, 32)
    without_map = has_map == 0 and kind in (2, 3, 10, 11) and not any(data[3:8])
    return "TGA" if has_size and (with_map or without_map) else None


def _text(head: bytes) -> ImageError | None:
    """The reject for a text file: a web page, SVG, XML, JSON, …; None if it is not text."""
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        head = head.decode("utf-16", "replace").encode()
    head = head.removeprefix(b"\xef\xbb\xbf")
    if head.translate(None, NOT_TEXT) != head:
        return None
    prologue = PROLOGUE.match(head)
    body = head[prologue.end() if prologue else 0 :]
    if tag := TAG.match(body):
        name = tag[1].decode().lower()
        if name == "svg":
            return _unsupported("SVG", RENDER)
        if name in HTML_TAGS:
            title = TITLE.search(head)
            page_title = f" ({title[1].decode('utf-8', 'replace').strip()!r})" if title else ""
            return ImageError("not-an-image", f"a web page{page_title}; fetch the image itself")
        return ImageError("not-an-image", f"an XML document (<{tag[1].decode()}>); fetch the image itself")
    if head.lstrip().startswith(b"<?xml"):
        return ImageError("not-an-image", "an XML document; fetch the image itself")
    if body.startswith((b"{", b"[")):
        return ImageError("not-an-image", "a JSON document, such as a server's error; fetch the image itself")
    if b"/annex/objects/" in head:
        return ImageError("not-an-image", "a git-annex pointer; fetch the file itself by `git annex get`")
    if body.startswith(b"#define") and b"_width" in body:
        return _unsupported("XBM", CONVERT)
    start = body[:40].decode("utf-8", "replace").strip()
    return ImageError("not-an-image", f"text ({start!r}); no image begins like this") if start else None
