"""`preprocess --source` with Parquet files and `metadata.csv` as Hugging Face's `datasets` has them, and the same
dataset by every door."""

from __future__ import annotations

import csv
import json
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from pipeline.check import check
from pipeline.checking.labels_table import write_labels
from pipeline.dataset import Dataset
from pipeline.preparing.image_folder import ImageFolderOptions
from pipeline.preprocess import preprocess
from tests.pipeline.helpers import archive, image_folder, png, refused, write_files
from tests.pipeline.test_preprocess import pixels

SPLITS = {"train/cat": 4, "train/dog": 3, "test/cat": 2, "test/dog": 1}
CLASSES = {"cat": 10, "dog": 15}
NAMES = ["dog", "cat", "eel"]  # not sorted, and one without images
IMAGE = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])


def parquet(path: Path, columns: dict[str, Any], names: Sequence[str] | None = None, **options: Any) -> Path:
    """A Parquet file; `names` are class names of the column `label`, as `datasets` writes them."""
    table = pyarrow.table(
        {name: pyarrow.array(values, IMAGE if name == "image" else None) for name, values in columns.items()}
    )
    features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})} if names is not None else None
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(table.replace_schema_metadata(metadata), path, **options)
    return path


def files_of(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.png"))


def columns_of(files: Sequence[Path], path: str = "name") -> dict[str, list[Any]]:
    """The columns `image` and `label` of files in class folders."""
    stored = {"name": lambda file: "-".join(file.parts[-3:]), "base": lambda file: file.name}.get(path)
    return {
        "image": [{"bytes": file.read_bytes(), "path": stored and stored(file)} for file in files],
        "label": [NAMES.index(file.parent.name) for file in files],
    }


def parquet_folder(target: Path, folder: Path, path: str = "name", seed: int | None = None) -> Path:
    """The images of a folder with train/ and test/ in Parquet files, two for train, in the order that `seed` gives."""
    for split, shards in (("train", 2), ("test", 1)):
        files = files_of(folder / split)
        if seed is not None:
            random.Random(seed).shuffle(files)
        for shard in range(shards):
            part = files[shard * len(files) // shards : (shard + 1) * len(files) // shards]
            parquet(target / f"data/{split}-{shard:05}-of-{shards:05}.parquet", columns_of(part, path), NAMES)
    return target


def prepare(tmp_path: Path, name: str, source: Path, **options: object) -> Dataset:
    return preprocess(name, tmp_path / "data", source, ImageFolderOptions(**options))  # type: ignore[arg-type]


def rows_of_table(folder: Path, column: str = "path") -> list[dict[str, str]]:
    """A row a file of a folder train/<class>/…, as a table that lies in the folder has them."""
    return [
        {column: file.relative_to(folder).as_posix(), "label": file.parent.name, "split": file.parent.parent.name}
        for file in files_of(folder)
    ]


def write_csv(path: Path, rows: Sequence[dict[str, str]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_json_lines(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def write_table(path: Path, rows: Sequence[dict[str, str]]) -> Path:
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
        return path
    return (write_csv if path.suffix == ".csv" else write_json_lines)(path, rows)


def flat_folder(target: Path, folder: Path) -> tuple[Path, list[dict[str, str]]]:
    """The images of a folder without class folders, <split>/<class>-<name>, and a row for each."""
    rows = []
    for file in files_of(folder):
        split = "/".join(file.relative_to(folder).parts[:-2])
        name = f"{split}/{file.parent.name}-{file.name}".lstrip("/")
        write_files(target, {name: file.read_bytes()})
        rows.append({"file_name": name, "label": file.parent.name})
    return target, rows[::-1]


def in_split_folders(folder: Path, rows: list[dict[str, str]], ending: str) -> Path:
    """Writes a metadata table into each split's folder, whose paths begin there."""
    for split in ("train", "test"):
        of_split = [
            row | {"file_name": row["file_name"][len(split) + 1 :]} for row in rows if split in row["file_name"]
        ]
        write_table(folder / split / f"metadata.{ending}", of_split)
    return folder


def test_the_same_images_give_the_same_fingerprint_by_every_door(tmp_path: Path) -> None:
    pets = image_folder(tmp_path / "pets", SPLITS)
    expected = prepare(tmp_path, "folders", pets)
    labels = write_csv(tmp_path / "labels.csv", rows_of_table(pets)[::-1])
    sources = {
        "tar": archive(pets, ".tar"),
        "zip": archive(pets, ".zip"),
        "parquet": parquet_folder(tmp_path / "parquet", pets),
        "shuffled": parquet_folder(tmp_path / "shuffled", pets, seed=1),
        "equal-names": parquet_folder(tmp_path / "equal-names", pets, "base", seed=2),
        "no-names": parquet_folder(tmp_path / "no-names", pets, "none"),
    }
    for ending in ("csv", "jsonl", "parquet"):
        flat, rows = flat_folder(tmp_path / f"root-{ending}", pets)
        write_table(flat / f"metadata.{ending}", rows)
        sources[f"root-{ending}"] = flat
        flat, rows = flat_folder(tmp_path / f"split-{ending}", pets)
        sources[f"split-{ending}"] = in_split_folders(flat, rows, ending)
    sources["metadata-tar"] = archive(sources["split-jsonl"], ".tar.gz", top="pets-main/")
    datasets = {name: prepare(tmp_path, name, source) for name, source in sources.items()}
    datasets["labels"] = prepare(tmp_path, "labels", pets, labels=labels)
    counts = {"train": {"cat": 4, "dog": 3}, "test": {"cat": 2, "dog": 1}}
    assert [name for name, dataset in datasets.items() if dataset.meta["counts"] != counts] == []
    assert [name for name, dataset in datasets.items() if dataset.fingerprint != expected.fingerprint] == []


def test_without_splits_the_same_fifth_becomes_test_by_every_door(tmp_path: Path) -> None:
    pets = image_folder(tmp_path / "pets", CLASSES)
    expected = prepare(tmp_path, "folders", pets)
    assert expected.meta["counts"]["test"] == {"cat": 2, "dog": 3}
    files = random.Random(3).sample(files_of(pets), 25)
    flat, rows = flat_folder(tmp_path / "flat", pets)
    write_table(flat / "metadata.jsonl", rows)
    sources = {
        "file": parquet(tmp_path / "pets.parquet", columns_of(files, "base"), NAMES),
        "folder": parquet(tmp_path / "shards/0000.parquet", columns_of(files), NAMES).parent,
        "metadata": flat,
    }
    for name, source in sources.items():
        assert prepare(tmp_path, name, source).fingerprint == expected.fingerprint, name


def test_paths_are_those_of_the_structs_or_rows(tmp_path: Path) -> None:
    """And each has the pixels and the label that its row holds."""
    pets = image_folder(tmp_path / "pets", SPLITS)
    unique = prepare(tmp_path, "unique", parquet_folder(tmp_path / "a", pets, seed=0))
    assert unique.paths(unique.split("test")) == ["test-cat-000.png", "test-cat-001.png", "test-dog-000.png"]
    numbered = prepare(tmp_path, "numbered", parquet_folder(tmp_path / "b", pets, "base"))
    assert numbered.paths(numbered.split("test")) == [
        "data/test-00000-of-00001.parquet/0/000.png",
        "data/test-00000-of-00001.parquet/1/001.png",
        "data/test-00000-of-00001.parquet/2/000.png",
    ]
    single = parquet(tmp_path / "train.parquet", columns_of(files_of(pets / "train"), "none"), NAMES)
    train = prepare(tmp_path, "single", single).split("train")
    paths = prepare(tmp_path, "again", single).paths(train)
    assert paths is not None and len(paths) == 5
    for path, image, label in zip(paths, train.images, train.labels, strict=True):
        file = files_of(pets / "train")[int(path.removeprefix("train.parquet/"))]
        np.testing.assert_array_equal(pixels(file), image)
        assert ["cat", "dog"][label] == file.parent.name


@pytest.mark.parametrize(
    ("labels", "names", "classes"),
    [
        ([1, 0], NAMES, ["cat", "dog"]),
        (["cat", "dog"], None, ["cat", "dog"]),
        (pyarrow.array(["cat", "dog"] * 5).dictionary_encode(), None, ["cat", "dog"]),
        ([7, 10], None, ["10", "7"]),
        ([True, False], None, ["False", "True"]),
    ],
)
def test_labels_may_be_numbers_of_names_texts_or_numbers(
    tmp_path: Path, labels: Any, names: list[str] | None, classes: list[str]
) -> None:
    columns = {
        "img": [png(seed=seed) for seed in range(10)],  # plain bytes, under the other usual name
        "label": labels * 5 if isinstance(labels, list) else labels,
    }
    dataset = prepare(tmp_path, "pets", parquet(tmp_path / "pets.parquet", columns, names))
    assert dataset.classes == classes
    assert dataset.meta["counts"] == {"train": dict.fromkeys(classes, 4), "test": dict.fromkeys(classes, 1)}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (["data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"], ("train", "test")),
        (["train/0000.parquet", "test/0000.parquet"], ("train", "test")),
        (["default/partial-train/0000.parquet", "default/partial-test/0000.parquet"], ("train", "test")),
        (["Training.parquet", "cifar10-test.PARQUET"], ("train", "test")),
        (["train.parquet", "validation.parquet"], ("train", "test")),
        (["train.parquet", "dev.parquet", "test.parquet"], ("train", "validation", "test")),
    ],
)
def test_splits_are_the_names_of_files_or_folders(tmp_path: Path, files: list[str], expected: tuple[str, ...]) -> None:
    for number, file in enumerate(files):
        content = [png(seed=10 * number + seed) for seed in range(4 + number)]
        parquet(tmp_path / "source" / file, {"img": content, "label": ["a", "b"] * 2 + ["b"] * number})
    write_files(tmp_path / "source", {"README.md": b"---"})
    counts = prepare(tmp_path, "pets", tmp_path / "source").meta["counts"]
    assert {split: sum(of_split.values()) for split, of_split in counts.items()} == {
        split: 4 + number for number, split in enumerate(expected)
    }


def test_unusable_images_are_rejects_and_move_no_row(tmp_path: Path) -> None:
    good: list[dict[str, Any]] = [{"bytes": png(seed=seed), "path": f"{seed}.png"} for seed in range(10)]
    write_files(tmp_path / "source", {"images/beside.png": png(seed=50)})
    bad: list[dict[str, Any] | None] = [
        None,
        {"bytes": None, "path": None},
        {"bytes": b"", "path": "empty.png"},
        {"bytes": b"no image", "path": "broken.png"},
        {"bytes": None, "path": "images/gone.png"},
        {"bytes": None, "path": "../pets.png"},
        {"bytes": None, "path": "/etc/hostname"},
    ]
    images = [*good[:5], *bad, {"bytes": None, "path": "images/beside.png"}, *good[5:]]
    labels = ["a"] * 5 + ["a"] * len(bad) + ["b"] * 6
    source = parquet(tmp_path / "source/train.parquet", {"image": images, "label": labels}).parent
    with refused("7 of 18 files are unusable", "--allow-rejects"):
        prepare(tmp_path, "pets", source)
    dataset = prepare(tmp_path, "pets", source, allow_rejects=True)
    assert {reject["path"].partition("/")[2]: reject["reason"] for reject in dataset.meta["rejected"]} == {
        "5": "empty",
        "6": "empty",
        "7/empty.png": "empty",
        "8/broken.png": "not-an-image",
        "9/images/gone.png": "unreadable",
        "10/../pets.png": "unreadable",
        "11//etc/hostname".replace("//", "/"): "unreadable",
    }
    for name in ("train", "test"):
        split = dataset.split(name)
        for path, image in zip(dataset.paths(split) or [], split.images, strict=True):
            row = int(path.split("/")[1])
            expected = png(seed=50) if row == 12 else png(seed=row if row < 5 else row - len(bad) - 1)
            np.testing.assert_array_equal(pixels(write_files(tmp_path, {"x.png": expected}) / "x.png"), image)


PNGS = [png(seed=seed) for seed in range(4)]


@pytest.mark.parametrize(
    ("columns", "names", "parts"),
    [
        ({"img": PNGS, "label": [0, 1, None, 1]}, NAMES, ["row 2", "has no label"]),
        ({"img": PNGS, "label": [0, 1, 0, 3]}, NAMES, ["row 3: 3 is none of the file's 3 classes"]),
        ({"img": PNGS, "label": [0, 1, 0, -1]}, NAMES, ["row 3: -1 is none of the file's 3 classes"]),
        ({"img": PNGS, "label": [[0], [1], [0], [1]]}, NAMES, ["row 0: '[0]' is neither text nor a whole number"]),
        ({"img": PNGS, "label": [0.5, 1, 2, 3]}, None, ["row 0: '0.5' is neither"]),
        ({"img": ["a", "b"], "label": [0, 1]}, None, ["has no column for the image", "its columns are img, label"]),
        ({"a": PNGS, "b": PNGS, "label": [0, 1, 0, 1]}, None, ["could take a, b for the image", "name one 'image'"]),
        ({"img": PNGS, "kind": [0, 1, 0, 1]}, None, ["has no column for the label", "its columns are img, kind"]),
        ({"img": pyarrow.array([], "binary"), "label": []}, None, ["lists no images"]),
        ({"img": PNGS, "label": ["a"] * 4}, None, ["only one class"]),
        ({"img": [{"bytes": "text", "path": "a.png"}], "label": [0]}, NAMES, ["has no column for the image"]),
        ({"img": [{"path": 3}], "label": [0]}, NAMES, ["has no column for the image"]),
    ],
)
def test_a_file_with_wrong_columns_or_labels_is_refused(
    tmp_path: Path, columns: dict[str, Any], names: list[str] | None, parts: list[str]
) -> None:
    source = parquet(tmp_path / "pets.parquet", columns, names)
    with refused("pets.parquet", *parts):
        prepare(tmp_path, "pets", source)
    assert not list((tmp_path / "data").iterdir())


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    columns = {"img": [png((50, 50), seed=seed) for seed in range(20)], "label": ["a", "b"] * 10}
    source = parquet(tmp_path / "pets.parquet", columns)
    whole = source.read_bytes()
    for content in (
        b"",
        b"no Parquet",
        whole[:-1000],
        whole[:4] + bytes(len(whole) // 2) + whole[4 + len(whole) // 2 :],
    ):
        source.write_bytes(content)
        with refused("cannot read the Parquet file", "pets.parquet", "fetch it again"):
            prepare(tmp_path, "pets", source)
    pyarrow.parquet.write_table(pyarrow.table([PNGS, [0] * 4, [1] * 4], ["img", "label", "label"]), source)
    with refused("pets.parquet has two columns of one name"):
        prepare(tmp_path, "pets", source)
    table = pyarrow.table(columns).replace_schema_metadata({"huggingface": "{"})
    pyarrow.parquet.write_table(table, source)
    with refused("pets.parquet", "'huggingface' are not JSON"):
        prepare(tmp_path, "pets", source)
    assert not list((tmp_path / "data").iterdir())


def test_metadata_of_another_shape_name_no_classes(tmp_path: Path) -> None:
    columns = {"img": [png(seed=seed) for seed in range(10)], "label": [0, 1] * 5}
    for number, metadata in enumerate(([], {"info": []}, {"info": {"features": {"label": ["a"]}}})):
        table = pyarrow.table(columns).replace_schema_metadata({"huggingface": json.dumps(metadata)})
        pyarrow.parquet.write_table(table, tmp_path / "pets.parquet")
        assert prepare(tmp_path, f"pets{number}", tmp_path / "pets.parquet").classes == ["0", "1"]


def test_files_of_which_only_some_name_a_split_are_refused(tmp_path: Path) -> None:
    for name in ("train.parquet", "more.parquet"):
        parquet(tmp_path / "source" / name, {"img": PNGS, "label": ["a", "b"] * 2})
    with refused("more.parquet", "says train, validation or test"):
        prepare(tmp_path, "pets", tmp_path / "source")
    (tmp_path / "source/more.parquet").unlink()
    (tmp_path / "source/train.parquet").rename(tmp_path / "source/test.parquet")
    with refused("names no training images"):
        prepare(tmp_path, "pets", tmp_path / "source")


@pytest.mark.parametrize("path", ["name", "base"])
def test_a_checked_parquet_file_takes_its_mended_labels_from_the_table(tmp_path: Path, path: str) -> None:
    """`base`: two images have one name, so paths are those of rows."""
    folder = image_folder(tmp_path / "folder", SPLITS)
    source = parquet_folder(tmp_path / "source", folder, path)
    dataset = prepare(tmp_path, "pets", source)
    labels = tmp_path / "pets.csv"
    write_labels(labels, dataset, check(dataset, judge_labels=False))
    assert prepare(tmp_path, "again", source, labels=labels).fingerprint == dataset.fingerprint
    with labels.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    changed = next(row for row in rows if row["label"] == "cat" and row["split"] == "train")
    kept = [row | {"label": "dog"} if row is changed else row for row in rows]
    with labels.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(kept)
    mended = prepare(tmp_path, "mended", source, labels=labels)
    assert mended.meta["counts"]["train"] == {"cat": SPLITS["train/cat"] - 1, "dog": SPLITS["train/dog"] + 1}


def test_without_pyarrow_one_sentence_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with refused("pets.parquet needs pyarrow: pip install 'convline[parquet]'"):
        prepare(tmp_path, "pets", write_files(tmp_path, {"pets.parquet": b"PAR1"}) / "pets.parquet")


def test_groups_are_a_column_or_found_in_paths(tmp_path: Path) -> None:
    columns = {
        "image": [{"bytes": png(seed=seed), "path": f"house{seed // 5}-{seed}.png"} for seed in range(60)],
        "label": [seed // 30 for seed in range(60)],
        "house": [seed // 5 for seed in range(60)],
    }
    source = parquet(tmp_path / "pets.parquet", columns, NAMES)
    by_column = prepare(tmp_path, "column", source, group_by="house")
    by_path = prepare(tmp_path, "path", source, group_by=r"house\d+")
    assert by_column.fingerprint == by_path.fingerprint
    houses = [
        {path.partition("-")[0] for path in by_column.paths(by_column.split(name)) or []} for name in ("train", "test")
    ]
    assert houses[0].isdisjoint(houses[1]) and len(houses[0] | houses[1]) == 12
    named = parquet(tmp_path / "named.parquet", {**columns, "group": columns["house"]}, NAMES)
    assert prepare(tmp_path, "named", named).fingerprint == by_column.fingerprint


def test_other_parquet_files_beside_images_are_skipped(tmp_path: Path) -> None:
    pets = image_folder(tmp_path / "pets", SPLITS)
    expected = prepare(tmp_path, "pets", pets).fingerprint
    parquet(pets / "features.parquet", {"x": [0.5, 1.5], "label": ["a", "b"]})
    assert prepare(tmp_path, "with-features", pets).fingerprint == expected


def test_class_folders_go_before_metadata(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pets = image_folder(tmp_path / "pets", SPLITS)
    expected = prepare(tmp_path, "pets", pets).fingerprint
    rows = [{"file_name": row["path"], "label": "?", "caption": "a pet"} for row in rows_of_table(pets)]
    write_csv(pets / "metadata.csv", rows)
    assert prepare(tmp_path, "with-metadata", pets).fingerprint == expected
    assert "has class folders: metadata.csv is not read" in capsys.readouterr().err


def test_metadata_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    source, rows = flat_folder(tmp_path / "flat", image_folder(tmp_path / "pets", SPLITS))
    for row, parts in (
        ({"file_name": rows[0]["file_name"]}, ["has no column 'label'; its columns are file_name"]),
        ({"label": "cat"}, ["has no column 'file_name'"]),
        (rows[0] | {"file_name": "../x.png"}, ["line 1", "holds no image '../x.png'"]),
        (rows[0] | {"label": ["cat"]}, ["line 1", "neither text nor a whole number"]),
        (rows[0] | {"label": None}, ["line 1", "has no label"]),
    ):
        write_json_lines(source / "metadata.jsonl", [row])
        with refused("flat/metadata.jsonl", *parts):
            prepare(tmp_path, "pets", source)
    for content, part in ((b"{", "line 1 is not JSON"), (b"[1]", "not a JSON object"), (b"", "no column 'file_name'")):
        (source / "metadata.jsonl").write_bytes(content)
        with refused(part, "flat/metadata.jsonl"):
            prepare(tmp_path, "pets", source)


@pytest.mark.parametrize("column", ["path", "file_name"])
@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_labels_may_be_json_lines_or_parquet(tmp_path: Path, ending: str, column: str) -> None:
    pets = image_folder(tmp_path / "pets", SPLITS)
    rows: list[dict[str, Any]] = [
        row | {"group": f"{row['split']}{number}", "box": [0.5, number]}
        for number, row in enumerate(rows_of_table(pets, column)[::-1])
    ]
    labels = write_table(tmp_path / f"labels.{ending}", rows)
    dataset = prepare(tmp_path, "table", pets, labels=labels)
    assert dataset.fingerprint == prepare(tmp_path, "folders", pets).fingerprint
    assert dataset.meta["source"]["labels"]["name"] == f"labels.{ending}"
    write_table(labels, [*rows[:3], rows[3] | {"label": ""}])
    with refused("labels.", "row 3" if ending == "parquet" else "line 4", "has no label"):
        prepare(tmp_path, "refused", pets, labels=labels)


def test_memory_holds_a_part_of_a_file(tmp_path: Path) -> None:
    noise = [np.random.default_rng(seed).bytes(2**20) for seed in range(128)]
    parquet(tmp_path / "x.parquet", {"img": noise}, row_group_size=4, compression="none", use_dictionary=False)
    code = """
import sys, pyarrow
from pathlib import Path
from pipeline.preparing.parquet_files import open_parquet, read_rows
with open_parquet("x", Path(sys.argv[1])) as opened:
    assert sum(len(data) for data, in read_rows(opened, ["img"])) == 2**27
print(pyarrow.default_memory_pool().max_memory() / 2**20)
"""
    result = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "x.parquet"], capture_output=True, text=True, check=True
    )
    assert float(result.stdout) < 64  # of 128 MiB
