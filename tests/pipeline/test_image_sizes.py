"""The sizes of a source's images: in meta.json, in what `pipeline preprocess` prints, and outside the fingerprint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from convline.errors import ConvlineError
from convline.images import ImageSpec, decode, decode_with_size
from pipeline.dataset import Dataset
from pipeline.preparing.dataset_summary import findings
from pipeline.preparing.image_folder import ImageFolderOptions
from pipeline.preprocess import preprocess
from tests.pipeline.helpers import image_folder, png, write_files

OPTIONS = ImageFolderOptions((24, 32))


def prepared(folder: Path, sizes: dict[str, tuple[int, int]], options: ImageFolderOptions = OPTIONS) -> Dataset:
    """A dataset of images of noise by path and (height, width)."""
    files = {path: png(size, seed=seed) for seed, (path, size) in enumerate(sizes.items())}
    return preprocess("pets", folder / "data", write_files(folder / "pets", files), options)


def lines(dataset: Dataset) -> list[str]:
    return [line for line in findings(dataset.meta) if "size" in line]


def many(size: tuple[int, int], count: int = 6) -> dict[str, tuple[int, int]]:
    return {f"{label}/{number}.png": size for label in "ab" for number in range(count)}


def test_the_range_of_sizes_is_kept_and_said(tmp_path: Path) -> None:
    sizes = {**many((40, 60)), "a/x.png": (20, 30), "b/y.png": (90, 70), "b/z.png": (70, 89)}
    dataset = prepared(tmp_path, sizes)
    assert dataset.meta["sizes"] == {
        "smallest": [20, 30],
        "largest": [90, 70],
        "median": [40, 60],
        "different": 4,
        "odd": {},
    }
    assert lines(dataset) == ["sizes: 20x30 to 90x70 (height x width), median 40x60, 4 different"]


@pytest.mark.parametrize("size", [(40, 60), (4, 4), (4, 60)])
def test_where_all_have_one_size_none_is_odd(tmp_path: Path, size: tuple[int, int]) -> None:
    dataset = prepared(tmp_path, many(size), ImageFolderOptions())
    assert lines(dataset) == [f"size: every image is {size[0]}x{size[1]} (height x width)"]
    assert dataset.meta["sizes"]["odd"] == {}


def test_odd_sizes_are_counted_with_an_example(tmp_path: Path) -> None:
    odd = {"a/line.png": (16, 81), "b/dot.png": (15, 15), "b/dash.png": (2, 40), "a/just not odd.png": (16, 80)}
    dataset = prepared(tmp_path, {**many((40, 60)), **odd})
    assert lines(dataset)[1:] == [
        "odd sizes: 2 with a side under 16 pixels, such as b/dash.png (2x40)",
        "odd sizes: 2 with one side over 5 times the other, such as a/line.png (16x81)",
    ]
    small = dataset.meta["sizes"]["odd"]["small"]
    assert small["count"] == 2 and small["images"][1] == {"path": "b/dot.png", "height": 15, "width": 15}


def test_a_few_of_many_odd_sizes_are_listed(tmp_path: Path) -> None:
    sizes = {**many((40, 60), 20), **{f"a/dot {number:02}.png": (3, 3) for number in range(15)}}
    small = prepared(tmp_path, sizes).meta["sizes"]["odd"]["small"]
    assert small["count"] == 15 and len(small["images"]) == 10


def test_rejects_have_no_size(tmp_path: Path) -> None:
    write_files(tmp_path / "pets", {"a/bad.png": b"text"})
    dataset = prepared(tmp_path, many((40, 60)), ImageFolderOptions((8, 8), allow_rejects=True))
    assert dataset.meta["sizes"]["different"] == 1 and len(dataset.meta["rejected"]) == 1


def jpeg(path: Path, orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x112] = orientation
    Image.new("RGB", (400, 300), "red").save(path, exif=exif)  # width, height
    return path.read_bytes()


@pytest.mark.parametrize("spec", [ImageSpec(24, 32, 3), ImageSpec(24, 32, 3, jpeg="reduced"), ImageSpec(None, None, 3)])
@pytest.mark.parametrize(("orientation", "size"), [(1, (300, 400)), (3, (300, 400)), (6, (400, 300))])
def test_the_size_is_that_of_the_upright_image_before_resizing(
    tmp_path: Path, spec: ImageSpec, orientation: int, size: tuple[int, int]
) -> None:
    data = jpeg(tmp_path / "a.jpg", orientation)
    pixels, found = decode_with_size(data, spec)
    assert found == size
    assert (pixels == decode(data, spec)).all()


def test_sizes_are_no_part_of_the_fingerprint_and_may_be_missing(tmp_path: Path) -> None:
    dataset = preprocess("pets", tmp_path / "data", image_folder(tmp_path / "pets", {"a": 5, "b": 5}))
    path = dataset.folder / "meta.json"
    meta = json.loads(path.read_text())
    sizes = meta.pop("sizes")
    path.write_text(json.dumps(meta))  # as an earlier version wrote it
    assert Dataset.open(tmp_path / "data", "pets").fingerprint == dataset.fingerprint
    path.write_text(json.dumps({**meta, "sizes": {**sizes, "median": [0, 4]}}))
    with pytest.raises(ConvlineError, match="sizes: median"):
        Dataset.open(tmp_path / "data", "pets")
