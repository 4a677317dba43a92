"""TIFF of all layouts: pixels equal to those of NumPy or tifffile, or `unsupported`."""

from __future__ import annotations

from io import BytesIO
from itertools import product
from typing import Any

import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray

from convline.errors import ImageError
from convline.images import ImageSpec, decode
from tests.convline.tiff_files import MINISBLACK, MINISWHITE, PALETTE, RGB, SEPARATED, tiff

AS_RGB = ImageSpec(None, None, 3)
COLOURS = {MINISWHITE: 1, MINISBLACK: 1, RGB: 3, SEPARATED: 4, PALETTE: 1}
IGNORED, ASSOCIATED, UNASSOCIATED = 0, 1, 2  # values of tag 338 for an extra sample

HEIGHT, WIDTH = 11, 13
RANDOM = np.random.default_rng(14)


def samples(bits: int, count: int) -> NDArray[Any]:
    """Random samples, with black and white among them."""
    values = RANDOM.integers(0, 1 << bits, (HEIGHT, WIDTH, count))
    values[0, :3], values[1, :3] = 0, (1 << bits) - 1
    return values


def seen(pixels: NDArray[Any], bits: int, photometric: int, extra: int | None) -> NDArray[Any]:
    """The RGB values of stored samples, on white: float [height, width, 3]."""
    levels = pixels * 255 / ((1 << bits) - 1)
    colour = levels[..., : COLOURS[photometric]]
    if photometric == MINISWHITE:
        colour = 255 - colour
    elif photometric == SEPARATED:
        colour = (255 - colour[..., :3]) * (255 - colour[..., 3:]) / 255
    alpha = levels[..., -1:]
    if extra == ASSOCIATED:
        colour = colour + 255 - alpha
    elif extra == UNASSOCIATED:
        colour = colour * alpha / 255 + 255 - alpha
    return np.broadcast_to(colour, (HEIGHT, WIDTH, 3))


def written(pixels: NDArray[Any], **options: Any) -> bytes:
    """A TIFF written by tifffile."""
    file = BytesIO()
    tifffile.imwrite(file, pixels, metadata=None, **options)
    return file.getvalue()


def refused(data: bytes) -> ImageError:
    with pytest.raises(ImageError) as caught:
        decode(data, AS_RGB)
    return caught.value


LAYOUTS = [
    *product((1, 2, 3, 4, 6, 8, 10, 12, 14, 16), (False, True), "<>", (False, True), (None, (16, 16), (4, 8)), (1, 2))
]


@pytest.mark.parametrize("stride", [11, pytest.param(1, marks=pytest.mark.slow)])  # with 11 every value still occurs
@pytest.mark.parametrize(
    ("photometric", "extra"),
    [
        *product((MINISWHITE, MINISBLACK, RGB, SEPARATED), (None, IGNORED, UNASSOCIATED)),
        *product((MINISBLACK, RGB), (ASSOCIATED,)),
    ],
)
def test_every_depth_and_layout_gives_its_pixels(photometric: int, extra: int | None, stride: int) -> None:
    colours = COLOURS[photometric]
    # 0.5 for rounding the sample, 0.5 for rounding black or alpha, and 0.5 for rounding their product
    close = 0.51 + (photometric == SEPARATED) + (extra in (ASSOCIATED, UNASSOCIATED))
    for bits, planar, order, deflate, tile, fill_order in LAYOUTS[::stride]:
        pixels = samples(bits, colours + (extra is not None))
        if extra == ASSOCIATED:
            pixels = np.minimum(pixels, pixels[..., -1:])
        more = [] if extra is None else [(338, [extra])]
        options: Any = {"order": order, "deflate": deflate, "tile": tile, "fill_order": fill_order, "more": more}
        data = tiff(pixels, bits, photometric, planar=planar and pixels.shape[2] > 1, **options)
        expected = seen(pixels, bits, photometric, extra)
        np.testing.assert_allclose(decode(data, AS_RGB), expected, atol=close, err_msg=f"{bits} {planar} {options}")


@pytest.mark.parametrize("compression", [None, "lzw", "zlib", "packbits", "zstd", "lzma"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_every_compression_and_predictor_gives_what_tifffile_wrote(dtype: Any, compression: str | None) -> None:
    largest = np.iinfo(dtype).max
    for planar, order, predictor, tile in product((False, True), "<>", (False, True), (None, (16, 16))):
        if predictor and compression in (None, "packbits"):
            continue
        pixels = np.linspace(0, largest, HEIGHT * WIDTH * 3).reshape(HEIGHT, WIDTH, 3).astype(dtype)
        data = written(
            pixels.transpose(2, 0, 1) if planar else pixels,
            photometric="rgb",
            planarconfig="separate" if planar else "contig",
            byteorder=order,
            compression=compression,
            predictor=predictor or None,
            tile=tile,
            rowsperstrip=None if tile else 4,
        )
        expected = tifffile.imread(BytesIO(data)).reshape(3 if planar else HEIGHT, -1, WIDTH if planar else 3)
        expected = expected.transpose(1, 2, 0) if planar else expected
        np.testing.assert_allclose(decode(data, AS_RGB), expected / largest * 255, atol=1)


@pytest.mark.parametrize("largest", [255, 65535], ids=["8-bit-map", "16-bit-map"])
@pytest.mark.parametrize("bits", [1, 2, 4, 5, 8])
def test_a_palette_of_either_depth_gives_its_colours(bits: int, largest: int) -> None:
    colours = RANDOM.integers(0, 256, (3, 1 << bits))
    indices = samples(bits, 1)
    stored = (colours * (largest // 255)).ravel().tolist()
    for order, tile in product("<>", (None, (16, 16))):
        data = tiff(indices, bits, PALETTE, order=order, tile=tile, more=[(320, stored)])
        np.testing.assert_array_equal(decode(data, AS_RGB), colours.T[indices[..., 0]])


def test_16_bits_are_rounded_and_12_bits_reach_white() -> None:
    levels = np.array([[0, 128, 129, 300, 65406, 65407, 65535]])[..., None]
    data = tiff(np.repeat(levels, 3, 2), 16, RGB, planar=True)
    np.testing.assert_array_equal(decode(data, AS_RGB)[0, :, 0], np.rint(levels[0, :, 0] / 257))
    assert (decode(tiff(np.full((8, 8, 1), 4095), 12, MINISBLACK), AS_RGB) == 255).all()


def test_samples_of_undefined_format_are_unsigned() -> None:
    pixels = samples(16, 1)
    data = tiff(pixels, 16, MINISBLACK, more=[(339, [4])])
    np.testing.assert_allclose(decode(data, AS_RGB), seen(pixels, 16, MINISBLACK, None), atol=0.5)


def test_an_uncompressed_tiff_may_have_wrong_byte_counts() -> None:
    pixels = samples(16, 1)
    data = tiff(pixels, 16, MINISBLACK)
    at = data.index(b"\x17\1\4\0\3\0\0\0")  # 279: three strips
    place = int.from_bytes(data[at + 8 : at + 12], "little")
    wrong = data[:place] + b"\xff\xff\0\0" * 3 + data[place + 12 :]
    missing = data[:at] + b"\x7f\xff" + data[at + 2 :]
    for changed in (wrong, missing):
        np.testing.assert_array_equal(decode(changed, AS_RGB), decode(data, AS_RGB))


def test_a_little_endian_bigtiff_is_read() -> None:
    pixels = samples(16, 3).astype(np.uint16)
    data = written(pixels.transpose(2, 0, 1), photometric="rgb", planarconfig="separate", bigtiff=True)
    np.testing.assert_allclose(decode(data, AS_RGB), pixels / 257, atol=0.5)


@pytest.mark.parametrize(
    "tag", [(274, 3, 1, 6, True), (700, 7, 43, b"<rdf tiff:Orientation = '6' xmlns:tiff='...'/>"[:43], True)]
)
def test_the_orientation_of_layouts_that_pillow_does_not_read_is_applied(tag: tuple[Any, ...]) -> None:
    pixels = samples(16, 3).astype(np.uint16)
    data = written(pixels.transpose(2, 0, 1), photometric="rgb", planarconfig="separate", extratags=[tag])
    np.testing.assert_allclose(decode(data, AS_RGB), np.rot90(pixels, -1) / 257, atol=0.5)


def rgb_of(kind: Any) -> NDArray[Any]:
    return np.ones((4, 4, 3), kind)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        pytest.param(written(rgb_of(np.float32), photometric="rgb"), "32-bit floats", id="float-rgb"),
        pytest.param(written(rgb_of(np.float32)[..., 0]), "32-bit floats", id="float-grey"),
        pytest.param(written(rgb_of(np.float16), photometric="rgb", compression="lzw"), "16-bit floats", id="half"),
        pytest.param(written(rgb_of(np.int8)[..., 0]), "8-bit signed", id="int8"),
        pytest.param(written(rgb_of(np.int16), photometric="rgb"), "16-bit signed", id="int16"),
        pytest.param(written(rgb_of(np.uint32), photometric="rgb"), "32 bits", id="uint32"),
        pytest.param(written(rgb_of(np.complex64)[..., 0]), "complex", id="complex"),
        pytest.param(written(rgb_of(np.uint8), photometric="cielab"), "CIELab", id="lab"),
        pytest.param(written(rgb_of(np.uint8)[..., 0], photometric="cfa"), "camera", id="cfa"),
        pytest.param(written(rgb_of(np.uint8), photometric="linear_raw"), "camera", id="linear-raw"),
        pytest.param(
            written(rgb_of(np.uint8), photometric="rgb", extratags=[(50706, 1, 4, b"\1\4\0\0", True)]), "raw", id="dng"
        ),
        pytest.param(tiff(samples(8, 3), 8, RGB, more=[(254, [1]), (330, [8])]), "raw", id="nef"),
        pytest.param(written(rgb_of(np.uint8), photometric="rgb", compression="jpegxl"), "50002", id="jpegxl"),
        pytest.param(
            written(rgb_of(np.uint16), photometric="rgb", compression="jpeg", bitspersample=12), "layout", id="jpeg-12"
        ),
        pytest.param(tiff(samples(8, 3), 8, 6), "YCbCr", id="ycbcr"),
        pytest.param(tiff(samples(8, 4), 8, SEPARATED, more=[(332, [2])]), "inks", id="inks"),
        pytest.param(tiff(samples(8, 2), 8, MINISWHITE, more=[(338, [1])]), "associated", id="associated-inverted"),
        pytest.param(tiff(samples(12, 1), 12, MINISBLACK, deflate=True, more=[(317, [2])]), "predictor", id="12-bit"),
    ],
)
def test_unsupported_tiff_files_say_why(data: bytes, expected: str) -> None:
    error = refused(data)
    assert error.reason == "unsupported" and expected in error.detail
    assert any(f"{verb} it" in error.detail for verb in ("save", "export", "convert"))


@pytest.mark.parametrize("options", [{"planar": True}, {"deflate": True}, {"tile": (4, 8)}])
def test_a_tiff_that_ends_too_early_is_truncated_wherever_it_ends(options: Any) -> None:
    data = tiff(samples(16, 3), 16, RGB, **options)
    # the tags come after the pixels here, and before them in files of tifffile
    early = written(samples(16, 3).astype(np.uint16), photometric="rgb", compression="zlib", rowsperstrip=3)
    assert {refused(data[:length]).reason for length in range(4, len(data), 7)} == {"truncated"}
    assert {refused(early[:length]).reason for length in range(4, len(early), 7)} == {"truncated"}


def test_a_huge_tiff_is_refused_by_its_tags() -> None:
    data = bytearray(tiff(samples(16, 3), 16, RGB))
    at = data.index(b"\0\1\4\0\1\0\0\0")  # its width
    data[at + 8 : at + 12] = b"\xff\xff\xff\0"
    data[at + 20 : at + 24] = b"\xff\xff\xff\0"
    assert refused(bytes(data)).reason == "too-large"
