import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from models.preprocessing import Preprocessing
from pipeline.dataset import Dataset
from pipeline.network import build_network
from pipeline.recipe import load
from pipeline.recipe_sections import AugmentSection
from pipeline.train import train
from pipeline.training.augmentations import Augmentations
from pipeline.training.distributed import join
from pipeline.training.training_state import TrainingState
from tests.conftest import Cli

COUNT = 400

JITTER = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1}
ALONE: dict[str, dict[str, Any]] = {
    "random_crop": {"random_crop": True, "padding": 2},
    "resized_crop": {"resized_crop": {}},
    "reflection": {"random_crop": True, "padding": 2, "padding_mode": "reflect"},
    "flip": {"flip": True},
    "vertical_flip": {"vertical_flip": True},
    "rotate": {"rotate": 30.0},
    "trivial": {"trivial": True},
    "color_jitter": {"color_jitter": JITTER},
    "erasing": {"erasing": 0.9},
    "mixup": {"mixup": 0.5},
    "cutmix": {"cutmix": 1.0},
    "mixup and cutmix": {"mixup": 0.5, "cutmix": 1.0},
}
MIXING = {"mixup", "cutmix", "mixup and cutmix"}
CROPS = {"random_crop", "reflection"}  # resized_crop excludes them
EVERYTHING = {key: value for name in ALONE if name not in CROPS for key, value in ALONE[name].items()}
TOGETHER = ALONE | {
    "resized_crop and flips": {"resized_crop": {}, "flip": True, "vertical_flip": True},
    "all": EVERYTHING,
}


def numbered(height: int, width: int) -> torch.Tensor:
    """Images whose pixels hold their position: channel 0 the row, channel 1 the column, channel 2 the image."""
    images = np.zeros((COUNT, height, width, 3), np.uint8)
    images[..., 0] = np.arange(height)[:, None] + 1
    images[..., 1] = np.arange(width) + 1
    images[..., 2] = np.arange(COUNT)[:, None, None] % 251 + 1
    return torch.from_numpy(images)


def pictures(count: int, size: tuple[int, int], channels: int) -> torch.Tensor:
    shape = (count, *size, channels)
    return torch.from_numpy(np.random.default_rng(6).integers(0, 256, shape, dtype=np.uint8))


def augmented(images: torch.Tensor, crop: int | None = None, seed: int = 0, step: int = 0, **options: Any) -> Any:
    preprocessing = Preprocessing((images.shape[1], images.shape[2]), crop)
    return Augmentations(AugmentSection(**options), preprocessing, seed, len(images))(images, step)


def augmented_and_mixed(images: torch.Tensor, name: str, seed: int = 0, step: int = 0) -> torch.Tensor:
    preprocessing = Preprocessing((images.shape[1], images.shape[2]))
    augment = Augmentations(AugmentSection(**ALONE[name]), preprocessing, seed, len(images))
    result = augment(images, step)
    return augment.mix(result, torch.arange(len(images)), step)[0] if augment.needs_whole_batch else result


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


def test_a_reflecting_border_is_numpys() -> None:
    images = pictures(COUNT, (5, 7), 3)
    crops = augmented(images, random_crop=True, padding=3, padding_mode="reflect").numpy()
    padded = np.pad(images.numpy(), ((0, 0), (3, 3), (3, 3), (0, 0)), "reflect")
    positions = set()
    for number, crop in enumerate(crops):
        fits = [(t, x) for t in range(7) for x in range(7) if (crop == padded[number, t : t + 5, x : x + 7]).all()]
        assert len(fits) == 1
        positions.add(fits[0])
    assert positions == {(top, left) for top in range(7) for left in range(7)}


def test_half_of_the_images_are_turned_upside_down() -> None:
    images = numbered(4, 6)
    pairs = list(zip(augmented(images, vertical_flip=True), images, strict=True))
    upside_down = sum(torch.equal(new, old.flip(0)) for new, old in pairs)
    assert upside_down + sum(torch.equal(new, old) for new, old in pairs) == COUNT
    assert 0.4 * COUNT < upside_down < 0.6 * COUNT


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


@pytest.mark.parametrize("name", ALONE)
def test_augmentations_are_a_function_of_seed_and_step(name: str) -> None:
    images = pictures(8, (12, 16), 3)
    first = augmented_and_mixed(images, name, seed=1, step=7)
    assert torch.equal(first, augmented_and_mixed(images, name, seed=1, step=7))
    assert not torch.equal(first, augmented_and_mixed(images, name, seed=1, step=8))
    assert not torch.equal(first, augmented_and_mixed(images, name, seed=2, step=7))


@pytest.mark.parametrize("name", ALONE)
def test_each_image_has_its_own_draw(name: str) -> None:
    """Of 40 copies of an image, few are alike. Those that are mixed have different partners."""
    images = pictures(40, (12, 16), 3)
    if name not in MIXING:
        images = images[:1].repeat(40, 1, 1, 1)
    different = len(augmented_and_mixed(images, name).flatten(1).unique(dim=0))
    assert different == {"flip": 2, "vertical_flip": 2}.get(name, different)
    assert different > 12 or name in ("flip", "vertical_flip")


@pytest.mark.parametrize("name", TOGETHER)
@pytest.mark.parametrize("channels", [1, 3])
def test_shares_together_are_the_whole_batch(name: str, channels: int) -> None:
    images, labels = pictures(9, (12, 16), channels), torch.arange(9)
    settings, preprocessing = AugmentSection(**TOGETHER[name]), Preprocessing((12, 16), 10)
    whole = Augmentations(settings, preprocessing, 3, 9)
    expected = whole(images, 5)
    if whole.needs_whole_batch:
        expected, expected_labels = whole.mix(expected, labels, 5)
    for share in (slice(0, 4), slice(4, 9)):
        part = Augmentations(settings, preprocessing, 3, 9, share)
        if part.needs_whole_batch:
            mine, mixed_labels = part.mix(part(images, 5), labels, 5)
            for one, other in zip(mixed_labels, expected_labels, strict=True):
                assert torch.equal(one, other[share])
        else:
            mine = part(images[share], 5)
        assert torch.equal(mine, expected[share])


@pytest.mark.parametrize("name", TOGETHER)
@pytest.mark.parametrize(("size", "crop"), [((12, 16), 10), ((1, 1), None), ((1, 9), None), ((3, 2), 1)])
@pytest.mark.parametrize("channels", [1, 3])
def test_images_of_any_size_stay_images(name: str, size: tuple[int, int], crop: int | None, channels: int) -> None:
    images = pictures(6, size, channels)
    augment = Augmentations(AugmentSection(**TOGETHER[name]), Preprocessing(size, crop), 3, 6)
    for step in range(5):
        result = augment(images, step)
        if augment.needs_whole_batch:
            result, _ = augment.mix(result, torch.arange(6), step)
        assert result.shape == (6, *(size if crop is None else (crop, crop)), channels)
        assert result.dtype in (torch.uint8, torch.float32)
        assert result.isfinite().all() and result.min() >= 0 and result.max() <= 255


# SHA-256 of the images of steps 0 and 7, recorded when these were the only augmentations
RECORDED: dict[tuple[int, str], tuple[str, dict[str, Any], int | None]] = {
    (1, "random_crop, flip"): ("438b66a945cedfae", {"random_crop": True, "flip": True}, 8),
    (1, "padding"): ("41d5249ac3108af9", {"random_crop": True, "padding": 2}, None),
    (1, "flip"): ("99228563ba76ef06", {"flip": True}, 9),
    (3, "random_crop, flip"): ("002db02f29546696", {"random_crop": True, "flip": True}, 8),
    (3, "padding"): ("71d5d1f2b479c2b1", {"random_crop": True, "padding": 2}, None),
    (3, "flip"): ("0cba686d9afab71f", {"flip": True}, 9),
}


@pytest.mark.parametrize(("channels", "name"), RECORDED)
def test_runs_of_earlier_versions_see_the_same_crops_and_flips(channels: int, name: str) -> None:
    expected, options, crop = RECORDED[channels, name]
    n, h, w = np.ogrid[:12, :11, :13]
    formula = [(n * 37 + h * (11 + c) + w * w * (5 + c) + h * w) % 256 for c in range(channels)]
    images = torch.from_numpy(np.stack(formula, -1).astype(np.uint8))
    seen = b"".join(np.ascontiguousarray(augmented(images, crop, 5, step, **options)).tobytes() for step in (0, 7))
    assert hashlib.sha256(seen).hexdigest()[:16] == expected


def test_runs_of_earlier_versions_see_the_same_brightness_and_contrast() -> None:
    images = pictures(6, (5, 5), 3)
    draws = np.random.default_rng([4, 3, 7]).random((5, 6))  # seed, stream, step
    delta, factor = 63 * (2 * draws[3] - 1), 0.2 + draws[4] * 1.6
    brighter = images.numpy() + delta[:, None, None, None]
    mean = brighter.mean((1, 2), keepdims=True)
    expected = (brighter - mean) * factor[:, None, None, None] + mean
    seen = augmented(images, seed=4, step=7, brightness=63.0, contrast=(0.2, 1.8))
    np.testing.assert_allclose(seen, expected, atol=1e-3)


@pytest.mark.parametrize("name", TOGETHER)
def test_no_augmentation_waits_for_a_gpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On fake CUDA tensors, whatever needs a value on the host raises, and so do two devices in one operation."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    with FakeTensorMode():
        images = torch.empty((6, 12, 16, 3), dtype=torch.uint8, device="cuda")
        augment = Augmentations(AugmentSection(**TOGETHER[name]), Preprocessing((12, 16), 10), 3, 6)
        result = augment(images, 0)
        if augment.needs_whole_batch:
            result, labels = augment.mix(result, torch.empty(6, dtype=torch.long, device="cuda"), 0)
            assert {each.device.type for each in labels} == {"cuda"}
        assert result.device.type == "cuda" and result.shape == (6, 10, 10, 3)


def test_flips_and_resized_crop_are_drawn_as_for_other_crops() -> None:
    """A crop of the whole image is the image, flipped as without it."""
    images = pictures(20, (12, 16), 3)
    whole = {"scale": (1.0, 1.0), "ratio": (16 / 12, 16 / 12)}
    expected = augmented(images, flip=True, vertical_flip=True).float()
    resized = augmented(images, flip=True, vertical_flip=True, resized_crop=whole)
    torch.testing.assert_close(resized, expected, atol=1e-3, rtol=0)


def test_alternating_flips_mirror_each_image_in_every_other_pass(project: Path, tmp_path: Path) -> None:
    """What a training sees of each image in four passes, whose batches begin and end within them."""
    settings = ["train.batch_size=100", "train.steps=1", "augment.flip=alternating", "train.seed=3"]
    run = train(load("digits", settings), tmp_path / "run", project / "data", tracking=False)
    dataset = Dataset.open(project / "data", "digits")
    served = build_network(run.recipe, run.info["dataset"])
    with join("cpu") as ranks:
        training = TrainingState.create(run, dataset, served, [], torch.device("cpu"), ranks)
    split = training.split
    count = len(split)
    originals = served.preprocessing(torch.from_numpy(split.images[split.rows]))
    mirrored: dict[int, list[bool]] = {image: [] for image in range(count)}
    for step in range(4 * count // 100 + 1):
        inputs = training.load(step).inputs
        for image, seen in zip(training.batches.positions(step), inputs, strict=True):
            original = originals[image]
            assert torch.equal(seen, original) != torch.equal(seen, original.flip(2))  # no digit is symmetric
            mirrored[image].append(torch.equal(seen, original.flip(2)))
    assert all(flips[:4] in ([True, False] * 2, [False, True] * 2) for flips in mirrored.values())
    assert 0.4 * count < sum(flips[0] for flips in mirrored.values()) < 0.6 * count


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
        ("augment.padding_mode=reflect", "padding_mode has no effect without padding"),
        ("augment.flip=sometimes", 'augment.flip: use true, false or "alternating"'),
        ("augment.brightnes=63", "augment accepts random_crop, padding, padding_mode, resized_crop, flip"),
    ],
)
def test_an_invalid_augmentation_is_refused(cli: Cli, setting: str, message: str) -> None:
    assert message in cli("pipeline", "train", "digits", "--set", setting, "--tracking", "none", status=1).stderr
