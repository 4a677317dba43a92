from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.dataset import Dataset, Split
from pipeline.preprocess import preprocess
from pipeline.recipe import read
from pipeline.samples import write_samples
from tests.conftest import Cli
from tests.pipeline.helpers import contents, image_folder, png, refused


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return preprocess("digits", tmp_path_factory.mktemp("samples"))


@pytest.fixture
def pets(tmp_path: Path) -> Dataset:
    counts = {"train/cat": 9, "train/dog": 9, "test/cat": 6, "test/dog": 2}
    return preprocess("pets", tmp_path / "data", image_folder(tmp_path / "source", counts, size=(5, 7)))


def written(folder: Path) -> list[tuple[str, int]]:
    """(class, number) of every file."""
    return [(path.parent.name, int(path.stem)) for path in folder.glob("*/*.png")]


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


@pytest.mark.parametrize("name", ["digits", "pets"])
def test_files_are_named_by_row_and_hold_the_pixels_of_that_row(
    request: pytest.FixtureRequest, tmp_path: Path, name: str
) -> None:
    dataset = request.getfixturevalue(name)
    split = dataset.split("test")
    write_samples(dataset, split, 1000, tmp_path / "out")
    for label, number in written(tmp_path / "out"):
        stored = pixels(tmp_path / f"out/{label}/{number}.png")
        np.testing.assert_array_equal(stored.reshape(split.images.shape[1:]), split.images[number])
        assert dataset.classes[split.labels[number]] == label
    assert sorted(number for _, number in written(tmp_path / "out")) == list(range(len(split)))


@pytest.mark.parametrize("count", [1, 9, 10, 25, 100])
def test_the_requested_number_is_written_evenly_over_classes(digits: Dataset, tmp_path: Path, count: int) -> None:
    write_samples(digits, digits.split("test"), count, tmp_path / "out")
    written_of = Counter(label for label, _ in written(tmp_path / "out"))
    assert written_of.total() == count
    assert max(written_of.values()) - min(written_of.get(label, 0) for label in digits.classes) <= 1


def test_other_classes_fill_up_for_a_class_with_few_images(pets: Dataset, tmp_path: Path) -> None:
    write_samples(pets, pets.split("test"), 7, tmp_path / "out")
    assert Counter(label for label, _ in written(tmp_path / "out")) == {"cat": 5, "dog": 2}


def test_only_images_of_the_split_are_written(pets: Dataset, tmp_path: Path) -> None:
    held_out = pets.split("validation", 6, seed=3)
    write_samples(pets, held_out, 100, tmp_path / "out")
    assert sorted(number for _, number in written(tmp_path / "out")) == held_out.rows.tolist()


@pytest.mark.parametrize("output", ["out", "out.v2", "deep/er/out"])
def test_the_contact_sheet_is_an_image_beside_the_folder(pets: Dataset, tmp_path: Path, output: str) -> None:
    (sheet,) = write_samples(pets, pets.split("test"), 4, tmp_path / output)
    assert sheet == tmp_path / f"{output}.png"
    with Image.open(sheet) as image:
        image.verify()
        assert image.format == "PNG"
    assert {path.suffix for path in (tmp_path / output).rglob("*") if path.is_file()} == {".png"}


def test_the_contact_sheet_shows_the_samples_enlarged(pets: Dataset, tmp_path: Path) -> None:
    split = pets.split("test")
    sheet = pixels(write_samples(pets, split, 4, tmp_path / "out")[0])
    scale = 7  # 5x7 pixels, enlarged to 48 or more
    shown = np.lib.stride_tricks.sliding_window_view(sheet, (5 * scale, 7 * scale, 3))[:, :, 0]
    for _, number in written(tmp_path / "out"):
        tile = split.images[number].repeat(scale, 0).repeat(scale, 1)
        corners = (shown[:, :, 0, 0] == tile[0, 0]).all(-1) & (shown[:, :, -1, -1] == tile[-1, -1]).all(-1)
        assert any(np.array_equal(shown[row, column], tile) for row, column in np.argwhere(corners))


def test_samples_of_the_current_folder_are_written_into_it(
    pets: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    write_samples(pets, pets.split("test"), 4, Path())
    assert len(written(tmp_path / "here")) == 4
    assert (tmp_path / "here.png").exists()


def test_writing_twice_changes_nothing(pets: Dataset, tmp_path: Path) -> None:
    write_samples(pets, pets.split("test"), 4, tmp_path / "out")
    before = contents(tmp_path)
    write_samples(pets, pets.split("test"), 4, tmp_path / "out")
    assert contents(tmp_path) == before


def test_more_may_be_written_later(pets: Dataset, tmp_path: Path) -> None:
    for count in (2, 6):
        write_samples(pets, pets.split("test"), count, tmp_path / "out")
    assert len(written(tmp_path / "out")) == 6


def test_another_image_of_the_same_name_is_not_replaced(pets: Dataset, tmp_path: Path) -> None:
    write_samples(pets, pets.split("test"), 1, tmp_path / "out")
    (label, number), *_ = written(tmp_path / "out")
    path = tmp_path / f"out/{label}/{number}.png"
    path.write_bytes(png(seed=99))
    with refused(str(path), "--output"):
        write_samples(pets, pets.split("test"), 1, tmp_path / "out")
    assert path.read_bytes() == png(seed=99)


def test_a_class_name_with_a_slash_makes_no_nested_folder(tmp_path: Path) -> None:
    images = np.arange(24, dtype=np.uint8).reshape(4, 2, 3, 1)
    split = Split("test", images, np.array([0, 1, 0, 1]), np.arange(4))
    dataset = Dataset(tmp_path, {"classes": ["T-shirt/top", "Trouser"]})
    write_samples(dataset, split, 4, tmp_path / "out")
    folders = [path for path in (tmp_path / "out").rglob("*") if path.is_dir()]
    assert len(folders) == 2 and all(path.parent == tmp_path / "out" for path in folders)
    assert len(list((tmp_path / "out").glob("*/*.png"))) == 4


def test_samples_go_to_a_folder_named_by_the_dataset(cli: Cli, digits: Dataset, tmp_path: Path) -> None:
    result = cli("pipeline", "samples", "digits", "--count", 20, "--data-dir", digits.folder.parent)
    assert result.stdout.splitlines() == ["samples/digits", "samples/digits.png"]
    assert len(written(tmp_path / "samples/digits")) == 20
    assert (tmp_path / "samples/digits.png").exists()


@pytest.mark.parametrize("picture", [b"not an image", png(seed=7)])
def test_a_users_picture_beside_the_folder_is_not_replaced(pets: Dataset, tmp_path: Path, picture: bytes) -> None:
    (tmp_path / "out.png").write_bytes(picture)
    with refused("out.png", "--output"):
        write_samples(pets, pets.split("test"), 1, tmp_path / "out")
    assert (tmp_path / "out.png").read_bytes() == picture
    assert not (tmp_path / "out").exists()


def test_a_second_sheet_shows_what_a_network_sees(cli: Cli, digits: Dataset, tmp_path: Path) -> None:
    options = ("--data-dir", digits.folder.parent, "--count", 20, "--output", "out")
    recipe = tmp_path / "own.toml"
    recipe.write_text(read("digits").replace("[preprocess]", "[preprocess]\ncrop = 4"))
    printed = cli("pipeline", "samples", "digits", *options, "--recipe", recipe).stdout.split()
    assert printed == ["out", "out.png", "out.seen.png"]
    whole, seen = (pixels(tmp_path / name) for name in printed[1:])
    assert seen.shape == whole.shape  # 4x4 pixels are enlarged to the same size as 8x8
    assert seen.min() == 0 and seen.max() == 255


def test_a_third_sheet_shows_augmented_images(cli: Cli, digits: Dataset, tmp_path: Path) -> None:
    """At most ten rows: an image as it is stored, then nine draws of its augmentations, mixed with others too."""
    options = ("--data-dir", digits.folder.parent, "--count", 20, "--output", "out")
    recipe = tmp_path / "own.toml"
    recipe.write_text(read("digits") + "[augment]\nresized_crop = {}\nflip = true\nmixup = 0.2\n")
    printed = cli("pipeline", "samples", "digits", *options, "--recipe", recipe).stdout.split()
    assert printed == ["out", "out.png", "out.seen.png", "out.augmented.png"]
    sheet = pixels(tmp_path / "out.augmented.png")
    tile = 48 + 4  # 8x8 pixels, enlarged, and a margin
    assert sheet.shape == (10 * tile, 110 + 10 * tile, 3)
    first_row = [sheet[2:50, 110 + column * tile : 110 + column * tile + 48 : 6] for column in range(10)]
    stored = digits.split("test").images
    assert any((first_row[0][::6, :, 0] == image[..., 0]).all() for image in stored)
    assert len({tile.tobytes() for tile in first_row}) == 10
