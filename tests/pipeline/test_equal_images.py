"""Images with the same pixels: leaks are refused, two labels are listed, copies stay on one side of every split."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.dataset import Dataset
from pipeline.preparing.equal_images import first_equal
from pipeline.preparing.held_out_splits import stratified_sample
from pipeline.preparing.image_folder import ImageFolderOptions
from pipeline.preprocess import preprocess
from tests.pipeline.helpers import image_folder, png, refused, write_files
from tests.pipeline.test_preprocess import pixels

SPLITS = {"train/cat": 4, "train/dog": 4, "test/cat": 3, "test/dog": 3}


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    return image_folder(tmp_path / "pets", SPLITS)


def copy(pets: Path, source: str, destination: str, format: str = "png") -> None:
    """The same pixels in another file."""
    with Image.open(pets / source) as image:
        image.save(pets / destination, format)


def test_images_are_equal_where_all_their_pixels_are() -> None:
    images = np.random.default_rng(0).integers(0, 256, (1000, 3, 5, 3), np.uint8)
    images[700:] = images[np.random.default_rng(1).integers(0, 700, 300)]
    images[999] = images[0]
    images[999, 2, 4, 2] ^= 1
    expected = [min(np.flatnonzero((images == image).all((1, 2, 3)))) for image in images]
    assert first_equal(images).tolist() == expected and expected[999] == 999


def test_a_leak_is_refused_and_names_the_files(pets: Path, tmp_path: Path) -> None:
    copy(pets, "train/cat/001.png", "test/cat/holiday.bmp", "bmp")
    with refused("1 image is in two splits", "test/cat/holiday.bmp", "train/cat/001.png", "--allow-leaks"):
        preprocess("pets", tmp_path / "data", pets)
    assert not list((tmp_path / "data").iterdir())


def test_a_leak_is_found_whatever_its_label_and_between_any_two_splits(pets: Path, tmp_path: Path) -> None:
    write_files(pets, {"val/cat/0.png": png(seed=90), "val/dog/0.png": png(seed=91)})
    copy(pets, "train/dog/002.png", "val/cat/1.png")
    with refused("1 image is in two splits", "train/dog/002.png", "val/cat/1.png"):
        preprocess("pets", tmp_path / "data", pets)


def test_allowed_leaks_are_recorded(pets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(4):
        copy(pets, f"train/cat/{number:03}.png", f"test/cat/copy{number}.png")
    dataset = preprocess("pets", tmp_path / "data", pets, ImageFolderOptions(allow_leaks=True))
    found = json.loads((dataset.folder / "meta.json").read_text())["equal_images"]
    assert (found["copies"], found["leaks"]["count"], found["two_labels"]["count"]) == (4, 4, 0)
    assert {frozenset(pair) for pair in found["leaks"]["pairs"]} == {
        frozenset({f"train/cat/{number:03}.png", f"test/cat/copy{number}.png"}) for number in range(4)
    }
    assert dataset.leaks == 4
    assert "4 images are in two splits" in capsys.readouterr().err


def test_images_under_two_labels_are_listed(pets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy(pets, "train/cat/003.png", "train/dog/mine.png")
    dataset = preprocess("pets", tmp_path / "data", pets)
    assert dataset.meta["equal_images"]["two_labels"] == {
        "count": 1,
        "pairs": [["train/cat/003.png", "train/dog/mine.png"]],
    }
    logged = capsys.readouterr().err
    assert "1 image is under two labels" in logged and "train/cat/003.png and train/dog/mine.png" in logged


def test_without_copies_nothing_is_said(pets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    meta = preprocess("pets", tmp_path / "data", pets).meta
    none = {"count": 0, "pairs": []}
    assert meta["equal_images"] == {"copies": 0, "leaks": none, "two_labels": none} and meta["groups"] is None
    assert "same pixels" not in capsys.readouterr().err


@pytest.fixture(scope="module")
def copied(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """40 cats and 40 dogs without splits; 20 of the cats are there twice more."""
    source = image_folder(tmp_path_factory.mktemp("copied") / "pets", {"cat": 40, "dog": 40})
    for number in range(20):
        for name in ("a", "b"):
            copy(source, f"cat/{number:03}.png", f"cat/{name}{number:03}.png")
    return preprocess("pets", source.parent / "data", source)


def names_of(paths: list[str] | None) -> set[str]:
    """Without the letter of a copy."""
    assert paths is not None
    return {path.replace("cat/a", "cat/").replace("cat/b", "cat/") for path in paths}


def test_copies_stay_on_one_side_of_the_drawn_test_split(copied: Dataset) -> None:
    train, test = (names_of(copied.paths(copied.split(name))) for name in ("train", "test"))
    assert train.isdisjoint(test) and len(train | test) == 80
    assert copied.leaks == 0 and copied.meta["equal_images"]["copies"] == 40
    # a fifth of 80 cats is 16: whole groups of three come within one of it
    assert abs(copied.meta["counts"]["test"]["cat"] - 16) <= 1 and copied.meta["counts"]["test"]["dog"] == 8


@pytest.mark.parametrize("seed", range(5))
def test_copies_stay_on_one_side_of_the_validation_split(copied: Dataset, seed: int) -> None:
    splits = [copied.split(name, validation=0.25, seed=seed) for name in ("train", "validation")]
    train, validation = (names_of(copied.paths(split)) for split in splits)
    assert train.isdisjoint(validation) and len(validation) > 5
    assert sum(map(len, splits)) == sum(copied.meta["counts"]["train"].values())


def test_a_damaged_file_of_groups_is_refused(copied: Dataset, tmp_path: Path) -> None:
    content = (copied.folder / "train.groups.npy").read_bytes()
    (tmp_path / "pets").mkdir()
    for path in copied.folder.iterdir():
        (tmp_path / "pets" / path.name).write_bytes(path.read_bytes())
    dataset = Dataset.open(tmp_path, "pets")
    for damaged in (content[:-1], content[:-8] + b"\1" * 8, b""):
        (tmp_path / "pets/train.groups.npy").write_bytes(damaged)
        with refused("train.groups.npy", "prepare the dataset again"):
            dataset.split("train", validation=0.25)
    (tmp_path / "pets/train.groups.npy").unlink()
    with refused("train.groups.npy", "prepare the dataset again"):
        dataset.split("train", validation=0.25)


def test_groups_of_one_change_no_sample() -> None:
    labels = np.random.default_rng(0).integers(0, 4, 200)
    for share in (0.2, 37):
        alone = stratified_sample(labels, share, 3)
        np.testing.assert_array_equal(stratified_sample(labels, share, 3, np.arange(200)[::-1]), alone)


@pytest.mark.parametrize("seed", range(20))
def test_no_group_is_ever_separated(seed: int) -> None:
    """Groups may hold images of several classes."""
    draws = np.random.default_rng(seed)
    labels, groups = draws.integers(0, 3, 500), draws.integers(0, 120, 500) * 7
    held_out = stratified_sample(labels, 0.2, seed, groups)
    assert set(groups[held_out]).isdisjoint(groups[np.setdiff1d(np.arange(500), held_out)])
    assert (np.diff(held_out) > 0).all()
    for label in range(3):
        size = int((labels == label).sum())
        assert (
            abs(int((labels[held_out] == label).sum()) - size / 5) <= 3
        )  # of some 33; groups have 4 images on average


def test_the_paths_are_those_of_the_rows(pets: Path, tmp_path: Path) -> None:
    odd = {"train/cat/a\nb.png": png(seed=70), "train/cat/c\\n.png": png(seed=71), "train/cat/é.png": png(seed=72)}
    write_files(pets, odd)
    dataset = preprocess("pets", tmp_path / "data", pets)
    for name in ("train", "test"):
        split = dataset.split(name)
        paths = dataset.paths(split)
        assert paths is not None and len(paths) == len(split)
        for path, image in zip(paths, split.images, strict=True):
            np.testing.assert_array_equal(pixels(pets / path), image)
    assert len((dataset.folder / "train.files.txt").read_text().splitlines()) == 11
    validation = dataset.split("validation", validation=4)
    for path, row in zip(dataset.paths(validation) or [], validation.rows, strict=True):
        np.testing.assert_array_equal(pixels(pets / path), validation.images[row])


def test_a_rejected_file_shifts_no_path(pets: Path, tmp_path: Path) -> None:
    write_files(pets, {"train/cat/0001.png": b"no image"})
    dataset = preprocess("pets", tmp_path / "data", pets, ImageFolderOptions(allow_rejects=True))
    split = dataset.split("train")
    for path, image in zip(dataset.paths(split) or [], split.images, strict=True):
        np.testing.assert_array_equal(pixels(pets / path), image)


def test_paths_with_a_line_too_few_are_refused(pets: Path, tmp_path: Path) -> None:
    dataset = preprocess("pets", tmp_path / "data", pets)
    file = dataset.folder / "train.files.txt"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:-1]))
    with refused("train.files.txt has 7 lines for 8 images", "prepare the dataset again"):
        dataset.paths(dataset.split("train"))


def test_a_dataset_prepared_earlier_has_no_paths(pets: Path, tmp_path: Path) -> None:
    dataset = preprocess("pets", tmp_path / "data", pets)
    (dataset.folder / "train.files.txt").unlink()
    assert dataset.paths(dataset.split("train")) is None


def test_a_class_whose_images_are_all_equal_cannot_be_divided(tmp_path: Path) -> None:
    source = image_folder(tmp_path / "pets", {"cat": 10})
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, "png")
    write_files(source, {f"dog/{number}.png": buffer.getvalue() for number in range(10)})
    with refused(
        "no usable image of class 'dog' in test", "images with the same pixels, or of one group, are in one split"
    ):
        preprocess("pets", tmp_path / "data", source)
