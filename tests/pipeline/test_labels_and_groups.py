"""`preprocess --labels` and `--group-by`: classes, splits and groups from a table, groups from paths."""

import csv
import re
import unicodedata
from pathlib import Path

import numpy as np
import pytest

from pipeline.dataset import Dataset
from pipeline.preparing.image_folder import ImageFolderOptions
from pipeline.preparing.image_groups import merged_groups
from pipeline.preprocess import preprocess
from tests.pipeline.helpers import archive, image_folder, images, png, refused, write_files
from tests.pipeline.test_preprocess import pixels

SPLITS = {"train/cat": 4, "train/dog": 3, "test/cat": 2, "test/dog": 1}


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    return image_folder(tmp_path / "pets", SPLITS)


def table(path: Path, rows: list[dict[str, str]], delimiter: str = ",", encoding: str = "utf-8") -> Path:
    with path.open("w", newline="", encoding=encoding) as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return path


def rows_of(source: Path) -> list[dict[str, str]]:
    """The rows of a table that say what the folders of a source say."""
    paths = sorted(str(path.relative_to(source)) for path in source.rglob("*.png"))
    return [{"path": path, "label": path.split("/")[1], "split": path.split("/")[0]} for path in paths if "/" in path]


def prepare(tmp_path: Path, name: str, source: Path, **options: object) -> Dataset:
    return preprocess(name, tmp_path / "data", source, ImageFolderOptions(**options))  # type: ignore[arg-type]


@pytest.mark.parametrize(("delimiter", "encoding"), [(",", "utf-8"), (";", "utf-8-sig"), ("\t", "utf-8")])
def test_a_table_gives_what_folders_give(pets: Path, tmp_path: Path, delimiter: str, encoding: str) -> None:
    expected = prepare(tmp_path, "folders", pets)
    labels = table(tmp_path / "labels.csv", rows_of(pets)[::-1], delimiter, encoding)
    dataset = prepare(tmp_path, "table", pets, labels=labels)
    assert dataset.fingerprint == expected.fingerprint and dataset.meta["counts"] == expected.meta["counts"]
    assert dataset.meta["source"]["labels"]["name"] == "labels.csv"
    for name in ("train", "test"):
        assert dataset.paths(dataset.split(name)) == expected.paths(expected.split(name))


@pytest.mark.parametrize("ending", [".tar", ".tar.gz", ".zip"])
@pytest.mark.parametrize("top", ["", "pets-main/"])
def test_a_table_for_an_archive_gives_the_same(pets: Path, tmp_path: Path, ending: str, top: str) -> None:
    labels = table(tmp_path / "labels.csv", rows_of(pets))
    packed = prepare(tmp_path, "packed", archive(pets, ending, top), labels=labels)
    assert packed.fingerprint == prepare(tmp_path, "folders", pets).fingerprint


def test_labels_without_splits_for_a_flat_folder(tmp_path: Path) -> None:
    """Labels may change what folders say, images without a row are left out, names may be in another Unicode form."""
    source = write_files(tmp_path / "flat", {f"{number:02}é.png": png(seed=number) for number in range(40)})
    names = [unicodedata.normalize("NFD", f"./{number:02}é.png") for number in range(30)]
    rows = [{"path": name, "label": "odd" if number % 2 else "even"} for number, name in enumerate(names)]
    dataset = prepare(tmp_path, "flat", source, labels=table(tmp_path / "labels.csv", rows))
    assert dataset.meta["counts"] == {"train": {"even": 12, "odd": 12}, "test": {"even": 3, "odd": 3}}
    for name in ("train", "test"):
        split = dataset.split(name)
        for path, image, label in zip(dataset.paths(split) or [], split.images, split.labels, strict=True):
            np.testing.assert_array_equal(pixels(source / path), image)
            assert label == int(path[:2]) % 2


def test_splits_may_have_any_usual_name(pets: Path, tmp_path: Path) -> None:
    write_files(pets, {"more/0.png": png(seed=50)})
    names = {"train": "Training", "test": "test_set"}
    rows = [row | {"split": names[row["split"]]} for row in rows_of(pets) if row["split"] in names]
    rows += [rows[0], {"path": "more/0.png", "label": "cat", "split": "valid"}]  # a row may be there twice
    dataset = prepare(tmp_path, "pets", pets, labels=table(tmp_path / "labels.csv", rows))
    assert dataset.meta["counts"] == {
        "train": {"cat": 4, "dog": 3},
        "test": {"cat": 2, "dog": 1},
        "validation": {"cat": 1, "dog": 0},
    }


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"path": "train/cat/404.png"}, ["labels.csv, line 2", "holds no image 'train/cat/404.png'"]),
        ({"label": ""}, ["line 2", "has no label"]),
        ({"split": ""}, ["has no split, but others do"]),
        ({"split": "holiday"}, ["line 2", "'holiday' is no split; write train, validation or test"]),
        ({"split": "test", "label": "eel"}, ["class 'eel' is in test but not in train"]),
        ({"path": "train/cat/000.png", "label": "dog"}, ["line 3", "another label or split in an earlier row"]),
    ],
)
def test_a_wrong_row_is_refused(pets: Path, tmp_path: Path, change: dict[str, str], parts: list[str]) -> None:
    rows = [row for row in rows_of(pets) if row["split"] == "train"]
    if "earlier" in parts[-1]:
        rows[1] |= change
    else:
        rows[0] |= change
    rows += [row for row in rows_of(pets) if row["split"] == "test"]
    with refused(*parts):
        prepare(tmp_path, "pets", pets, labels=table(tmp_path / "labels.csv", rows))
    assert not list((tmp_path / "data").iterdir())


def test_what_is_no_table_is_refused(pets: Path, tmp_path: Path) -> None:
    labels = tmp_path / "labels.csv"
    with refused("no such file", "labels.csv"):
        prepare(tmp_path, "pets", pets, labels=labels)
    for content, part in (
        (b"", "no column 'path'"),
        (b"file,label\na,b\n", "no column 'path'; its columns are file, label"),
        (b"path,label\n", "lists no images"),
        (b"path,label\na,b,c\n", "line 2: it has more cells than the header"),
        (b"path,label\n\xff\xfe,b\n", "not a CSV file in UTF-8"),
        (b'path,label\n"a,b\n', "not a CSV file in UTF-8"),
    ):
        labels.write_bytes(content)
        with refused(part, "labels.csv"):
            prepare(tmp_path, "pets", pets, labels=labels)
    with refused("give --source"):
        preprocess("digits", tmp_path / "data", None, ImageFolderOptions(labels=labels))


def videos(tmp_path: Path) -> Path:
    """Ten frames of each of 12 videos, six a class."""
    counts = {f"{'cat' if video < 6 else 'dog'}/video{video:02}": 10 for video in range(12)}
    return image_folder(tmp_path / "videos", counts)


def sides(dataset: Dataset, pattern: str, **options: object) -> list[set[str]]:
    """The groups on each side of a split."""
    found = []
    for name in ("train", "validation" if options else "test"):
        paths = dataset.paths(dataset.split(name, **options)) or []  # type: ignore[arg-type]
        found.append({re.findall(pattern, path)[0] for path in paths})
    return found


def test_groups_by_a_pattern_are_never_separated(tmp_path: Path) -> None:
    dataset = prepare(tmp_path, "frames", videos(tmp_path), group_by=r"(video\d+)/")
    train, test = sides(dataset, r"video\d+")
    assert train.isdisjoint(test) and len(train | test) == 12
    assert dataset.meta["counts"]["test"] == {"cat": 10, "dog": 10}
    for seed in range(10):
        train, validation = sides(dataset, r"video\d+", validation=0.2, seed=seed)
        assert train.isdisjoint(validation) and validation


def test_a_column_of_the_table_may_be_the_group(tmp_path: Path) -> None:
    source = videos(tmp_path)
    paths = sorted(str(path.relative_to(source)) for path in source.rglob("*.png"))
    rows = [{"path": path, "label": path[:3], "house": path.split("/")[1]} for path in paths]
    labels = table(tmp_path / "labels.csv", rows)
    by_column = prepare(tmp_path, "column", source, labels=labels, group_by="house")
    assert by_column.fingerprint == prepare(tmp_path, "pattern", source, group_by=r"video\d+").fingerprint
    named_group = table(tmp_path / "named.csv", [{"group": row.pop("house"), **row} for row in rows])
    assert prepare(tmp_path, "named", source, labels=named_group).fingerprint == by_column.fingerprint


def test_groups_in_two_splits_of_the_source_are_refused(tmp_path: Path) -> None:
    source = image_folder(tmp_path / "pets", SPLITS)
    for path in source.rglob("*.png"):
        path.rename(path.with_name(f"house{int(path.stem) % 3}-{path.parent.parent.name}-{path.name}"))
    with refused("2 of 3 groups are in two splits", "house0, house1", "--allow-leaks"):
        prepare(tmp_path, "pets", source, group_by=r"house\d")
    dataset = prepare(tmp_path, "pets", source, group_by=r"house\d", allow_leaks=True)
    assert dataset.meta["separated_groups"] == ["house0", "house1"]


def test_a_pattern_that_cannot_group_is_refused(pets: Path, tmp_path: Path) -> None:
    with refused("--group-by", "is not a regular expression"):
        prepare(tmp_path, "pets", pets, group_by="(")
    with refused("--group-by", "finds no group in test/cat/000.png"):
        prepare(tmp_path, "pets", pets, group_by=r"(train)")


def test_groups_are_joined_by_equal_pixels() -> None:
    first = np.array([0, 1, 2, 1, 4, 5])
    groups = merged_groups(first, ["a", "b", "a", "c", "", ""])
    assert groups[0] == groups[2] and groups[1] == groups[3]
    assert len({*groups[[0, 1, 4, 5]].tolist()}) == 4


def test_images_without_a_group_are_alone(tmp_path: Path) -> None:
    source = write_files(tmp_path / "flat", images({"some": 40}))
    paths = sorted(str(path.relative_to(source)) for path in source.rglob("*.png"))
    rows = [{"path": path, "label": "ab"[number % 2], "group": ""} for number, path in enumerate(paths)]
    dataset = prepare(tmp_path, "flat", source, labels=table(tmp_path / "labels.csv", rows))
    assert dataset.meta["groups"] is None


def test_rejects_join_no_groups(tmp_path: Path) -> None:
    source = videos(tmp_path)
    for video in range(12):
        write_files(source, {f"{'cat' if video < 6 else 'dog'}/video{video:02}/broken.png": b"no image"})
    dataset = prepare(tmp_path, "frames", source, group_by=r"(video\d+)/", allow_rejects=True)
    train, test = sides(dataset, r"video\d+")
    assert train.isdisjoint(test) and len(train) == 10 and len(test) == 2
