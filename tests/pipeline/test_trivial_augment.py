"""TrivialAugment: torchvision's operations for the same strengths, and its table of strengths."""

import numpy as np
import pytest
import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import InterpolationMode

from pipeline.training.trivial_augment import OPERATIONS, SIGNED, STRENGTHS, draw_trivial, trivial_augment

TORCHVISION = v2.TrivialAugmentWide()


def strengths_of(name: str) -> list[float]:
    """torchvision's strengths of an operation, with both signs where it has a sign."""
    magnitudes, signed = TORCHVISION._AUGMENTATION_SPACE[name]
    table = magnitudes(STRENGTHS, 32, 32)
    values = [0.0] if table is None else table.tolist()
    return values + [-value for value in values] if signed else values


def pictures(count: int, size: tuple[int, int], channels: int) -> torch.Tensor:
    """Smooth images with noise, whose values lie between 20 and 220; one has a single value."""
    y, x = np.ogrid[: size[0], : size[1]]
    smooth = 120 + 80 * np.sin(y / 5)[..., None] * np.cos(x[..., None] / 7 + np.arange(channels))
    noise = np.random.default_rng(4).normal(0, 8, (count, *size, channels))
    images = np.clip(smooth + noise, 20, 220).astype(np.uint8)
    images[-1] = 77
    return torch.from_numpy(images)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(32, 32), (17, 41), (1, 1), (2, 3)])
@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_is_torchvisions_for_every_strength(name: str, size: tuple[int, int], channels: int) -> None:
    strengths = strengths_of(name)
    images = pictures(len(strengths), size, channels)
    changed = trivial_augment(images, np.full(len(strengths), OPERATIONS.index(name)), np.array(strengths))
    expected = [
        TORCHVISION._apply_image_or_video_transform(
            image.permute(2, 0, 1), name, strength, InterpolationMode.NEAREST, TORCHVISION._fill
        )
        for image, strength in zip(images, strengths, strict=True)
    ]
    difference = (changed.permute(0, 3, 1, 2).int() - torch.stack(expected).int()).abs()
    assert changed.dtype == torch.uint8
    # sums in another order round a few values to the next byte, or a few places to the next pixel
    assert difference.max() <= 1 or name == "Rotate"
    assert (difference > 0).float().mean() < 0.005 or min(size) < 3


def test_operations_of_a_batch_do_not_mix() -> None:
    rng = np.random.default_rng(0)
    images = pictures(60, (16, 20), 3)
    operations, strengths = draw_trivial(rng, 60)
    together = trivial_augment(images, operations, strengths)
    for number in range(60):
        row = slice(number, number + 1)
        alone = trivial_augment(images[row], operations[row], strengths[row])
        assert (together[row] != alone).float().mean() < 0.005


def test_operations_and_strengths_are_uniform() -> None:
    operations, strengths = draw_trivial(np.random.default_rng(0), 28000)
    counts = np.bincount(operations, minlength=14)
    assert len(counts) == 14 and counts.min() > 1800 and counts.max() < 2200  # 2000 each
    for number, name in enumerate(OPERATIONS):
        drawn = strengths[operations == number]
        assert set(drawn) == set(strengths_of(name))
        if name in SIGNED:
            assert np.mean(drawn < 0) == pytest.approx(0.5 * 30 / 31, abs=0.05)


def test_floats_are_rounded_to_bytes() -> None:
    images = torch.tensor([-3.0, 0.4, 99.6, 270.0]).view(1, 2, 2, 1)
    same = trivial_augment(images, np.array([OPERATIONS.index("Identity")]), np.zeros(1))
    assert same.dtype == torch.uint8 and same.flatten().tolist() == [0, 0, 100, 255]
