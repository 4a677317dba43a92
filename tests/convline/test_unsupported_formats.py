"""Files that cannot be decoded are named: unsupported formats, files that are not images, truncated images."""

from __future__ import annotations

import struct
import zlib
from typing import Any

import imagecodecs
import numpy as np
import pytest
from PIL import Image

from convline.errors import ImageError, Reason
from convline.images import ImageSpec, decode
from tests.serving.helpers import encode, noise

# Pillow warns of broken tags; only pytest turns the warnings into errors
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

PIXELS = noise(40, 60, 3)


def refused(data: bytes) -> tuple[Reason, str]:
    with pytest.raises(ImageError) as caught:
        decode(data, ImageSpec(None, None, 3))
    return caught.value.reason, caught.value.detail


def brand(name: bytes, *compatible: bytes) -> bytes:
    """The first box of an ISO media file."""
    return struct.pack(">I4s4sI", 16 + 4 * len(compatible), b"ftyp", name, 0) + b"".join(compatible)


def rest(data: bytes) -> bytes:
    return data + bytes(200)


@pytest.mark.parametrize(
    ("data", "named"),
    [
        pytest.param(brand(b"heic", b"mif1", b"heic"), "HEIC", id="heic"),
        pytest.param(rest(brand(b"mif1", b"heic")), "HEIC", id="heif"),
        pytest.param(brand(b"msf1", b"hevc"), "HEIC", id="heic-sequence"),
        pytest.param(rest(brand(b"crx ", b"isom")), "CR3", id="cr3"),
        pytest.param(rest(brand(b"isom", b"avc1")), "video", id="mp4"),
        pytest.param(rest(brand(b"qt  ")), "QuickTime", id="mov"),
        pytest.param(rest(struct.pack(">I4s", 108, b"moov")), "QuickTime", id="old-mov"),
        pytest.param(rest(b"\x1a\x45\xdf\xa3"), "WebM", id="webm"),
        pytest.param(rest(b"RIFF\xc8\0\0\0AVI LIST"), "AVI", id="avi"),
        pytest.param(imagecodecs.jpegxl_encode(PIXELS), "JPEG XL", id="jxl"),
        pytest.param(imagecodecs.jpegxl_encode(PIXELS, usecontainer=True), "JPEG XL", id="jxl-container"),
        pytest.param(imagecodecs.jpegxr_encode(PIXELS), "JPEG XR", id="jxr"),
        pytest.param(imagecodecs.qoi_encode(PIXELS), "QOI", id="qoi"),
        pytest.param(imagecodecs.jpegls_encode(PIXELS), "JPEG-LS", id="jpeg-ls"),
        pytest.param(imagecodecs.jpeg_encode(PIXELS.astype(np.uint16) * 16, bitspersample=12), "12 bits", id="jpeg-12"),
        pytest.param(
            imagecodecs.ljpeg_encode(PIXELS[..., 0].astype(np.uint16), bitspersample=12), "lossless", id="jpeg-lossless"
        ),
        *(
            pytest.param(encode(Image.fromarray(PIXELS).resize((32, 32)), format), named, id=format)
            for format, named in [
                ("ICO", "icon"),
                ("ICNS", "icon"),
                ("TGA", "TGA"),
                ("PCX", "PCX"),
                ("PDF", "PDF"),
                ("EPS", "PostScript"),
                ("DDS", "DirectDraw"),
                ("SGI", "SGI"),
            ]
        ),
        pytest.param(encode(Image.fromarray(PIXELS), "TGA")[:-26], "TGA", id="TGA-without-footer"),
        pytest.param(encode(Image.fromarray(PIXELS[..., 0]), "TGA", compression="tga_rle")[:-26], "TGA", id="TGA-RLE"),
        pytest.param(encode(Image.fromarray(PIXELS).convert("1"), "XBM"), "XBM", id="XBM"),
        pytest.param(rest(b"8BPS\0\1"), "Photoshop", id="psd"),
        pytest.param(b"8BPS", "Photoshop", id="psd-cut"),
        pytest.param(rest(b"gimp xcf file"), "GIMP", id="xcf"),
        pytest.param(rest(b"\x76\x2f\x31\x01"), "OpenEXR", id="exr"),
        pytest.param(b"#?RADIANCE\nFORMAT=32-bit_rle_rgbe\n\n-Y 1 +X 1\n", "Radiance", id="hdr"),
        pytest.param(bytes(128) + b"DICM" + bytes(99), "DICOM", id="dicom"),
        pytest.param(rest(b"SIMPLE  =                    T"), "FITS", id="fits"),
        pytest.param(b"MM\0+\0\x08\0\0", "BigTIFF", id="bigtiff"),
        pytest.param(rest(b"FUJIFILMCCD-RAW 0201"), "RAF", id="raf"),
        pytest.param(rest(b"IIU\0\x18\0\0\0"), "RW2", id="rw2"),
        pytest.param(rest(b"IIRO\x08\0\0\0"), "ORF", id="orf"),
        pytest.param(rest(b"FOVb"), "X3F", id="x3f"),
        pytest.param(b"P7\nWIDTH 1\nHEIGHT 1\nDEPTH 3\nMAXVAL 255\nTUPLTYPE RGB\nENDHDR\nabc", "PAM", id="pam"),
        pytest.param(b"PF\n1 1\n-1.0\n" + bytes(12), "float", id="pfm"),
        pytest.param(b"Pf\n1 1\n-1.0\n" + bytes(4), "32-bit", id="pfm-grey"),
        pytest.param(b'<?xml version="1.0"?>\n<!-- x -->\n<svg xmlns="http://www.w3.org/2000/svg"/>', "SVG", id="svg"),
        pytest.param(b'\xef\xbb\xbf<!DOCTYPE svg PUBLIC "-//W3C//DTD SVG 1.1//EN" ""><svg/>', "SVG", id="svg-doctype"),
        pytest.param(b"\x89PNG\r\n\x1a\n\0\0\0\4CgBI" + bytes(99), "Apple", id="apple-png"),
    ],
)
def test_a_file_of_an_unsupported_format_is_named(data: bytes, named: str) -> None:
    reason, detail = refused(data)
    assert (reason, named in detail) == ("unsupported", True), detail
    assert any(word in detail for word in ("convert", "save it", "export", "render", "map it", "extract")), detail


def test_an_avif_that_is_not_decoded_is_unsupported_or_truncated() -> None:
    whole = bytes(imagecodecs.avif_encode(PIXELS))
    at = whole.index(b"av01")
    unknown_codec = whole[:at] + b"av99" + whole[at + 4 :]  # the name of a codec that does not exist
    assert refused(unknown_codec)[0] == "unsupported" and "convert it" in refused(unknown_codec)[1]
    assert {refused(whole[:length])[0] for length in range(24, len(whole) - 1, len(whole) // 20)} == {"truncated"}


@pytest.mark.parametrize(
    ("data", "named"),
    [
        pytest.param(b"<!DOCTYPE html><html>403</html>", "web page", id="html"),
        pytest.param(b"\n <HTML><head><title>Sign in</title>", "'Sign in'", id="html-title"),
        pytest.param(b"<!-- cached --><html><body>", "web page", id="html-comment"),
        pytest.param("<html><body>".encode("utf-16"), "web page", id="html-utf16"),
        pytest.param(b"<html><body>caf\xe9", "web page", id="html-latin-1"),
        pytest.param(
            b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "XML document (<Error>)", id="xml"
        ),
        pytest.param(b'{"error": "not found"}', "JSON", id="json"),
        pytest.param(b'[{"error": 404}]', "JSON", id="json-list"),
        pytest.param(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "Git LFS", id="lfs"),
        pytest.param(b"/annex/objects/SHA256E-s1--0.jpg\n", "git-annex", id="annex"),
        pytest.param(b"hello, world\n" * 50, "'hello, world", id="text"),
        pytest.param("Ünïcode".encode(), "text", id="utf-8"),
        pytest.param(bytes(1000), "zeros", id="zeros"),
        pytest.param(noise(1000).tobytes(), "begins like this", id="noise"),
        pytest.param(rest(b"PK\3\4"), "ZIP", id="zip"),
        pytest.param(zlib.compress(b"x", wbits=31), "gzip", id="gzip"),
        pytest.param(rest(b"\0\5\x16\7\0\2\0\0Mac OS X"), "AppleDouble", id="appledouble"),
        pytest.param(rest(b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"), "Thumbs.db", id="thumbs"),
        pytest.param(rest(b"\x7fELF"), "program", id="elf"),
        pytest.param(rest(b"ID3\4\0"), "audio", id="mp3"),
        pytest.param(rest(brand(b"M4A ")), "audio", id="m4a"),
    ],
)
def test_a_file_that_is_not_an_image_is_named(data: bytes, named: str) -> None:
    reason, detail = refused(data)
    assert (reason, named in detail) == ("not-an-image", True), detail


@pytest.mark.parametrize(
    ("format", "options"),
    [("JPEG", {}), ("PNG", {}), ("GIF", {}), ("BMP", {}), ("WEBP", {}), ("TIFF", {}), ("JPEG2000", {}), ("PPM", {})],
)
def test_a_supported_format_is_truncated_wherever_it_ends(format: str, options: dict[str, Any]) -> None:
    data = encode(PIXELS, format, **options)
    lengths = [*range(12, 120, 9), len(data) // 2, len(data) * 3 // 4]
    assert {length: refused(data[:length])[0] for length in lengths} == dict.fromkeys(lengths, "truncated")


def test_a_bmp_that_pillow_does_not_decode_is_unsupported() -> None:
    data = bytearray(encode(PIXELS, "BMP"))
    data[30] = 4  # a JPEG inside
    assert refused(bytes(data))[0] == "unsupported"
