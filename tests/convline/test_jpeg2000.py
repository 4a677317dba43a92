"""JPEG 2000 of all bit depths and channel orders, compared with another decoder (imagecodecs) or NumPy."""

from __future__ import annotations

import struct
from typing import Any

import imagecodecs
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from convline.errors import ImageError
from convline.images import ImageSpec, decode
from tests.convline.tiff_files import jp2

AS_RGB = ImageSpec(None, None, 3)
CMYK, SRGB, GREY, SYCC, LAB = 12, 16, 17, 18, 14
COLOUR, OPACITY, PREMULTIPLIED, UNSPECIFIED = 0, 1, 2, 65535
HEIGHT, WIDTH = 19, 27
RANDOM = np.random.default_rng(7)


def scene(bits: int, count: int) -> NDArray[Any]:
    """Noise with patches that are black, white and nearly white."""
    values = RANDOM.random((HEIGHT, WIDTH, count))
    values[:6, :6], values[6:12, :6], values[:6, 6:12] = 1, 0, 1 - RANDOM.random((6, 6, count)) / 200
    return np.rint(values * ((1 << bits) - 1)).astype(np.uint8 if bits <= 8 else np.uint16)


def smooth(bits: int, count: int) -> NDArray[Any]:
    """Gradients, which lossy compression keeps nearly unchanged."""
    x, y = np.meshgrid(np.linspace(0, 1, WIDTH), np.linspace(0, 1, HEIGHT))
    values = np.stack([x, y, (x + y) / 2, 1 - x][:count], -1)
    return np.rint(values * ((1 << bits) - 1)).astype(np.uint8 if bits <= 8 else np.uint16)


def codestream(pixels: NDArray[Any], bits: int = 8, **options: Any) -> bytes:
    pixels = pixels[..., 0] if pixels.shape[2] == 1 else pixels
    space = "GRAY" if pixels.ndim == 2 or pixels.shape[2] == 2 else "SRGB"
    options = {"level": 0, "reversible": True, "codecformat": "j2k", "mct": False, **options}
    return bytes(imagecodecs.jpeg2k_encode(pixels, bitspersample=bits, colorspace=space, **options))


def definitions(*entries: tuple[int, int, int]) -> tuple[bytes, bytes]:
    return b"cdef", struct.pack(">H", len(entries)) + b"".join(struct.pack(">3H", *entry) for entry in entries)


def on_white(colour: NDArray[Any], alpha: NDArray[Any]) -> NDArray[Any]:
    return colour * (alpha / 255) + 255 - alpha


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("bits", [1, 2, 4, 7, 8, 9, 10, 12, 14, 16])
def test_every_depth_keeps_its_range(bits: int, count: int) -> None:
    lossy: dict[str, Any] = {"level": 25, "reversible": False}  # so that edges overshoot black and white
    for pixels, options in ((scene(bits, count), {}), (scene(bits, count), lossy)):
        for kind in ("j2k", "jp2"):
            data = codestream(pixels, bits, mct=count == 3, **{**options, "codecformat": kind})
            levels = imagecodecs.jpeg2k_decode(data).reshape(HEIGHT, WIDTH, count) * 255.0 / ((1 << bits) - 1)
            colour = levels[..., :1] if count < 3 else levels[..., :3]
            expected = on_white(colour, levels[..., -1:]) if count in (2, 4) else colour
            seen = decode(data, AS_RGB)
            np.testing.assert_allclose(
                seen, np.broadcast_to(expected, seen.shape), atol=1.75, err_msg=f"{kind} {options}"
            )


@pytest.mark.parametrize("bits", [8, 12, 16])
def test_white_is_white(bits: int) -> None:
    white = np.full((32, 32, 3), (1 << bits) - 1, np.uint8 if bits == 8 else np.uint16)
    assert (decode(codestream(white, bits, mct=True), AS_RGB) == 255).all()


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("bits", [4, 8, 12, 16])
def test_the_lowest_signed_sample_is_black(bits: int, count: int) -> None:
    pixels = scene(bits, count)
    data = bytearray(codestream(pixels, bits))
    for component in range(count):  # mark it as signed: 0 is then the middle of the range
        data[42 + 3 * component] |= 128
    expected = np.broadcast_to(pixels * 255.0 / ((1 << bits) - 1), (HEIGHT, WIDTH, 3))
    np.testing.assert_allclose(decode(bytes(data), AS_RGB), expected, atol=1)


@pytest.mark.parametrize("bits", [8, 16])
def test_channels_are_ordered_by_their_definitions(bits: int) -> None:
    pixels = scene(bits, 4)
    levels = pixels * 255.0 / ((1 << bits) - 1)
    stream = codestream(pixels, bits)
    shape = (HEIGHT, WIDTH, 4)
    a_b_g_r = definitions((0, OPACITY, 0), (1, COLOUR, 3), (2, COLOUR, 2), (3, COLOUR, 1))
    expected = on_white(levels[..., [3, 2, 1]], levels[..., :1])
    np.testing.assert_allclose(decode(jp2(stream, shape, SRGB, a_b_g_r), AS_RGB), expected, atol=1.75)
    rgb = [(index, COLOUR, index + 1) for index in range(3)]
    ignored = jp2(stream, shape, SRGB, definitions(*rgb, (3, UNSPECIFIED, 65535)))
    np.testing.assert_allclose(decode(ignored, AS_RGB), levels[..., :3], atol=1)
    premultiplied = jp2(stream, shape, SRGB, definitions(*rgb, (3, PREMULTIPLIED, 0)))
    expected = np.minimum(255, levels[..., :3] + 255 - levels[..., 3:])
    np.testing.assert_allclose(decode(premultiplied, AS_RGB), expected, atol=1.75)


def test_blue_green_red_and_alpha_before_grey_are_put_in_order() -> None:
    pixels = scene(8, 3)
    b_g_r = definitions((0, COLOUR, 3), (1, COLOUR, 2), (2, COLOUR, 1))
    np.testing.assert_array_equal(decode(jp2(codestream(pixels), pixels.shape, SRGB, b_g_r), AS_RGB), pixels[..., ::-1])
    pixels = scene(8, 2)
    a_l = definitions((0, OPACITY, 0), (1, COLOUR, 1))
    expected = np.broadcast_to(on_white(pixels[..., 1:].astype(float), pixels[..., :1]), (HEIGHT, WIDTH, 3))
    seen = decode(jp2(codestream(pixels), pixels.shape, GREY, a_l), AS_RGB)
    np.testing.assert_allclose(seen, expected, atol=1)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_palette_with_duplicate_colours_gives_its_colours(bits: int) -> None:
    indices = scene(bits, 1)
    colours = RANDOM.integers(0, 256, (1 << bits, 3), np.uint8)
    colours[1] = colours[0]
    palette = b"pclr", struct.pack(">HB", 1 << bits, 3) + b"\7\7\7" + colours.tobytes()
    mapping = b"cmap", b"".join(struct.pack(">HBB", 0, 1, column) for column in range(3))
    for boxes in ([palette, mapping], [palette]):
        data = jp2(codestream(indices, bits), indices.shape, SRGB, *boxes)
        np.testing.assert_array_equal(decode(data, AS_RGB), colours[indices[..., 0]])


@pytest.mark.parametrize("colour", [CMYK, b"\0" * 16 + b"CMYK" + b"\0" * 108], ids=["enumerated", "profile"])
def test_cmyk_is_not_read_as_rgb_with_alpha(colour: int | bytes) -> None:
    pixels = scene(8, 4)
    expected = (255.0 - pixels[..., :3]) * (255 - pixels[..., 3:]) / 255
    np.testing.assert_allclose(decode(jp2(codestream(pixels), pixels.shape, colour), AS_RGB), expected, atol=1.75)


def test_sycc_becomes_rgb() -> None:
    pixels = smooth(8, 3)
    expected = np.asarray(Image.fromarray(pixels, "YCbCr").convert("RGB"))
    np.testing.assert_allclose(decode(jp2(codestream(pixels), pixels.shape, SYCC), AS_RGB), expected, atol=1)


def subsampled() -> bytes:
    data = bytearray(codestream(scene(8, 3)))
    data[46:48] = b"\2\2"
    return jp2(bytes(data), (HEIGHT, WIDTH, 3), SYCC)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        pytest.param(jp2(codestream(scene(8, 3)), (HEIGHT, WIDTH, 3), LAB), "colour space", id="lab"),
        pytest.param(jp2(codestream(scene(12, 3), 12), (HEIGHT, WIDTH, 3), SYCC), "sYCC", id="sycc-12"),
        pytest.param(codestream(np.zeros((8, 8, 5), np.uint8)), "5 components", id="5"),
        pytest.param(subsampled(), "subsampled", id="subsampled"),
        pytest.param(
            jp2(codestream(scene(8, 3)), (HEIGHT, WIDTH, 3), SRGB, definitions((0, COLOUR, 1))), "define", id="no-cdef"
        ),
    ],
)
def test_unsupported_jpeg_2000_files_say_why(data: bytes, expected: str) -> None:
    with pytest.raises(ImageError) as caught:
        decode(data, AS_RGB)
    assert caught.value.reason == "unsupported"
    assert expected in caught.value.detail and "save it" in caught.value.detail
