"""`pipeline check`: copies, near duplicates, blank images, tiny classes."""

import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from pipeline.check import check
from pipeline.checking.findings import Check
from pipeline.checking.near_duplicates import MAX_BITS, Descriptions, area_weights, describe, near_pairs
from pipeline.preparing.image_folder import ImageFolderOptions
from pipeline.preprocess import preprocess
from tests.commands import Cli
from tests.pipeline.helpers import encode, image_folder, write_files

SIDE = 64


def patches() -> np.ndarray:
    """Parts of two photographs that do not overlap, uint8 [n, 64, 64, 3]."""
    photographs = load_sample_images().images
    return np.stack(
        [
            photograph[top : top + SIDE, left : left + SIDE]
            for photograph in photographs
            for top in range(0, photograph.shape[0] - SIDE, SIDE)
            for left in range(0, photograph.shape[1] - SIDE, SIDE)
        ]
    )


def recompressed(pixels: np.ndarray, quality: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "jpeg", quality=quality)
    return buffer.getvalue()


def resized(pixels: np.ndarray, side: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC).save(buffer, "png")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Check:
    """Of 108 patches of photographs in train, 40 are recompressed in test, 30 are there again at other sizes, under
    another label, and 5 are blank."""
    files, folder = {}, tmp_path_factory.mktemp("patches")
    for number, pixels in enumerate(patches()):
        files[f"train/{'ab'[number % 2]}/{number:03}.png"] = encode(pixels)
        if number < 40:
            files[f"test/{'ab'[number % 2]}/{number:03}.jpg"] = recompressed(pixels, 40 + number)
        elif number < 70:
            files[f"train/{'ba'[number % 2]}/again{number:03}.png"] = resized(pixels, 40 + number)
    for number in range(5):
        files[f"test/a/blank{number}.png"] = encode(np.full((SIDE, SIDE, 3), 50 * number, np.uint8))
    source = write_files(folder / "source", files)
    dataset = preprocess("patches", folder / "data", source, ImageFolderOptions((SIDE, SIDE)))
    return check(dataset, judge_labels=False)


def test_recompressed_and_resized_copies_are_found(found: Check) -> None:
    pairs = {tuple(sorted((pair.first.path[-7:-4], pair.second.path[-7:-4]))) for pair in found.pairs}
    # some patches are of an even sky: nothing in them tells them apart
    contrast = patches().mean(-1).std((1, 2))
    planted = {(f"{number:03}", f"{number:03}") for number in range(70) if contrast[number] > 4}
    pairs -= {pair for pair in pairs if contrast[int(pair[0])] <= 4}
    assert len(pairs & planted) >= 0.95 * len(planted) and len(pairs & planted) >= 0.95 * len(pairs)
    leaks = [pair for pair in found.pairs if pair.is_leak]
    assert len(leaks) >= 24 and not any(pair.has_two_labels for pair in leaks)
    assert sum(pair.has_two_labels and not pair.is_leak for pair in found.pairs) >= 28


def test_blank_images_are_named_and_are_no_duplicates(found: Check) -> None:
    assert {image.path for image in found.blank} >= {f"test/a/blank{number}.png" for number in range(5)}
    assert not any("blank" in pair.first.path + pair.second.path for pair in found.pairs)


def test_leaks_come_first_on_the_terminal(found: Check) -> None:
    lines = found.table().splitlines()
    assert lines[0].startswith("patches: ") and lines[3].startswith("near duplicates")
    assert "(train" in lines[4] and "(test" in lines[4] and "≈" in lines[4]
    assert re.search(r"… and \d+ more; --report shows them", found.table()) and "blank images: " in found.table()


@pytest.mark.parametrize("seed", range(3))
def test_no_pair_is_missed_that_differs_in_few_bits(seed: int) -> None:
    draws = np.random.default_rng(seed)
    hashes = draws.integers(0, 2**63, 2000, np.uint64)
    for row in range(0, 1000, 2):  # a neighbour at each distance from 0 to 9
        flipped = draws.permutation(64)[: row // 2 % 10]
        hashes[row + 1] = hashes[row] ^ np.bitwise_or.reduce(np.uint64(1) << flipped.astype(np.uint64), initial=0)
    same = Descriptions(hashes, np.zeros((2000, 3), np.uint8), np.zeros(2000, bool))
    distances = np.bitwise_count(hashes[:, None] ^ hashes[None])
    expected = np.argwhere(np.triu(distances <= MAX_BITS, 1))
    np.testing.assert_array_equal(near_pairs(same), expected)
    assert len(expected) >= 400


def test_thumbnails_must_be_alike_too() -> None:
    hashes = np.array([7, 7, 7], np.uint64)
    thumbnails = np.array([[10, 10], [12, 12], [30, 10]], np.uint8)
    assert near_pairs(Descriptions(hashes, thumbnails, np.zeros(3, bool))).tolist() == [[0, 1]]
    assert near_pairs(Descriptions(hashes, thumbnails, np.array([True, False, False]))).tolist() == []


@pytest.mark.parametrize(("size", "target"), [(64, 8), (50, 32), (224, 32)])
def test_areas_are_averaged_as_pillow_averages_them(size: int, target: int) -> None:
    values = np.random.default_rng(0).random((size, size)).astype(np.float32)
    expected = Image.fromarray(values).resize((target, target), Image.Resampling.BOX)
    weights = area_weights(size, target)
    np.testing.assert_allclose(weights.sum(1), 1, atol=1e-6)
    if size % target == 0:  # Pillow's box filter takes whole pixels
        np.testing.assert_allclose(weights @ values @ weights.T, np.asarray(expected), atol=1e-5)


def test_descriptions_do_not_depend_on_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    images = patches()[:50]
    whole = describe(images)
    monkeypatch.setattr("pipeline.preparing.mapped_arrays.CHUNK_BYTES", 7 * images[0].nbytes)
    for expected, actual in zip(whole, describe(images[:20], images[20:]), strict=True):
        np.testing.assert_array_equal(actual, expected)


def test_the_command_finds_copies_tiny_classes_and_imbalance(tmp_path: Path, cli: Cli) -> None:
    source = image_folder(tmp_path / "pets", {"cat": 90, "dog": 6}, size=(16, 16))
    (source / "cat/copy.png").write_bytes((source / "cat/007.png").read_bytes())
    (source / "dog/copy.png").write_bytes((source / "cat/007.png").read_bytes())
    cli("pipeline", "preprocess", "pets", "--source", source)
    shown = cli("pipeline", "check", "pets", "--quick").stdout
    assert "labels were not judged" in shown
    assert "cat/007.png" in shown and "cat/copy.png" in shown and "dog/copy.png" in shown
    assert "fewer than 10 training images: dog" in shown and "times as many training images" in shown
    found = json.loads(cli("pipeline", "check", "pets", "--quick", "--json").stdout)
    assert found["doubtful_labels"] is None
    assert len(found["pairs"]) == 2 and all(pair["is_equal"] and not pair["is_leak"] for pair in found["pairs"])
    assert {pair["has_two_labels"] for pair in found["pairs"]} == {True, False}
    assert "no dataset cats" in cli("pipeline", "check", "cats", status=1).stderr


def test_digits_have_no_copies(project: Path) -> None:
    from pipeline.dataset import Dataset

    found = check(Dataset.open(project / "data", "digits"), judge_labels=False)
    assert found.pairs == [] and found.blank == [] and found.images == 1797
