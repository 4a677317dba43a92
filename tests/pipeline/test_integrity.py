"""Damaged and changed files of datasets and runs are detected: arrays, meta.json, run.json, metrics and others."""

import json
import os
import pickle
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from convline.errors import ConvlineError
from pipeline.compare import ComparedRun
from pipeline.dataset import Dataset
from pipeline.network import load_network
from pipeline.preparing import integrity
from pipeline.preprocess import preprocess
from pipeline.reporting import sections
from pipeline.reporting.layer_plots import layer_plots
from pipeline.run import Run
from pipeline.tracking.points import read_points
from tests.pipeline.helpers import image_folder, refused


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    """A prepared dataset's folder."""
    counts = {"train/cat": 12, "train/dog": 8, "test/cat": 3, "test/dog": 3}
    return preprocess("pets", tmp_path / "data", image_folder(tmp_path / "pets", counts)).folder


def open_splits(folder: Path) -> None:
    dataset = Dataset.open(folder.parent, folder.name)
    dataset.split("train")
    dataset.split("test")


def rewrite(path: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    np.save(path, change(np.load(path)), allow_pickle=True)


def set_first(value: int) -> Callable[[np.ndarray], np.ndarray]:
    def change(array: np.ndarray) -> np.ndarray:
        array.flat[0] = value
        return array

    return change


CHANGES: dict[str, tuple[str, Callable[[np.ndarray], np.ndarray], str]] = {
    "a pixel": ("test.images.npy", lambda a: a ^ (np.arange(a.size) == 5).reshape(a.shape), "its fingerprint differs"),
    "a label": ("train.labels.npy", lambda a: np.roll(a, 1), "its fingerprint differs"),
    "labels of other classes": ("train.labels.npy", set_first(2), "none of the 2 classes"),
    "negative labels": ("train.labels.npy", set_first(-1), "none of the 2 classes"),
    "fewer labels": ("train.labels.npy", lambda a: a[:-1], "(19,) and not int64 (20,)"),
    "more labels": ("test.labels.npy", lambda a: np.append(a, 0), "(7,) and not int64 (6,)"),
    "fewer images": ("train.images.npy", lambda a: a[:-1], "(19, 4, 4, 3) and not uint8 (20, 4, 4, 3)"),
    "images of another size": ("train.images.npy", lambda a: a[:, :3], "(20, 3, 4, 3) and not"),
    "images of another dtype": ("train.images.npy", lambda a: a.astype(np.int8), "int8 (20, 4, 4, 3) and not uint8"),
    "labels of another dtype": ("train.labels.npy", lambda a: a.astype(np.int32), "int32 (20,) and not int64"),
    "labels in another byte order": ("train.labels.npy", lambda a: a.astype(">i8"), "and not int64"),
    "labels in two dimensions": ("train.labels.npy", lambda a: a[:, None], "(20, 1) and not"),
    "images in another order": ("train.images.npy", lambda a: a[::-1], "its fingerprint differs"),
    "objects": ("train.labels.npy", lambda a: a.astype(object), "is damaged"),
    "text": ("train.labels.npy", lambda a: a.astype(str), "and not int64"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_arrays_that_are_not_those_that_were_prepared_are_refused(pets: Path, name: str) -> None:
    file, change, message = CHANGES[name]
    open_splits(pets)
    rewrite(pets / file, change)
    with refused(str(pets), message, "prepare the dataset again"):
        open_splits(pets)


@pytest.mark.parametrize("content", [b"PK\x05\x06" + b"\0" * 18, pickle.dumps([1]), b"\x93NUMPY\x01\x00", b""])
def test_files_that_hold_no_array_are_refused(pets: Path, content: bytes) -> None:
    """One is an empty .npz file, which np.load would open."""
    (pets / "train.labels.npy").write_bytes(content)
    with refused(str(pets), "prepare the dataset again"):
        open_splits(pets)


def with_old_times(path: Path, change: Callable[[Path], object]) -> None:
    """Change a file, then restore its access and modification times, as `touch -r` does."""
    before = path.stat()
    change(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def flip_last(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))


@pytest.fixture
def stamped(pets: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A dataset with a stamp file, as large ones have; this process has forgotten that it verified it."""
    monkeypatch.setattr(integrity, "STAMP_MIN_BYTES", 0)
    open_splits(pets)
    assert (pets / "verified.json").exists()
    integrity._verified.clear()
    yield pets
    integrity._verified.clear()


def test_a_change_with_restored_times_is_found_in_spite_of_a_stamp(stamped: Path) -> None:
    with_old_times(stamped / "test.images.npy", flip_last)
    with refused("test images or labels", "its fingerprint differs"):
        open_splits(stamped)


def test_a_change_through_a_memory_map_is_found_in_spite_of_a_stamp(stamped: Path) -> None:
    array = np.load(stamped / "train.images.npy", mmap_mode="r+")
    array[3, 2, 1, 0] ^= 255
    array.flush()
    with refused("train images or labels"):
        open_splits(stamped)


def test_a_copy_of_a_dataset_does_not_inherit_its_stamp(stamped: Path) -> None:
    copy = stamped.with_name("copy")
    shutil.copytree(stamped, copy)
    open_splits(copy)
    integrity._verified.clear()
    shutil.rmtree(copy)
    shutil.copytree(stamped, copy)
    with_old_times(copy / "test.labels.npy", lambda path: path.write_bytes(path.read_bytes()[:-8] + b"\0" * 8))
    with refused("test images or labels"):
        open_splits(copy)


def test_a_stamp_is_void_where_meta_json_has_changed(stamped: Path) -> None:
    meta = json.loads((stamped / "meta.json").read_text())
    meta["mean"][1] += 0.5
    (stamped / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")
    with refused("mean and std differ"):
        open_splits(stamped)


@pytest.mark.parametrize("content", [b"", b"[]", b'{"train": 1}', b"\xff"])
def test_a_damaged_stamp_is_ignored(stamped: Path, content: bytes) -> None:
    (stamped / "verified.json").write_bytes(content)
    open_splits(stamped)
    assert json.loads((stamped / "verified.json").read_text()).keys() == {"train", "test"}
    integrity._verified.clear()
    with_old_times(stamped / "test.images.npy", flip_last)
    (stamped / "verified.json").write_bytes(content)
    with refused("test images or labels"):
        open_splits(stamped)


def test_a_dataset_replaced_after_it_was_opened_is_refused(stamped: Path, tmp_path: Path) -> None:
    opened = Dataset.open(stamped.parent, "pets")
    counts = {"train/cat": 12, "train/dog": 8, "test/cat": 3, "test/dog": 3}
    # the same numbers of images, with other pixels
    source = image_folder(tmp_path / "others", dict(reversed(counts.items())))
    preprocess("pets", stamped.parent, source, overwrite=True)
    open_splits(stamped)
    with refused("was changed since it was prepared"):
        opened.split("train")


def test_arrays_with_a_stamp_are_not_read_again(stamped: Path) -> None:
    """A change is overlooked where the stamp was updated to match the changed file."""
    flip_last(stamped / "test.images.npy")
    stamps = json.loads((stamped / "verified.json").read_text())
    status = (stamped / "test.images.npy").stat()
    stamps["test"]["test.images.npy"] = [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
    (stamped / "verified.json").write_text(json.dumps(stamps))
    open_splits(stamped)


def test_small_arrays_leave_no_stamp(pets: Path) -> None:
    open_splits(pets)
    assert not (pets / "verified.json").exists()


META: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "classes in another order": (lambda meta: meta["classes"].reverse(), "classes"),
    "a class twice": (lambda meta: meta.update(classes=["cat", "cat"]), "twice"),
    "another size": (lambda meta: meta["image"].update(height=5), "fingerprint"),
    "no size": (lambda meta: meta["image"].update(height=None, width=None), "size"),
    "a mean that is not a number": (lambda meta: meta.update(mean=[float("nan")] * 3), "mean"),
    "one mean missing": (lambda meta: meta["mean"].pop(), "one value per channel"),
    "a std above 255": (lambda meta: meta.update(std=[1e9] * 3), "std"),
    "counts below 0": (lambda meta: meta["counts"]["test"].update(cat=-3), "counts"),
    "other counts": (lambda meta: meta["counts"]["test"].update(cat=2, dog=4), "numbers of images per class"),
    "counts of other classes": (lambda meta: meta["counts"].update(test={"cat": 6}), "other classes"),
    "no test split": (lambda meta: meta["fingerprints"].pop("test"), "a split is missing"),
    "no name": (lambda meta: meta.pop("name"), "name"),
    "a source that is a list": (lambda meta: meta.update(source=[]), "source"),
}


@pytest.mark.parametrize("name", META)
def test_a_meta_file_that_contradicts_itself_or_the_arrays_is_refused(pets: Path, name: str) -> None:
    change, message = META[name]
    meta = json.loads((pets / "meta.json").read_text())
    change(meta)
    (pets / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")
    with refused(str(pets), message, "prepare the dataset again"):
        open_splits(pets)


def mutants(content: bytes, count: int) -> Iterator[bytes]:
    """`content` with one byte changed: a bit of it, all of it, or to another that occurs in the file."""
    draw = random.Random(count)
    for number in range(count):
        mutant = bytearray(content)
        at = draw.randrange(len(content))
        mutant[at] = (mutant[at] ^ 1 << draw.randrange(8), draw.randrange(256), draw.choice(content))[number % 3]
        yield bytes(mutant)


def meta_json(project: Path) -> None:
    run = Run.open(project / "runs/digits")
    run.split(run.dataset(project / "data"), "train")


def run_json(project: Path) -> None:
    run = Run.open(project / "runs/digits")
    run.dataset(project / "data")
    run.is_current()


def recipe_toml(project: Path) -> None:
    load_network(Run.open(project / "runs/digits"))


def figures(project: Path) -> None:
    run = Run.open(project / "runs/digits")
    ComparedRun(run, list(read_points(run.metrics))).key_figures()


def summaries(project: Path) -> None:
    list(read_points(project / "runs/digits/summaries.jsonl"))


def parity_json(project: Path) -> None:
    subject: Any = SimpleNamespace(run=Run.open(project / "runs/digits"))
    sections._parity(subject)


def array(project: Path) -> None:
    Dataset.open(project / "data", "digits").split("test")


FILES: dict[str, Callable[[Path], None]] = {
    "data/digits/meta.json": meta_json,
    "data/digits/test.labels.npy": array,
    "data/digits/test.images.npy": array,
    "runs/digits/run.json": run_json,
    "runs/digits/recipe.toml": recipe_toml,
    "runs/digits/metrics.jsonl": figures,
    "runs/digits/evaluation.json": figures,
    "runs/digits/summaries.jsonl": summaries,
    "runs/digits/parity.json": parity_json,
}


@pytest.mark.parametrize("count", [60, pytest.param(500, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_read_or_refused_in_a_sentence(
    own_project: Path, name: str, count: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Damaged evaluation.json and parity.json files are left out with a warning: nothing else depends on them."""
    path, read = own_project / name, FILES[name]
    if name.endswith("evaluation.json"):
        path.write_text(json.dumps({"run": "digits", "step": 300, "precision_at_1": 0.975, "classes": {"0": {}}}))
    content = path.read_bytes()
    read(own_project)
    content, rest = (content[:128], content[128:]) if name.endswith(".npy") else (content, b"")
    refusals = []
    for mutant in mutants(content, count):
        path.write_bytes(mutant + rest)
        try:
            read(own_project)
        except ConvlineError as error:
            refusals.append(str(error))
    refusals += [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert len(refusals) > count / (10 if path.name in ("evaluation.json", "parity.json") else 3)
    assert not [message for message in refusals if "\n" in message or own_project.name not in message]


@pytest.mark.parametrize("damaged", ["{", "[]", "null", "{}", '{"step": 1.5, "time": 1}', '{"step": 1, "time": 1e99}'])
def test_a_damaged_line_of_points_is_named(tmp_path: Path, damaged: str) -> None:
    path = tmp_path / "metrics.jsonl"
    whole = '{"step": 1, "time": 2.5, "loss": 0.5}\n'
    path.write_text(whole + damaged + "\n" + whole)
    with refused(f"line 2 of {path}"):
        list(read_points(path))
    path.write_text(whole + whole + damaged)
    assert [point.values for point in read_points(path)] == [{"loss": 0.5}] * 2  # an incomplete last line is ignored


@pytest.mark.parametrize("value", ['"0.5"', "null", "true", "[1]", "{}"])
def test_a_value_that_is_not_a_number_is_named(tmp_path: Path, value: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1, "time": 2.5, "loss": {value}}}\n')
    with refused(f"line 1 of {path}", "'loss'"):
        list(read_points(path))


def test_summaries_of_different_layers_are_not_drawn(project: Path) -> None:
    points = list(read_points(project / "runs/digits/summaries.jsonl"))
    layers = points[0].values["layers"]
    layers["other"] = layers.pop(next(iter(layers)))
    with refused("summaries.jsonl is damaged", "layers"):
        layer_plots(points)
