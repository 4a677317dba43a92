"""A report's thumbnails, from the files that the dataset was made from."""

from __future__ import annotations

import base64
import faulthandler
import io
import os
import shutil
import signal
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from pipeline.dataset import Dataset
from pipeline.preparing.image_folder import ImageFolderOptions
from pipeline.preprocess import preprocess
from pipeline.reporting.source_thumbnails import SIDE, Thumbnails, source_thumbnails
from tests.conftest import run_command
from tests.pages import Page, check
from tests.pipeline.helpers import archive
from tests.serving.helpers import exif, slow_jpeg

ENDINGS = ["", ".tar", ".tar.gz", ".zip"]
ROTATED = "test/cat/1.jpg"  # by its EXIF orientation
TEST_FILES = ["test/cat/0.png", ROTATED, "test/cat/2.gif", "test/dog/0.png"]


def photograph(seed: int, size: tuple[int, int] = (200, 300)) -> Image.Image:
    """Smooth patches of colour, (height, width)."""
    patches = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), np.uint8)
    return Image.fromarray(patches).resize(size[::-1], Image.Resampling.BICUBIC)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Photographs in train and test, of several formats."""
    folder = tmp_path / "photos"
    names = [*TEST_FILES, *(f"train/{label}/{number}.png" for label in ("cat", "dog") for number in range(4))]
    for seed, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        photograph(seed).save(folder / name, exif=exif(6 if name == ROTATED else 1))
    return folder


def prepare(tmp_path: Path, source: Path, channels: str = "auto", side: int = 32) -> Dataset:
    options = ImageFolderOptions((side, side), channels=channels)  # type: ignore[arg-type]
    return preprocess("photos", tmp_path / "data", source, options)


def thumbnails(dataset: Dataset, time_limit: float = 60) -> dict[str, Image.Image]:
    """Those of the whole test split, by path."""
    split = dataset.split("test")
    paths = dict(enumerate(dataset.paths(split) or []))
    made: Thumbnails = source_thumbnails(dataset, split, paths, time_limit)
    return {paths[position]: image for position, image in made.items()}


def by_pillow(file: Path, mode: str = "RGB") -> np.ndarray:
    with Image.open(file) as opened:
        image = ImageOps.exif_transpose(opened).convert("RGB").convert(mode)
    image.thumbnail((SIDE, SIDE))
    return np.asarray(image)


@pytest.mark.parametrize("ending", ENDINGS)
def test_thumbnails_are_the_upright_images_of_the_source(tmp_path: Path, source: Path, ending: str) -> None:
    made = thumbnails(prepare(tmp_path, archive(source, ending) if ending else source))
    assert sorted(made) == TEST_FILES
    assert made[ROTATED].size == (107, 160) and made["test/dog/0.png"].size == (160, 107)
    for name, image in made.items():
        assert np.array_equal(np.asarray(image), by_pillow(source / name)), name


def test_thumbnails_of_a_grey_dataset_are_grey(tmp_path: Path, source: Path) -> None:
    made = thumbnails(prepare(tmp_path, source, channels="1"))
    assert sorted(made) == TEST_FILES
    assert np.array_equal(np.asarray(made[ROTATED]), by_pillow(source / ROTATED, "L"))


def test_a_grey_source_that_is_stored_in_one_channel_has_thumbnails(tmp_path: Path, source: Path) -> None:
    for file in (path for path in source.rglob("*.*") if path.suffix != ".jpg"):
        with Image.open(file) as image:
            grey = image.convert("L").convert("RGB")
        grey.save(file)
    (source / ROTATED).unlink()
    dataset = prepare(tmp_path, source)
    assert dataset.spec.channels == 1 and len(thumbnails(dataset)) == len(TEST_FILES) - 1


def test_the_last_of_two_members_of_one_name_is_shown_as_it_was_prepared(tmp_path: Path, source: Path) -> None:
    path = tmp_path / "photos.tar"
    with tarfile.open(path, "w") as packed:
        packed.add(source / "train/cat/0.png", "photos/test/dog/0.png")
        packed.add(source, "photos")
    made = thumbnails(prepare(tmp_path, path))
    assert np.array_equal(np.asarray(made["photos/test/dog/0.png"]), by_pillow(source / "test/dog/0.png"))


@pytest.mark.parametrize("ending", ENDINGS)
def test_an_image_that_has_changed_in_the_source_has_no_thumbnail(tmp_path: Path, source: Path, ending: str) -> None:
    dataset = prepare(tmp_path, archive(source, ending) if ending else source)
    photograph(99).save(source / "test/cat/0.png")
    (source / "test/cat/2.gif").unlink()
    if ending:
        archive(source, ending)
    assert sorted(thumbnails(dataset)) == [ROTATED, "test/dog/0.png"]


@pytest.mark.parametrize("ending", ENDINGS)
def test_without_its_source_a_dataset_opens_and_has_no_thumbnails(tmp_path: Path, source: Path, ending: str) -> None:
    packed = archive(source, ending) if ending else source
    fingerprint = prepare(tmp_path, packed).fingerprint
    packed.rename(tmp_path / "elsewhere")
    (tmp_path / "data").rename(tmp_path / "moved")
    dataset = Dataset.open(tmp_path / "moved", "photos")
    assert dataset.fingerprint == fingerprint and thumbnails(dataset) == {}


@pytest.mark.parametrize("content", [None, b"", b"[]", b'{"location": 3}', b"{", b'{"location": "a\\u0000b"}'])
def test_a_damaged_or_missing_location_is_no_error(tmp_path: Path, source: Path, content: bytes | None) -> None:
    dataset = prepare(tmp_path, source)
    (dataset.folder / "source.json").unlink()
    if content is not None:
        (dataset.folder / "source.json").write_bytes(content)
    assert thumbnails(dataset) == {}


def test_a_damaged_archive_is_no_error(tmp_path: Path, source: Path) -> None:
    path = archive(source, ".tar.gz")
    dataset = prepare(tmp_path, path)
    path.write_bytes(path.read_bytes()[:1000])
    assert thumbnails(dataset) == {}


def test_a_path_that_leaves_the_source_is_not_read(tmp_path: Path, source: Path) -> None:
    dataset = prepare(tmp_path, source)
    shutil.move(source / "test/dog/0.png", tmp_path / "outside.png")
    paths = dataset.folder / "test.files.txt"
    paths.write_text(paths.read_text().replace("test/dog/0.png", "../outside.png"))
    assert sorted(thumbnails(dataset)) == TEST_FILES[:3]


def test_a_file_that_kills_its_decoder_has_no_thumbnail(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(_: object) -> None:
        faulthandler.disable()
        os.kill(os.getpid(), signal.SIGSEGV)

    dataset = prepare(tmp_path, source)
    monkeypatch.setattr("PIL.GifImagePlugin.GifImageFile.load", die)
    assert sorted(thumbnails(dataset)) == [name for name in TEST_FILES if not name.endswith(".gif")]


def test_a_file_that_takes_too_long_has_no_thumbnail(tmp_path: Path, source: Path) -> None:
    dataset = prepare(tmp_path, source)
    (source / "test/cat/0.png").write_bytes(slow_jpeg(2000))
    began = time.monotonic()
    assert sorted(thumbnails(dataset, time_limit=0.5)) == TEST_FILES[1:]
    assert time.monotonic() - began < 30


def test_images_that_are_stored_as_large_are_not_read_again(tmp_path: Path, source: Path) -> None:
    assert thumbnails(prepare(tmp_path, source, side=SIDE)) == {}


def tile_sizes(page: Page) -> set[tuple[int, int]]:
    """Width and height of the images with a truth or a probability."""
    sizes = set()
    for image in page.all("img"):
        if "%" in (image["alt"] or ""):
            data = base64.b64decode((image["src"] or "").partition(",")[2])
            with Image.open(io.BytesIO(data)) as opened:
                sizes.add(opened.size)
    return sizes


def test_a_report_shows_them_as_long_as_the_source_is_there(tmp_path: Path, source: Path) -> None:
    prepare(tmp_path, source)
    quiet = ("--set", "train.evaluate_every=0", "--set", "data.validation=0", "--set", "train.batch_size=4")
    run_command(tmp_path, "pipeline", "train", "digits", "--dataset", "photos", "--run", "photos", "--steps", 2,
                "--tracking", "none", *quiet)  # fmt: skip
    run_command(tmp_path, "pipeline", "report", "photos")
    page = tmp_path / "runs/photos/report.html"
    assert tile_sizes(check(page)) == {(160, 107), (107, 160)}
    assert str(tmp_path) not in page.read_text()
    source.rename(tmp_path / "gone")
    run_command(tmp_path, "pipeline", "report", "photos")
    assert tile_sizes(check(page)) == {(32, 32)}
