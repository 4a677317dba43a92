"""Maps of where a network looked, on images whose class is the colour of a patch."""

import numpy as np
import pytest
import torch

from pipeline.network import load_network, predictor
from pipeline.recipe import load
from pipeline.reporting.occlusion import occlusion_map, overlay
from pipeline.run import Run
from pipeline.train import train
from tests.pipeline.small_datasets import write_dataset

SIDE, PATCH = 32, 8


def patched(count: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Noise with a bright patch, red or blue, at a place of its own; the labels, and top and left of the patches."""
    rng = np.random.default_rng(seed)
    images = rng.integers(60, 190, (count, SIDE, SIDE, 3), np.uint8)
    labels, places = rng.integers(0, 2, count), rng.integers(0, SIDE - PATCH + 1, (count, 2))
    for image, label, (top, left) in zip(images, labels, places, strict=True):
        image[top : top + PATCH, left : left + PATCH] = (250, 20, 20) if label else (20, 20, 250)
    return images, labels, places


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("patches")
    splits = {split: patched(count, seed)[:2] for split, count, seed in (("train", 600, 1), ("test", 20, 2))}
    write_dataset(folder / "data", "patches", splits)
    recipe = load("digits", ["data.dataset=patches", "train.steps=250", "train.evaluate_every=0", "data.validation=0"])
    return train(recipe, folder / "run", folder / "data", "cpu", tracking=False)


def test_the_map_is_brightest_where_the_patch_is(run: Run) -> None:
    predict = predictor(load_network(run)[0], torch.device("cpu"))
    images, labels, places = patched(40, 3)
    probability, _ = predict(images)
    assert (probability.argmax(1) == labels).mean() > 0.95
    hits = 0
    for image, label, (top, left) in zip(images, probability.argmax(1), places, strict=True):
        fall = occlusion_map(predict, image, int(label))
        assert fall.shape == (SIDE, SIDE)
        row, column = np.unravel_index(fall.argmax(), fall.shape)
        hits += bool(-2 <= row - top < PATCH + 2 and -2 <= column - left < PATCH + 2)
    assert hits >= 0.9 * len(images)


def test_a_covered_part_has_the_mean_colour_and_nothing_else_changes() -> None:
    image = np.random.default_rng(0).integers(0, 256, (8, 12, 1), np.uint8)
    seen: list[np.ndarray] = []

    def predict(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        seen.append(images)
        return np.zeros((len(images), 2), np.float32), np.zeros((len(images), 2), np.float32)

    fall = occlusion_map(predict, image, 1)
    assert fall.shape == (8, 12)
    np.testing.assert_array_equal(seen[0][0], image)
    changed = seen[0][1:] != image
    assert len(changed) == 7 * 8 and changed.any(0).sum() > 0.9 * image.size  # a pixel may have the mean colour
    for number, is_changed in enumerate(changed):
        rows, columns = np.nonzero(is_changed[..., 0])
        assert np.ptp(rows) < 2 and np.ptp(columns) < 3
        assert (seen[0][1 + number][is_changed] == round(image.mean())).all()


def test_each_pixel_has_the_mean_of_the_covers_over_it() -> None:
    """A network that sees one pixel alone: its probability falls wherever that is covered."""
    image = np.zeros((16, 16, 1), np.uint8)
    image[5, 9] = 255

    def predict(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        probability = (images[:, 5, 9] == 255).astype(np.float32)
        return probability, probability

    fall = occlusion_map(predict, image, 0)
    assert fall[5, 9] == 1 == fall.max()
    assert (fall[:, :6] == 0).all() and (fall[9:] == 0).all()  # beyond four pixels


@pytest.mark.parametrize("shape", [(8, 8, 1), (24, 40, 3), (200, 300, 3)])
def test_an_overlay_is_large_enough_and_has_the_images_shape(shape: tuple[int, int, int]) -> None:
    image = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    shown = overlay(image, np.eye(*shape[:2], dtype=np.float32))
    assert max(shown.size) >= 160 and shown.width * shape[0] == shown.height * shape[1]
    flat = np.asarray(overlay(image, np.full(shape[:2], -1, np.float32)), np.float32)
    assert np.ptp(flat, axis=2).max() <= 3  # nothing is warm where nothing falls
