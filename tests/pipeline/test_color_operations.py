"""Colour jitter: torchvision's, for the same parameters."""

from collections.abc import Mapping
from itertools import permutations

import numpy as np
import pytest
import torch
from scipy.stats import kstest
from torchvision.transforms.v2 import functional

from pipeline.recipe_sections import ColorJitter
from pipeline.training.color_operations import (
    BRIGHTNESS,
    CONTRAST,
    HUE,
    SATURATION,
    JitterDraws,
    adjust_brightness,
    adjust_contrast,
    color_jitter,
    draw_jitter,
    turn_hue,
)
from tests.golden import fixed
from tests.models.test_golden import golden  # noqa: F401

TORCHVISION = {
    BRIGHTNESS: functional.adjust_brightness,
    CONTRAST: functional.adjust_contrast,
    SATURATION: functional.adjust_saturation,
    HUE: functional.adjust_hue,
}
EVERY_ORDER = np.array(list(permutations(range(4)))).T  # [4, 24]


def pictures(count: int, channels: int = 3, size: tuple[int, int] = (9, 11)) -> torch.Tensor:
    """Random pixels, some of them black, white, grey, or with two channels alike."""
    images = np.random.default_rng(2).integers(0, 256, (count, *size, channels), dtype=np.uint8)
    images[:, 0, 0], images[:, 0, -1] = 0, 255
    images[:, -1, 0] = images[:, -1, 0, :1]
    images[:, -1, -1, :2] = images[:, -1, -1, :1]
    return torch.from_numpy(images)


def jittered_by_torchvision(image: torch.Tensor, order: np.ndarray, amounts: np.ndarray) -> torch.Tensor:
    x = image.permute(2, 0, 1) / 255
    for operation in order:
        x = TORCHVISION[operation](x, float(amounts[operation]))
    return 255 * x.permute(1, 2, 0)


def test_brightness_is_tensorflows(golden: Mapping[str, np.ndarray]) -> None:  # noqa: F811
    images = torch.from_numpy(fixed.pictures())
    np.testing.assert_allclose(
        adjust_brightness(images, torch.tensor(fixed.BRIGHTNESS)), golden["brightness"], rtol=1e-6
    )


def test_contrast_is_tensorflows(golden: Mapping[str, np.ndarray]) -> None:  # noqa: F811
    images = torch.from_numpy(fixed.pictures())
    np.testing.assert_allclose(adjust_contrast(images, torch.tensor(fixed.CONTRAST)), golden["contrast"], atol=1e-4)


@pytest.mark.parametrize("size", [(9, 11), (1, 1)])
@pytest.mark.parametrize("channels", [1, 3])
def test_colour_jitter_is_torchvisions_in_every_order(channels: int, size: tuple[int, int]) -> None:
    images = pictures(24, channels, size)
    amounts = np.random.default_rng(3).uniform([0, 0, 0, -0.5], [2, 2, 2, 0.5], (24, 4)).T
    changed = color_jitter(images, JitterDraws(EVERY_ORDER, amounts))
    for image, mine, order, amount in zip(images, changed, EVERY_ORDER.T, amounts.T, strict=True):
        torch.testing.assert_close(mine, jittered_by_torchvision(image, order, amount), atol=0.01, rtol=0)


@pytest.mark.parametrize("operation", [BRIGHTNESS, CONTRAST, SATURATION, HUE])
def test_one_operation_alone_is_torchvisions(operation: int) -> None:
    images, amounts = pictures(3), np.full((4, 3), 0.3)
    changed = color_jitter(images, JitterDraws(np.full((1, 3), operation), amounts))
    expected = torch.stack([jittered_by_torchvision(image, np.array([operation]), amounts[:, 0]) for image in images])
    torch.testing.assert_close(changed, expected, atol=0.01, rtol=0)


@pytest.mark.parametrize("operation", [SATURATION, HUE])
def test_grey_images_have_no_colour_to_change(operation: int) -> None:
    images = pictures(3, channels=1)
    assert torch.equal(color_jitter(images, JitterDraws(np.full((1, 3), operation), np.full((4, 3), 0.3))), images)


def test_every_turn_of_the_hue_is_torchvisions() -> None:
    turns = torch.linspace(-0.5, 0.5, 41)
    images = pictures(41)
    expected = [functional.adjust_hue(i.permute(2, 0, 1) / 255, float(t)) for i, t in zip(images, turns, strict=True)]
    mine = turn_hue(images.float(), turns).permute(0, 3, 1, 2)
    torch.testing.assert_close(mine, 255 * torch.stack(expected), atol=0.01, rtol=0)


def test_colour_jitter_does_not_change_its_argument() -> None:
    images = pictures(4).float()
    before = images.clone()
    color_jitter(images, JitterDraws(EVERY_ORDER[:, -4:], np.full((4, 4), 0.4)))
    assert torch.equal(images, before)


def test_factors_turns_and_orders_are_uniform() -> None:
    settings = ColorJitter(brightness=0.4, contrast=1.5, saturation=0.2, hue=0.1)
    order, amounts = draw_jitter(np.random.default_rng(0), 4800, settings)
    for amount, lowest, highest in zip(amounts, (0.6, 0, 0.8, -0.1), (1.4, 2.5, 1.2, 0.1), strict=True):
        assert kstest(amount, "uniform", (lowest, highest - lowest)).pvalue > 1e-3
    orders, counts = np.unique(order, axis=1, return_counts=True)
    assert orders.shape == (4, 24) and counts.min() > 140 and counts.max() < 260  # 200 each


def test_only_operations_that_are_on_are_drawn() -> None:
    order, _ = draw_jitter(np.random.default_rng(0), 100, ColorJitter(saturation=0.5, brightness=0.5))
    assert {tuple(each) for each in order.T} == {(BRIGHTNESS, SATURATION), (SATURATION, BRIGHTNESS)}
