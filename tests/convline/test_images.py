"""`decode`: pixels computed by hand, and the reason codes of files without pixels."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from convline.errors import ConvlineError, ImageError, Reason
from convline.images import MAX_BYTES, ImageSpec, decode
from tests.serving.helpers import encode, exif, noise

# Pillow warns of broken EXIF and TIFF tags; only pytest turns the warnings into errors
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

GREY = ImageSpec(None, None, 1)
RGB = ImageSpec(None, None, 3)


def png(width: int, height: int, depth: int, colour: int, raw: bytes, transparent: bytes = b"") -> bytes:
    """A PNG written by hand: Pillow writes no 16-bit colour."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    extra = chunk(b"tRNS", transparent) if transparent else b""
    return b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")


def reason(data: bytes, spec: ImageSpec = RGB) -> Reason:
    with pytest.raises(ImageError) as caught:
        decode(data, spec)
    assert caught.value.detail
    return caught.value.reason


def on_white(value: int, alpha: int) -> float:
    return (value * alpha + 255 * (255 - alpha)) / 255


# --- orientation

UPRIGHT = {  # by EXIF tag 274: from the stored rows and columns to the upright ones
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: a[::-1].swapaxes(0, 1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: a[:, ::-1].swapaxes(0, 1),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize(("format", "options"), [("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {})])
def test_exif_orientation_is_applied_once(format: str, options: dict[str, Any], orientation: int) -> None:
    stored = noise(3, 5, 3)
    data = encode(stored, format, exif=exif(orientation), **options)
    np.testing.assert_array_equal(decode(data, RGB), UPRIGHT[orientation](stored))


def test_a_portrait_photograph_of_a_phone_is_rotated() -> None:
    stored = np.zeros((16, 32), np.uint8)
    stored[:8, :8] = 255  # top left as stored, top right after rotating by 90 degrees clockwise
    pixels = decode(encode(stored, "JPEG", quality=100, exif=exif(6)), GREY)
    assert pixels.shape == (32, 16, 1)
    assert pixels[0, -1, 0] > 200 and max(pixels[0, 0, 0], pixels[-1, 0, 0], pixels[-1, -1, 0]) < 50


def test_orientation_comes_before_the_crop() -> None:
    stored = noise(4, 8, 1)
    data = encode(stored[..., 0], "PNG", exif=exif(6))
    np.testing.assert_array_equal(decode(data, ImageSpec(4, 4, 1)), UPRIGHT[6](stored)[2:6])


@pytest.mark.parametrize(
    "broken", [b"Exif\0\0II*\0\xff\xff\xff\xff garbage", b"Exif\0\0II*\0\x08\0\0\0\x05\0", b"Exif"]
)
def test_broken_exif_is_ignored(broken: bytes) -> None:
    pixels = noise(4, 4, 3)
    np.testing.assert_array_equal(decode(encode(pixels, "PNG", exif=broken), RGB), pixels)


def xmp_chunk(xmp: bytes) -> bytes:
    text = b"iTXtXML:com.adobe.xmp\0\0\0\0\0" + xmp
    return struct.pack(">I", len(text) - 4) + text + struct.pack(">I", zlib.crc32(text))


@pytest.mark.parametrize(
    "xmp_template",
    [
        '<d tiff:Orientation="%d"/>',
        "<d tiff:Orientation = '%d'/>",
        "<d><tiff:Orientation>%d</tiff:Orientation></d>",
        "<d><tiff:Orientation>\n %d\n</tiff:Orientation></d>",
    ],
)
@pytest.mark.parametrize("orientation", [1, 6, 7])
def test_orientation_that_only_xmp_has_is_applied_once(xmp_template: str, orientation: int) -> None:
    stored = np.asarray(Image.fromarray(noise(3, 4, 3)).resize((24, 16), Image.Resampling.BICUBIC))
    xmp, upright = (xmp_template % orientation).encode(), UPRIGHT[orientation](stored)
    whole = encode(stored, "PNG")
    for data in (
        encode(stored, "WEBP", lossless=True, xmp=xmp),
        encode(stored, "TIFF", tiffinfo={700: xmp}),
        encode(stored, "TIFF", tiffinfo={700: xmp}, compression="tiff_lzw"),
        whole[:33] + xmp_chunk(xmp) + whole[33:],
        whole[:-12] + xmp_chunk(xmp) + whole[-12:],  # after the pixels
    ):
        np.testing.assert_array_equal(decode(data, RGB), upright)
    lossy = decode(encode(stored, "JPEG", quality=100, subsampling=0, xmp=xmp), RGB)
    np.testing.assert_allclose(lossy, upright, atol=4)


def test_exif_takes_precedence_over_xmp() -> None:
    stored = noise(3, 5, 3)
    data = encode(stored, "WEBP", lossless=True, xmp=b'<d tiff:Orientation="6"/>', exif=exif(3))
    np.testing.assert_array_equal(decode(data, RGB), UPRIGHT[3](stored))


# --- colour

PALETTE = Image.frombytes("P", (2, 1), bytes([0, 1]))
PALETTE.putpalette([200, 0, 0, 0, 0, 200])
HALF = Image.merge("LA", [Image.new("L", (2, 2), 100), Image.new("L", (2, 2), 128)])


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        pytest.param(encode(Image.new("RGBA", (2, 2), (200, 0, 50, 128)), "PNG"), [[200, 0, 50, 128]] * 4, id="RGBA"),
        pytest.param(encode(Image.new("RGBA", (1, 1), (9, 9, 9, 0)), "PNG"), [[9, 9, 9, 0]], id="RGBA-clear"),
        pytest.param(encode(HALF, "PNG"), [[100, 100, 100, 128]] * 4, id="LA"),
        pytest.param(encode(PALETTE, "PNG"), [[200, 0, 0, 255], [0, 0, 200, 255]], id="P"),
        pytest.param(encode(PALETTE, "PNG", transparency=0), [[200, 0, 0, 0], [0, 0, 200, 255]], id="P-transparent"),
        pytest.param(encode(PALETTE, "GIF", transparency=1), [[200, 0, 0, 255], [0, 0, 200, 0]], id="P-GIF"),
        pytest.param(
            encode(PALETTE, "PNG", transparency=bytes([128, 64])), [[200, 0, 0, 128], [0, 0, 200, 64]], id="P-alpha"
        ),
        pytest.param(
            png(2, 1, 8, 2, bytes([0, 7, 8, 9, 1, 2, 3]), struct.pack(">3H", 7, 8, 9)),
            [[7, 8, 9, 0], [1, 2, 3, 255]],
            id="RGB-colour-key",
        ),
    ],
)
def test_transparency_is_composited_on_white(data: bytes, expected: list[list[int]]) -> None:
    golden = [[on_white(value, alpha) for value in colour] for *colour, alpha in expected]
    np.testing.assert_allclose(decode(data, RGB).reshape(-1, 3), golden, atol=1)


def test_one_bit_is_black_and_white() -> None:
    bits = np.array([[False, True, True], [True, False, False]])
    np.testing.assert_array_equal(decode(encode(bits, "PNG"), GREY)[..., 0], np.where(bits, 255, 0))


def test_two_bits_span_the_range() -> None:
    np.testing.assert_array_equal(decode(png(4, 1, 2, 0, bytes([0, 0b00011011])), GREY).ravel(), [0, 85, 170, 255])


def test_cmyk_jpeg_becomes_rgb() -> None:
    red = encode(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=100)
    np.testing.assert_allclose(decode(red, RGB), np.broadcast_to((255, 0, 0), (16, 16, 3)), atol=3)


def test_grey_fills_all_channels_of_rgb() -> None:
    grey = noise(4, 5)
    np.testing.assert_array_equal(decode(encode(grey, "PNG"), RGB), np.repeat(grey[..., None], 3, -1))


def test_rgb_becomes_luma() -> None:
    colour = noise(16, 16, 3)
    golden = colour @ np.array([0.299, 0.587, 0.114])  # ITU-R 601
    np.testing.assert_allclose(decode(encode(colour, "PNG"), GREY)[..., 0], golden, atol=1)


EVERY_LEVEL = np.arange(256, dtype=np.uint16).reshape(16, 16)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(encode(EVERY_LEVEL * 257, "PNG"), id="PNG"),
        pytest.param(encode(EVERY_LEVEL * 257, "TIFF"), id="TIFF"),
        pytest.param(encode((EVERY_LEVEL * 257).astype(">u2"), "TIFF"), id="TIFF-big-endian"),
        pytest.param(b"P5 16 16 65535\n" + (EVERY_LEVEL * 257).astype(">u2").tobytes(), id="PGM"),
    ],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_16_bit_grey_is_scaled_to_8(data: bytes, channels: int) -> None:
    golden = np.repeat(EVERY_LEVEL[..., None], channels, -1)
    np.testing.assert_array_equal(decode(data, ImageSpec(None, None, channels)), golden)


def test_16_bit_levels_between_are_rounded() -> None:
    levels = np.array([[0, 128, 129, 300, 65406, 65407, 65535]], np.uint16)
    np.testing.assert_array_equal(decode(encode(levels, "PNG"), GREY).ravel(), np.rint(levels / 257).ravel())


def test_16_bit_colour_and_alpha_are_scaled_to_8() -> None:
    colour = png(1, 1, 16, 2, b"\0" + struct.pack(">3H", 65535, 128 * 257, 7 * 257))
    clear = png(1, 1, 16, 6, b"\0" + struct.pack(">4H", 65535, 0, 7 * 257, 0))
    key = png(2, 1, 16, 0, b"\0" + struct.pack(">2H", 7 * 257, 9 * 257), struct.pack(">H", 7 * 257))
    np.testing.assert_array_equal(decode(colour, RGB).ravel(), [255, 128, 7])
    np.testing.assert_array_equal(decode(clear, RGB).ravel(), [255, 255, 255])
    np.testing.assert_array_equal(decode(key, GREY).ravel(), [255, 9])


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_the_transparent_grey_of_a_png_has_the_bit_depth_of_the_file(depth: int) -> None:
    largest = (1 << depth) - 1
    for clear in {0, 1, largest // 2, largest}:
        for level in {0, 1, largest // 2, largest}:
            stored = (level << (16 - depth)).to_bytes(2, "big")[: 1 if depth < 16 else 2]
            data = png(1, 1, depth, 0, b"\0" + stored, struct.pack(">H", clear))
            assert decode(data, GREY).item() == (255 if level == clear else round(level * 255 / largest))


def test_only_the_exact_transparent_colour_of_a_16_bit_png_is_transparent() -> None:
    colours = [(0x1234, 0x5678, 0x9ABC), (0x1235, 0x5678, 0x9ABC), (0x1234, 0x5678, 0x9ABD), (0x34, 0x78, 0xBC)]
    raw = b"\0" + b"".join(struct.pack(">3H", *colour) for colour in colours)
    seen = decode(png(4, 1, 16, 2, raw, struct.pack(">3H", *colours[0])), RGB)[0]
    np.testing.assert_array_equal(seen[0], [255, 255, 255])
    np.testing.assert_allclose(seen[1:], np.array(colours[1:]) / 257, atol=1)


@pytest.mark.parametrize("largest", [1, 15, 100, 255, 256, 1000, 1023, 4095, 65535])
def test_a_pnm_of_any_largest_value_keeps_its_range(largest: int) -> None:
    levels = np.array([0, largest // 3, largest // 2, largest - 1, largest, largest]).astype(
        "u1" if largest < 256 else ">u2"
    )
    expected = levels.astype(float) * 255 / largest
    grey = decode(b"P5 6 1 %d\n" % largest + levels.tobytes(), GREY)
    colour = decode(b"P6 2 1 %d\n" % largest + levels.tobytes(), RGB)
    plain = decode(b"P2 6 1 %d\n" % largest + b" ".join(b"%d" % level for level in levels), GREY)
    for seen in (grey, colour, plain):
        np.testing.assert_allclose(seen.ravel(), expected, atol=1)
        assert seen.max() == 255


@pytest.mark.parametrize(
    "pixels",
    [
        pytest.param(np.full((4, 4), 0.5, np.float32), id="float"),
        pytest.param(np.full((4, 4), 100_000, np.int32), id="int32"),
        pytest.param(np.full((4, 4), -1, np.int32), id="int32-negative"),
        # refused by type, although the values would fit
        pytest.param(np.full((4, 4), 1_000, np.int32), id="int32-small-values"),
    ],
)
def test_pixels_without_a_defined_range_are_unsupported(pixels: np.ndarray) -> None:
    assert reason(encode(pixels, "TIFF")) == "unsupported"


@pytest.mark.parametrize(("format", "options"), [("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {}), ("TIFF", {})])
def test_an_animation_gives_its_first_frame(format: str, options: dict[str, Any]) -> None:
    first, second = (Image.new("RGB", (4, 4), colour) for colour in ("red", "blue"))
    data = encode(first, format, save_all=True, append_images=[second], **options)
    np.testing.assert_array_equal(decode(data, RGB), np.broadcast_to((255, 0, 0), (4, 4, 3)))


# --- size


def test_an_image_of_the_right_size_is_not_resampled() -> None:
    pixels = noise(7, 5, 3)
    np.testing.assert_array_equal(decode(encode(pixels, "PNG"), ImageSpec(7, 5, 3)), pixels)


@pytest.mark.parametrize(
    ("stored", "kept"),
    [((4, 8), np.s_[:, 2:6]), ((8, 4), np.s_[2:6]), ((4, 7), np.s_[:, 2:6]), ((4, 5), np.s_[:, :4])],
)
def test_crop_takes_the_centre(stored: tuple[int, int], kept: Any) -> None:
    pixels = noise(*stored, 3)
    np.testing.assert_array_equal(decode(encode(pixels, "PNG"), ImageSpec(4, 4, 3)), pixels[kept])


def test_crop_resizes_the_shorter_side_first() -> None:
    pixels = noise(8, 12)
    halves = pixels.reshape(4, 2, 6, 2).mean((1, 3))  # a box filter at one half
    decoded = decode(encode(pixels, "PNG"), ImageSpec(4, 4, 1, resample="box"))
    np.testing.assert_allclose(decoded[..., 0], halves[:, 1:5], atol=1)


def test_stretch_ignores_the_aspect_ratio() -> None:
    pixels = noise(4, 8)
    decoded = decode(encode(pixels, "PNG"), ImageSpec(4, 4, 1, fit="stretch", resample="box"))
    np.testing.assert_allclose(decoded[..., 0], pixels.reshape(4, 4, 2).mean(2), atol=1)


def test_bilinear_shrinks_with_antialiasing() -> None:
    pixels = noise(16, 16)
    distance = np.abs(np.arange(16) + 0.5 - (np.arange(4)[:, None] + 0.5) * 4) / 4  # triangle, as wide as 4 pixels
    weights = np.maximum(0, 1 - distance)
    weights /= weights.sum(1, keepdims=True)
    decoded = decode(encode(pixels, "PNG"), ImageSpec(4, 4, 1))
    np.testing.assert_allclose(decoded[..., 0], weights @ pixels @ weights.T, atol=1)


def test_a_smaller_image_is_enlarged() -> None:
    pixels = noise(2, 2)
    decoded = decode(encode(pixels, "PNG"), ImageSpec(4, 4, 1, resample="box"))
    np.testing.assert_array_equal(decoded[..., 0], pixels.repeat(2, 0).repeat(2, 1))


def test_a_very_wide_image_is_cropped_or_refused_before_it_is_enlarged_too_far() -> None:
    strip = encode(np.full((1, 30_000), 9, np.uint8), "PNG")
    assert (decode(strip, ImageSpec(8, 8, 1)) == 9).all()
    assert (decode(strip, ImageSpec(100, 100, 1, fit="stretch")) == 9).all()
    assert reason(strip, ImageSpec(100, 100, 1)) == "too-large"


# --- refusals

PIXELS = noise(40, 60, 3)
FILES = {
    "jpeg": encode(PIXELS, "JPEG"),
    "jpeg-progressive": encode(PIXELS, "JPEG", progressive=True),
    "png": encode(PIXELS, "PNG"),
    "gif": encode(PIXELS, "GIF"),
    "bmp": encode(PIXELS, "BMP"),
    "tiff": encode(PIXELS, "TIFF"),
    "tiff-lzw": encode(PIXELS, "TIFF", compression="tiff_lzw"),
    "webp": encode(PIXELS, "WEBP"),
    "webp-lossless": encode(PIXELS, "WEBP", lossless=True),
}


@pytest.mark.parametrize("name", FILES)
def test_every_format_decodes(name: str) -> None:
    pixels = decode(FILES[name], RGB)
    assert pixels.shape == PIXELS.shape and pixels.dtype == np.uint8 and pixels.std() > 20


@pytest.mark.parametrize("name", FILES)
def test_half_a_file_is_truncated(name: str) -> None:
    assert reason(FILES[name][: len(FILES[name]) // 2]) == "truncated"


@pytest.mark.parametrize(
    ("data", "code"),
    [pytest.param(b"", "empty", id="empty"), pytest.param(bytes(MAX_BYTES + 1), "too-large", id="bytes")],
)
def test_too_few_and_too_many_bytes_have_their_reason(data: bytes, code: str) -> None:
    assert reason(data) == code


@pytest.mark.parametrize("position", [len(FILES["png"]) // 2, -13], ids=["pixels", "checksum"])  # -12: IEND begins
def test_a_png_with_a_wrong_checksum_is_unreadable(position: int) -> None:
    data = bytearray(FILES["png"])
    data[position] ^= 1
    assert reason(bytes(data)) == "unreadable"


@pytest.mark.parametrize(
    "data",
    [
        # the pixels are missing: "truncated" would mean that decoding had started
        pytest.param(png(100_000, 100_000, 8, 2, b""), id="png"),
        pytest.param(png(13_400, 13_400, 8, 2, b""), id="png-just-over"),
        pytest.param(b"P6 100000 100000 255\n", id="ppm"),
        pytest.param(b"BM" + struct.pack("<IIIIiiHHIIiiII", 54, 0, 54, 40, 99_999, 99_999, 1, 24, *[0] * 6), id="bmp"),
    ],
)
def test_a_bomb_is_refused_by_its_header(data: bytes) -> None:
    assert reason(data) == "too-large"


@pytest.mark.parametrize(
    "fields",
    [
        {"version": 3},
        {"channels": 4},
        {"fit": "contain"},
        {"resample": "nearest"},
        {"colour": "lab"},
    ],
)
def test_a_spec_that_this_version_would_decode_differently_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ConvlineError, match="spec"):
        ImageSpec.from_dict({**ImageSpec(8, 8, 1).to_dict(), **fields})


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"resize": 9, "fit": "stretch"}, "resize 9"),
        ({"resize": 9, "fit": "pad"}, "resize 9"),
        ({"resize": 9, "height": None, "width": None}, "resize 9"),
        ({"resize": 0}, "0 is not a valid size"),
        ({"resize": 8.5}, "8.5 is not a valid size"),
        ({"version": 1, "fit": "pad"}, "version 1"),
        ({"version": 1, "resize": 9}, "version 1"),
        ({"height": None}, "not a valid image size"),
    ],
)
def test_an_invalid_spec_is_refused(fields: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConvlineError, match=expected):
        ImageSpec.from_dict({**ImageSpec(8, 8, 1).to_dict(), **fields})


def test_fields_with_default_values_are_not_written() -> None:
    written = {"height": 8, "width": 6, "channels": 1, "fit": "crop", "resample": "bilinear", "version": 2}
    assert ImageSpec(8, 6, 1).to_dict() == written
    assert ImageSpec.from_dict({**written, "version": 1}).to_dict() == {**written, "version": 1}
    assert ImageSpec.from_dict({"height": 8, "width": 6, "channels": 1}).version == 1
    for spec in (ImageSpec(8, 6, 1, jpeg="reduced"), ImageSpec(8, 6, 3, resize=9), ImageSpec(8, 6, 3, "pad", "box")):
        assert ImageSpec.from_dict(spec.to_dict()) == spec


@settings(max_examples=300, deadline=None)
@given(
    name=st.sampled_from(sorted(FILES)),
    edits=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.binary(min_size=1, max_size=4)), max_size=6),
    # half of the edits change the header
    header_edits=st.lists(st.tuples(st.integers(0, 120), st.integers(0, 255)), max_size=6),
    cut=st.one_of(st.just(1.0), st.floats(0, 1)),
    channels=st.sampled_from([1, 3]),
)
def test_a_mutated_file_decodes_or_raises_image_error(
    name: str, edits: list[tuple[float, bytes]], header_edits: list[tuple[int, int]], cut: float, channels: int
) -> None:
    data = bytearray(FILES[name])
    for where, new in edits:
        start = int(where * len(data))
        data[start : start + len(new)] = new
    for position, value in header_edits:
        data[position] = value
    outcome: Any
    try:
        outcome = decode(bytes(data[: int(cut * len(data))]), ImageSpec(8, 12, channels))
    except ImageError as error:
        outcome = error.reason
    if isinstance(outcome, str):
        assert outcome in get_args(Reason)
    else:
        assert outcome.shape == (8, 12, channels) and outcome.dtype == np.uint8


def test_ghostscript_is_never_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = tmp_path / "started"
    for name in ("gs", "gswin32c", "gswin64c"):
        program = tmp_path / name
        program.write_text(f"#!/bin/sh\n: > {started}\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert reason(encode(PIXELS, "EPS")) == "unsupported"
    assert not started.exists()


# --- JPEGs decoded at reduced size


def photograph(width: int, height: int) -> Image.Image:
    from sklearn.datasets import load_sample_image

    return Image.fromarray(load_sample_image("china.jpg")).resize((width, height), Image.Resampling.LANCZOS)


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("size", [(640, 427), (2000, 1334), (400, 1200)])
@pytest.mark.parametrize(("height", "width", "fit"), [(32, 32, "crop"), (48, 96, "crop"), (64, 64, "stretch")])
def test_a_jpeg_decoded_at_reduced_size_is_nearly_the_same(
    size: tuple[int, int], height: int, width: int, fit: Any, orientation: int
) -> None:
    data = encode(photograph(*size), "JPEG", quality=90, exif=exif(orientation))
    whole = decode(data, ImageSpec(height, width, 3, fit)).astype(int)
    reduced = decode(data, ImageSpec(height, width, 3, fit, jpeg="reduced"))
    assert np.abs(whole - reduced).mean() < 1.5


def test_reducing_decodes_fewer_pixels_and_never_less_than_three_times_the_target(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes: list[tuple[int, int]] = []

    def resize(image: Image.Image, *arguments: Any) -> Image.Image:
        sizes.append(image.size)
        return real(image, *arguments)

    data = encode(photograph(1600, 800), "JPEG")
    real = Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", resize)
    for side, jpeg in ((32, "full"), (32, "reduced"), (100, "reduced"), (200, "reduced"), (400, "reduced")):
        decode(data, ImageSpec(side, side, 3, jpeg=jpeg))  # type: ignore[arg-type]
    assert sizes == [(1600, 800), (200, 100), (800, 400), (1600, 800), (1600, 800)]


def test_reducing_changes_no_other_format_and_no_small_jpeg() -> None:
    reduced = ImageSpec(32, 32, 3, jpeg="reduced")
    for data in (encode(photograph(400, 300), "PNG"), encode(photograph(90, 60), "JPEG")):
        np.testing.assert_array_equal(decode(data, reduced), decode(data, ImageSpec(32, 32, 3)))
