"""Crops, flips, rotations and erased rectangles: torchvision's, for the same parameters, and its distributions."""

import numpy as np
import pytest
import torch
from scipy.stats import ks_2samp
from torchvision.transforms import RandomErasing, RandomResizedCrop, v2
from torchvision.transforms.v2 import functional

from pipeline.training.geometric_operations import (
    crop_and_flip,
    draw_crops,
    draw_erased,
    erase,
    resized_crop,
    rotation_matrices,
    transform,
)

DRAWS = 4000


def pictures(count: int, height: int, width: int, channels: int = 3) -> torch.Tensor:
    shape = (count, height, width, channels)
    return torch.from_numpy(np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8))


def torchvisions(images: torch.Tensor) -> torch.Tensor:
    """float [batch, channels, height, width]"""
    return images.permute(0, 3, 1, 2).float()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("stored", "size", "boxes"),
    [
        ((64, 48), (24, 32), [(0, 0, 64, 48), (3, 5, 24, 32), (10, 7, 5, 40), (60, 40, 4, 8), (1, 1, 63, 3)]),
        ((20, 20), (33, 7), [(0, 0, 20, 20), (19, 19, 1, 1), (2, 3, 11, 7)]),
        ((100, 30), (1, 1), [(0, 0, 100, 30), (99, 29, 1, 1), (20, 4, 31, 17)]),
        ((1, 1), (4, 3), [(0, 0, 1, 1)]),
        ((1, 9), (4, 3), [(0, 0, 1, 9), (0, 8, 1, 1)]),
    ],
)
def test_a_resized_crop_is_torchvisions(
    channels: int, stored: tuple[int, int], size: tuple[int, int], boxes: list[tuple[int, int, int, int]]
) -> None:
    images = pictures(len(boxes), *stored, channels)
    crops = torchvisions(resized_crop(images, torch.tensor(boxes).T, size))
    for image, crop, box in zip(torchvisions(images), crops, boxes, strict=True):
        expected = functional.resized_crop(image, *box, list(size), antialias=True)
        torch.testing.assert_close(crop, expected, atol=0.01, rtol=0)


def test_a_resized_crop_is_flipped_as_torchvision_flips() -> None:
    images, box = pictures(4, 30, 40), (2, 7, 25, 31)
    mirrored, upside_down = torch.tensor([False, True, False, True]), torch.tensor([False, False, True, True])
    crops = torchvisions(resized_crop(images, torch.tensor([box] * 4).T, (12, 15), mirrored, upside_down))
    expected = functional.resized_crop(torchvisions(images), *box, [12, 15], antialias=True)
    expected[1], expected[2] = expected[1].flip(2), expected[2].flip(1)
    expected[3] = expected[3].flip(1, 2)
    torch.testing.assert_close(crops, expected, atol=0.01, rtol=0)


def test_the_whole_image_at_its_own_size_is_unchanged() -> None:
    images = pictures(2, 9, 13)
    torch.testing.assert_close(resized_crop(images, torch.tensor([[0, 0, 9, 13]] * 2).T, (9, 13)), images.float())


@pytest.mark.parametrize(
    ("size", "scale", "ratio"),
    [((50, 80), (0.08, 1.0), (3 / 4, 4 / 3)), ((20, 90), (0.5, 1.0), (3 / 4, 4 / 3)), ((64, 64), (0.2, 0.4), (1, 3))],
)
def test_crops_have_torchvisions_distribution(
    size: tuple[int, int], scale: tuple[float, float], ratio: tuple[float, float]
) -> None:
    torch.manual_seed(0)
    image = torch.empty(1, *size)
    expected = np.array([RandomResizedCrop.get_params(image, list(scale), list(ratio)) for _ in range(DRAWS)])
    drawn = draw_crops(np.random.default_rng(0), DRAWS, size, scale, ratio)
    for mine, theirs in zip(drawn, expected.T, strict=True):
        assert ks_2samp(mine, theirs).statistic < 0.045  # 99.9% of such samples of one distribution
    top, left, height, width = drawn
    assert (top >= 0).all() and (left >= 0).all() and (height > 0).all() and (width > 0).all()
    assert (top + height <= size[0]).all() and (left + width <= size[1]).all()


@pytest.mark.parametrize(
    ("size", "scale", "ratio"),
    [((10, 100), (1.0, 1.0), (0.9, 1.1)), ((100, 10), (1.0, 1.0), (0.9, 1.1)), ((8, 8), (0.001, 0.001), (1.0, 1.0))],
)
def test_where_no_crop_fits_it_is_torchvisions_central_one(
    size: tuple[int, int], scale: tuple[float, float], ratio: tuple[float, float]
) -> None:
    expected = RandomResizedCrop.get_params(torch.empty(1, *size), list(scale), list(ratio))
    drawn = draw_crops(np.random.default_rng(0), 5, size, scale, ratio)
    np.testing.assert_array_equal(drawn.T, [expected] * 5)


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (2, 1)])
def test_tiny_images_have_crops(size: tuple[int, int]) -> None:
    top, left, height, width = draw_crops(np.random.default_rng(0), 300, size, (0.08, 1.0), (3 / 4, 4 / 3))
    assert (height >= 1).all() and (width >= 1).all()
    assert (top + height <= size[0]).all() and (left + width <= size[1]).all()


def test_a_crop_is_turned_upside_down_where_asked() -> None:
    images, nothing = pictures(2, 6, 5), torch.zeros(2, dtype=torch.long)
    crops = crop_and_flip(images, nothing, nothing, (4, 5), torch.tensor([False, True]), torch.tensor([True, True]))
    assert torch.equal(crops[0], images[0, :4].flip(0))
    assert torch.equal(crops[1], images[1, :4].flip(0, 1))


@pytest.mark.parametrize("size", [(24, 24), (15, 40), (33, 12), (1, 1), (1, 5)])
def test_a_rotation_is_torchvisions(size: tuple[int, int]) -> None:
    angles = np.array([-180.0, -45, -30.5, 0, 7, 90, 123])
    images = pictures(len(angles), *size)
    matrices = torch.from_numpy(rotation_matrices(angles)).float()
    turned = torchvisions(transform(images, matrices, "bilinear"))
    bilinear = v2.InterpolationMode.BILINEAR
    for image, mine, angle in zip(torchvisions(images), turned, angles, strict=True):
        torch.testing.assert_close(mine, functional.rotate(image, float(angle), bilinear), atol=0.02, rtol=0)


@pytest.mark.parametrize("size", [(40, 40), (20, 90), (3, 3), (1, 1)])
def test_erased_boxes_have_torchvisions_distribution(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    image = torch.empty(1, *size)
    drawn = draw_erased(np.random.default_rng(0), DRAWS, size, 1.0)
    expected = np.array([RandomErasing.get_params(image, (0.02, 0.33), (0.3, 3.3), [0.0])[:4] for _ in range(DRAWS)])
    if size == (1, 1):  # torchvision erases the image by itself, that is nothing
        assert not drawn[2:].any()
        return
    expected[(expected[:, 2] == size[0]) & (expected[:, 3] == size[1])] = 0
    for mine, theirs in zip(drawn, expected.T, strict=True):
        assert ks_2samp(mine, theirs).statistic < 0.045


def test_a_share_of_the_images_is_erased() -> None:
    *_, height, width = draw_erased(np.random.default_rng(0), DRAWS, (32, 32), 0.3)
    assert np.mean((height > 0) & (width > 0)) == pytest.approx(0.3, abs=0.03)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_erasing_sets_the_box_to_black(dtype: torch.dtype) -> None:
    images = torch.full((3, 6, 8, 3), 200, dtype=dtype)
    erased = erase(images, torch.tensor([[1, 2, 3, 4], [0, 0, 0, 0], [0, 7, 6, 1]]).T)
    expected = images.clone()
    expected[0, 1:4, 2:6] = 0
    expected[2, :, 7] = 0
    assert torch.equal(erased, expected) and erased.dtype == dtype
