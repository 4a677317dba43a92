import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from models.preprocessing import Preprocessing
from pipeline.recipe import AugmentSection, load
from pipeline.train import train
from pipeline.training.augmentations import Augmentations, adjust_brightness, adjust_contrast
from tests.conftest import Cli
from tests.golden import fixed
from tests.models.test_golden import golden  # noqa: F401

COUNT = 400


def numbered(height: int, width: int) -> torch.Tensor:
    """Images whose pixels hold their position: channel 0 the row, channel 1 the column, channel 2 the image."""
    images = np.zeros((COUNT, height, width, 3), np.uint8)
    images[..., 0] = np.arange(height)[:, None] + 1
    images[..., 1] = np.arange(width) + 1
    images[..., 2] = np.arange(COUNT)[:, None, None] % 251 + 1
    return torch.from_numpy(images)


def augmented(images: torch.Tensor, crop: int | None = None, seed: int = 0, step: int = 0, **options: Any) -> Any:
    preprocessing = Preprocessing((images.shape[1], images.shape[2]), crop)
    return Augmentations(AugmentSection(**options), preprocessing, seed, len(images))(images, step)


def test_brightness_is_tensorflows(golden: Mapping[str, np.ndarray]) -> None:  # noqa: F811
    images = torch.from_numpy(fixed.pictures())
    np.testing.assert_allclose(
        adjust_brightness(images, torch.tensor(fixed.BRIGHTNESS)), golden["brightness"], rtol=1e-6
    )


def test_contrast_is_tensorflows(golden: Mapping[str, np.ndarray]) -> None:  # noqa: F811
    images = torch.from_numpy(fixed.pictures())
    np.testing.assert_allclose(adjust_contrast(images, torch.tensor(fixed.CONTRAST)), golden["contrast"], atol=1e-4)


def test_a_random_crop_is_a_crop_at_any_position_of_the_image() -> None:
    images = numbered(7, 9)
    crops = augmented(images, crop=4, random_crop=True)
    assert crops.shape == (COUNT, 4, 4, 3)
    positions = set()
    for number, crop in enumerate(crops):
        top, left = int(crop[0, 0, 0]) - 1, int(crop[0, 0, 1]) - 1
        assert torch.equal(crop, images[number, top : top + 4, left : left + 4])
        positions.add((top, left))
    assert positions == {(top, left) for top in range(4) for left in range(6)}


def test_half_of_the_images_are_flipped() -> None:
    images = numbered(4, 6)
    mirrored = [torch.equal(new, old.flip(1)) for new, old in zip(augmented(images, flip=True), images, strict=True)]
    unchanged = [torch.equal(new, old) for new, old in zip(augmented(images, flip=True), images, strict=True)]
    assert sum(mirrored) + sum(unchanged) == COUNT
    assert 0.4 * COUNT < sum(mirrored) < 0.6 * COUNT


def test_a_padded_crop_sees_black_beyond_the_border() -> None:
    images = numbered(5, 5)
    crops = augmented(images, random_crop=True, padding=2)
    assert crops.shape == images.shape
    padded = np.pad(images.numpy(), ((0, 0), (2, 2), (2, 2), (0, 0)))
    positions = set()
    for number, crop in enumerate(crops.numpy()):
        fits = [(t, x) for t in range(5) for x in range(5) if (crop == padded[number, t : t + 5, x : x + 5]).all()]
        assert len(fits) == 1
        positions.add(fits[0])
    assert positions == {(top, left) for top in range(5) for left in range(5)}


def test_brightness_and_contrast_are_drawn_for_each_image_from_the_whole_range() -> None:
    images = torch.full((COUNT, 2, 2, 3), 100, dtype=torch.uint8)
    images[:, 0] = 120
    brighter = augmented(images, brightness=63.0)
    shifts = brighter - images
    assert shifts.amax() <= 63 and shifts.amin() >= -63
    assert torch.allclose(shifts, shifts[:, :1, :1, :1].expand_as(shifts), atol=1e-4)
    assert len(shifts[:, 0, 0, 0].unique()) > COUNT // 2
    assert abs(float(shifts.mean())) < 8 and float(shifts[:, 0, 0, 0].std()) == pytest.approx(63 / 3**0.5, rel=0.1)
    factors = (augmented(images, contrast=(0.2, 1.8))[:, 0, 0, 0] - 110) / 10
    assert 0.2 <= factors.amin() < 0.25 and 1.75 < factors.amax() <= 1.8


def test_without_augmentations_training_sees_what_evaluation_sees() -> None:
    images = numbered(7, 9)
    assert torch.equal(augmented(images, crop=4), Preprocessing((7, 9), 4).cropped(images))


def test_augmentations_are_a_function_of_seed_and_step() -> None:
    images, all_on = numbered(8, 8), {"random_crop": True, "flip": True, "brightness": 63.0, "contrast": (0.2, 1.8)}
    first = augmented(images, 5, seed=1, step=7, **all_on)
    assert torch.equal(first, augmented(images, 5, seed=1, step=7, **all_on))
    assert not torch.equal(first, augmented(images, 5, seed=1, step=8, **all_on))
    assert not torch.equal(first, augmented(images, 5, seed=2, step=7, **all_on))


def test_training_sees_augmented_images(project: Path, tmp_path: Path) -> None:
    """Brightness changes by up to half of the range: the loss before the first update differs."""
    first = []
    for brightness in (0.0, 127.0):
        settings = ["train.steps=1", f"augment.brightness={brightness}"]
        run = train(load("digits", settings), tmp_path / str(brightness), project / "data", tracking=False)
        points = map(json.loads, run.metrics.read_text().splitlines())
        first.append(next(point["loss"] for point in points if "loss" in point))
    assert first[0] != pytest.approx(first[1], rel=0.01)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("augment.contrast=[1.8,0.2]", "contrast is [lowest, highest]"),
        ("augment.contrast=[0.2]", "augment.contrast"),
        ("augment.random_crop=true", "random_crop has no effect"),
        ("augment.padding=4", "random_crop = true"),
        ("augment.brightnes=63", "augment accepts random_crop, padding, flip, brightness, contrast"),
    ],
)
def test_an_invalid_augmentation_is_refused(cli: Cli, setting: str, message: str) -> None:
    assert message in cli("pipeline", "train", "digits", "--set", setting, "--tracking", "none", status=1).stderr
