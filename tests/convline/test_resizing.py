"""Resizing, cropping and padding equal torchvision's and Pillow's to the pixel; version 1 gives what it always gave."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

from convline.images import ImageSpec, decode
from tests.serving.helpers import encode, exif

SIZES = [
    (480, 360),
    (360, 480),
    (37, 53),
    (1, 40),
    (90, 2),
    (33, 33),
    (31, 65),
    (64, 33),
    (7, 5),
    (100, 300),
    (641, 97),
]

GOLDEN = "b9805ac7e6e88dfd69664ae28d468396c1d88b63d8b6cc0f520db18a2aa9ec5b"


def picture(width: int, height: int) -> Image.Image:
    """A picture in which no two places are alike."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    return Image.fromarray(np.dstack([x * 7 % 256, y * 5 % 256, (x * 3 + y * 11) % 256]).astype(np.uint8))


def assert_equal(seen: NDArray[np.uint8], expected: Any, what: object) -> None:
    np.testing.assert_array_equal(seen, np.asarray(expected), err_msg=str(what))


@pytest.mark.parametrize("resample", ["bilinear", "bicubic", "box", "lanczos"])
@pytest.mark.parametrize(
    ("resize", "side"), [(None, 32), (None, 33), (37, 32), (36, 33), (256, 224), (32, 32), (30, 33)]
)
def test_crop_is_torchvisions_resize_and_center_crop(resize: int | None, side: int, resample: Any) -> None:
    wanted = Compose([Resize(resize or side, InterpolationMode(resample)), CenterCrop(side)])
    for size in SIZES if side < 200 else SIZES[:3]:
        image = picture(*size)
        spec = ImageSpec(side, side, 3, resample=resample, resize=resize)
        assert_equal(decode(encode(image, "PNG"), spec), wanted(image), size)


@pytest.mark.parametrize("resize", [48, 33, 20])
def test_a_crop_that_is_not_square_is_torchvisions(resize: int) -> None:
    for size in SIZES:
        image = picture(*size)
        expected = Compose([Resize(resize), CenterCrop((20, 31))])(image)
        assert_equal(decode(encode(image, "PNG"), ImageSpec(20, 31, 3, resize=resize)), expected, size)


def test_without_resize_the_smallest_size_that_covers_is_cropped() -> None:
    # by hand: (width, height) of the image, what it is resized to for 20 x 31 (height x width)
    for size, resized in [((62, 40), (31, 20)), ((62, 80), (31, 40)), ((100, 21), (95, 20)), ((10, 99), (31, 306))]:
        image = picture(*size)
        expected = CenterCrop((20, 31))(image.resize(resized, Image.Resampling.BILINEAR))
        assert_equal(decode(encode(image, "PNG"), ImageSpec(20, 31, 3)), expected, size)


@pytest.mark.parametrize("resample", ["bilinear", "bicubic"])
@pytest.mark.parametrize("target", [(32, 32), (33, 20), (20, 33), (64, 64)])
def test_pad_is_pillows_and_black(target: tuple[int, int], resample: Any) -> None:
    for size in SIZES:
        if max(size) / min(size) > 30:  # one side would become 0 pixels
            continue
        image = picture(*size)
        expected = ImageOps.pad(image, (target[1], target[0]), Image.Resampling[resample.upper()], color="black")
        assert_equal(decode(encode(image, "PNG"), ImageSpec(*target, 3, "pad", resample)), expected, size)


def test_a_very_wide_image_is_padded_and_keeps_a_pixel() -> None:
    seen = decode(encode(np.full((1, 3000), 200, np.uint8), "PNG"), ImageSpec(8, 8, 1, "pad"))[..., 0]
    assert (seen[4] == 200).all() and seen.sum() == 8 * 200


def test_padding_is_upright_and_of_one_channel() -> None:
    seen = decode(encode(np.full((4, 8), 200, np.uint8), "PNG", exif=exif(6)), ImageSpec(8, 8, 1, "pad"))
    np.testing.assert_array_equal(seen[..., 0], np.pad(np.full((8, 4), 200), ((0, 0), (2, 2))))


def test_an_image_of_the_crops_size_is_still_resized_first() -> None:
    image = picture(32, 32)
    expected = Compose([Resize(40), CenterCrop(32)])(image)
    assert_equal(decode(encode(image, "PNG"), ImageSpec(32, 32, 3, resize=40)), expected, "32x32")


@pytest.mark.parametrize("fields", [{"resize": 40}, {"fit": "pad"}, {"fit": "pad", "height": 20}])
@pytest.mark.parametrize("orientation", [1, 6])
def test_reduced_jpegs_are_resized_and_padded_to_nearly_the_same(fields: dict[str, Any], orientation: int) -> None:
    smooth = picture(9, 7).resize((900, 700), Image.Resampling.BICUBIC)
    data = encode(smooth, "JPEG", exif=exif(orientation))
    whole = ImageSpec(**{"height": 32, "width": 32, "channels": 3, **fields})
    reduced = ImageSpec(**{"height": 32, "width": 32, "channels": 3, "jpeg": "reduced", **fields})
    difference = np.abs(decode(data, whole).astype(int) - decode(data, reduced))
    assert 0 < difference.mean() < 1.5


def test_version_1_rounds_the_side_and_truncates_the_crop() -> None:
    # by hand: 480 x 360 becomes round(298.67) = 299 wide, and its crop begins at (299 - 224) // 2 = 37
    image = picture(480, 360)
    expected = image.resize((299, 224), Image.Resampling.BILINEAR).crop((37, 0, 37 + 224, 224))
    assert_equal(decode(encode(image, "PNG"), ImageSpec(224, 224, 3, version=1)), expected, "480x360")
    odd = picture(7, 4)
    assert_equal(decode(encode(odd, "PNG"), ImageSpec(4, 4, 3, version=1)), odd.crop((1, 0, 5, 4)), "7x4")


def test_files_of_version_1_are_decoded_to_the_same_bytes() -> None:
    # the hash of what the first release decoded
    whole = hashlib.sha256()
    for size in SIZES:
        for target, fit in (((32, 32), "crop"), ((20, 31), "crop"), ((33, 20), "stretch")):
            fields = {"height": target[0], "width": target[1], "channels": 3, "fit": fit, "resample": "bicubic"}
            whole.update(decode(encode(picture(*size), "PNG"), ImageSpec.from_dict({**fields, "version": 1})).tobytes())
    assert whole.hexdigest() == GOLDEN
