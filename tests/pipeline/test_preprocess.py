import faulthandler
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import tarfile
import unicodedata
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits
from typer.testing import CliRunner

from convline.console import error_message
from convline.errors import ConvlineError
from convline.files import new_folder
from convline.images import ImageSpec, decode
from convline.inputs.input_file import OnDisk
from pipeline.cli import app
from pipeline.dataset import Dataset
from pipeline.preparing.decoded_source import create_array
from pipeline.preparing.image_folder import ImageFolderOptions, decode_folder
from pipeline.preparing.parallel_decoding import FileForRow, decode_into
from pipeline.preprocess import preprocess
from tests.conftest import command, run_process
from tests.pipeline.helpers import archive, contents, encode, image_folder, images, png, refused, write_files
from tests.serving.helpers import slow_jpeg

SPLITS = {"train/cat": 4, "train/dog": 3, "test/cat": 2, "test/dog": 1}
META = {
    "format",
    "name",
    "classes",
    "image",
    "counts",
    "source",
    "rejected",
    "equal_images",
    "groups",
    "mean",
    "std",
    "fingerprints",
    "fingerprint",
}
SAMPLES = {f"{split}.{part}.npy" for split in ("train", "test") for part in ("images", "labels")}
OF_FILES = {"train.files.txt", "test.files.txt", "source.json"}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    return folder


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    return image_folder(tmp_path / "pets", SPLITS)


def prepare(data: Path, source: Path, options: ImageFolderOptions | None = None, overwrite: bool = False) -> Dataset:
    return preprocess("pets", data, source, options, overwrite=overwrite)


def pixels(path: Path, mode: str = "RGB") -> np.ndarray:
    """An image file by Pillow alone, height x width x channels."""
    with Image.open(path) as image:
        return np.asarray(image.convert(mode)).reshape(image.height, image.width, -1)


def counts(dataset: Dataset) -> dict[str, int]:
    """{"train": 7, "test": 3}, from the arrays themselves."""
    return {name: len(np.load(dataset.folder / f"{name}.images.npy", mmap_mode="r")) for name in ("train", "test")}


# digits


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return preprocess("digits", tmp_path_factory.mktemp("digits"))


def test_digits_are_those_of_scikit_learn(digits: Dataset) -> None:
    source = load_digits()
    prepared = [
        (int(label), image.round().astype(int).ravel().tolist())
        for split in map(digits.split, ("train", "test"))
        for label, image in zip(split.labels, split.images * (16 / 255), strict=True)
    ]
    original = [(int(label), row.astype(int).tolist()) for label, row in zip(source.target, source.data, strict=True)]
    assert sorted(prepared) == sorted(original)
    assert digits.split("train").images.max() == 255


def test_a_fifth_of_every_digit_is_test(digits: Dataset) -> None:
    assert sum(counts(digits).values()) == 1797
    train, test = digits.meta["counts"]["train"], digits.meta["counts"]["test"]
    for digit, size in enumerate(np.bincount(load_digits().target)):
        assert train[str(digit)] + test[str(digit)] == size
        assert abs(test[str(digit)] - size / 5) <= 0.5


def test_preparing_twice_gives_the_same_bytes(digits: Dataset, data: Path) -> None:
    again = preprocess("digits", data)
    assert again.fingerprint == digits.fingerprint
    assert contents(again.folder) == contents(digits.folder)


def test_meta_holds_what_the_contract_says(digits: Dataset) -> None:
    meta = json.loads((digits.folder / "meta.json").read_text())
    assert meta.keys() >= META
    assert contents(digits.folder).keys() == SAMPLES | {"meta.json"}
    assert (meta["format"], meta["name"], meta["classes"]) == (1, "digits", [str(digit) for digit in range(10)])
    assert {key: meta["image"][key] for key in ("height", "width", "channels")} == {
        "height": 8,
        "width": 8,
        "channels": 1,
    }
    assert meta["counts"].keys() == meta["fingerprints"].keys() == {"train", "test"}
    assert meta["source"].keys() == {"name", "sha256"}
    assert len(bytes.fromhex(meta["source"]["sha256"])) == len(bytes.fromhex(meta["fingerprint"])) == 32
    assert meta["rejected"] == []


def test_the_arrays_are_uint8_nhwc_and_int64(digits: Dataset) -> None:
    for name, count in counts(digits).items():
        array = np.load(digits.folder / f"{name}.images.npy", mmap_mode="r")
        labels = np.load(digits.folder / f"{name}.labels.npy", mmap_mode="r")
        assert (array.dtype, array.shape) == (np.uint8, (count, 8, 8, 1))
        assert (labels.dtype, labels.shape) == (np.int64, (count,))


def test_mean_and_standard_deviation_are_of_the_training_images(data: Path, pets: Path) -> None:
    meta = prepare(data, pets).meta
    training = np.stack([pixels(path) for path in pets.glob("train/*/*")]).astype(np.float64)
    np.testing.assert_allclose(meta["mean"], training.mean((0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(meta["std"], training.std((0, 1, 2)), rtol=1e-9)


# layouts


def test_pixels_and_labels_are_those_of_the_files(data: Path, pets: Path) -> None:
    dataset = prepare(data, pets)
    assert dataset.classes == ["cat", "dog"]
    for name in ("train", "test"):
        files = sorted(pets.glob(f"{name}/*/*"))
        split = dataset.split(name)
        np.testing.assert_array_equal(split.images, np.stack([pixels(path) for path in files]))
        assert [dataset.classes[label] for label in split.labels] == [path.parent.name for path in files]


def test_a_grey_image_is_the_same_pixels_in_one_channel(data: Path, tmp_path: Path) -> None:
    source = image_folder(tmp_path / "pets", SPLITS, mode="L")
    files = sorted(source.glob("train/*/*"))
    expected = np.stack([pixels(path, "L") for path in files])
    np.testing.assert_array_equal(prepare(data, source).split("train").images, expected)


@pytest.mark.parametrize("name", ["test", "val", "valid", "validation", "Test"])
def test_a_second_split_serves_as_test_whatever_its_name(data: Path, tmp_path: Path, name: str) -> None:
    source = image_folder(tmp_path / "pets", {"train/cat": 4, "train/dog": 3, f"{name}/cat": 2, f"{name}/dog": 1})
    assert prepare(data, source).meta["counts"] == {"train": {"cat": 4, "dog": 3}, "test": {"cat": 2, "dog": 1}}


def test_a_validation_split_of_the_source_is_used_as_such(data: Path, tmp_path: Path) -> None:
    source = image_folder(tmp_path / "pets", {**SPLITS, "val/cat": 9})
    dataset = prepare(data, source)
    assert dataset.meta["counts"] == {
        "train": {"cat": 4, "dog": 3},
        "test": {"cat": 2, "dog": 1},
        "validation": {"cat": 9, "dog": 0},
    }
    for folder, split in (("test", "test"), ("val", "validation")):
        expected = np.stack([pixels(path) for path in sorted(source.glob(f"{folder}/*/*"))])
        np.testing.assert_array_equal(dataset.split(split).images, expected)
    # nothing is held out of train
    assert len(dataset.split("train", validation=3)) == 7 and len(dataset.split("validation", validation=3)) == 9


@pytest.mark.parametrize("top", ["", "train/"])
def test_without_a_test_split_a_fifth_of_every_class_becomes_test(data: Path, tmp_path: Path, top: str) -> None:
    source = image_folder(tmp_path / "pets", {f"{top}cat": 20, f"{top}dog": 10, f"{top}eel": 2})
    dataset = prepare(data, source)
    assert dataset.meta["counts"]["test"] == {"cat": 4, "dog": 2, "eel": 1}
    assert dataset.meta["counts"]["train"] == {"cat": 16, "dog": 8, "eel": 1}
    stored = [image.tobytes() for name in ("train", "test") for image in dataset.split(name).images]
    assert sorted(stored) == sorted(pixels(path).tobytes() for path in source.rglob("*.png"))


def test_the_same_fifth_always_becomes_test(data: Path, tmp_path: Path) -> None:
    source = image_folder(tmp_path / "pets", {"cat": 20, "dog": 10})
    assert prepare(data, source).fingerprint == preprocess("again", data, source).fingerprint


def test_classes_are_the_sorted_folder_names(data: Path, tmp_path: Path) -> None:
    names = ["b", "B", "10", "9", "a b", "ä"]
    source = image_folder(tmp_path / "pets", dict.fromkeys(names, 2))
    assert prepare(data, source).classes == sorted(names)


def test_images_in_subfolders_of_a_class_belong_to_it(data: Path, tmp_path: Path) -> None:
    source = image_folder(tmp_path / "pets", {"cat": 2, "cat/indoor/sofa": 3, "dog": 5})
    meta = prepare(data, source).meta
    assert {label: sum(split[label] for split in meta["counts"].values()) for label in ("cat", "dog")} == {
        "cat": 5,
        "dog": 5,
    }


@pytest.mark.parametrize("wrapping", ["pets-main", "a/b/c"])
def test_single_folders_around_the_splits_do_not_matter(data: Path, tmp_path: Path, wrapping: str) -> None:
    source = image_folder(tmp_path / "pets", SPLITS)
    wrapped = tmp_path / "wrapped"
    shutil.copytree(source, wrapped / wrapping)
    assert prepare(data, source).fingerprint == preprocess("wrapped", data, wrapped).fingerprint


@pytest.mark.parametrize("top", ["", "./", "pets/"])
@pytest.mark.parametrize("ending", [".tar", ".tar.gz", ".tgz", ".zip"])
def test_an_archive_gives_what_its_folder_gives(data: Path, pets: Path, ending: str, top: str) -> None:
    packed = preprocess("packed", data, archive(pets, ending, top))
    folder = prepare(data, pets)
    assert packed.fingerprint == folder.fingerprint
    assert all((packed.folder / name).read_bytes() == (folder.folder / name).read_bytes() for name in SAMPLES)


def test_the_order_of_an_archive_does_not_matter(data: Path, pets: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "reversed.zip", "w") as packed:
        for path in sorted(pets.rglob("*.png"), reverse=True):
            packed.write(path, path.relative_to(pets))
    assert preprocess("packed", data, tmp_path / "reversed.zip").fingerprint == prepare(data, pets).fingerprint


def test_a_zip_file_made_on_a_mac_gives_what_its_folder_gives(data: Path, pets: Path) -> None:
    packed = archive(pets, ".zip", "pets/")
    with zipfile.ZipFile(packed, "a") as file:
        for folder in ("pets/", "__MACOSX/", "__MACOSX/pets/", "__MACOSX/pets/train/"):
            file.mkdir(folder)
        file.writestr("pets/.DS_Store", b"\0")
        file.writestr("__MACOSX/pets/train/._cat", b"\0")
    assert preprocess("packed", data, packed).fingerprint == prepare(data, pets).fingerprint


def test_hidden_files_are_not_images(data: Path, pets: Path) -> None:
    write_files(pets, {"train/cat/.DS_Store": b"\0", ".git/a/b": b"\0", "train/.thumbnails/000.png": png()})
    assert prepare(data, pets).meta["rejected"] == []


def test_the_source_is_named_without_its_path(data: Path, pets: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(pets, tmp_path / "elsewhere/pets")
    meta = prepare(data, pets).meta
    assert meta["source"]["name"] == "pets"
    assert meta["source"] == preprocess("again", data, moved).meta["source"]
    assert str(tmp_path) not in (data / "pets/meta.json").read_text()


def test_the_current_folder_as_a_source_has_a_name(data: Path, pets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(pets)
    assert prepare(data, Path()).meta["source"]["name"] == "pets"


def test_one_changed_pixel_changes_source_and_fingerprint(data: Path, pets: Path) -> None:
    before = prepare(data, pets).meta
    path = pets / "train/cat/000.png"
    changed = pixels(path).copy()
    changed[0, 0, 0] ^= 1
    path.write_bytes(encode(changed))
    after = preprocess("again", data, pets).meta
    assert before["source"]["sha256"] != after["source"]["sha256"]
    assert before["fingerprint"] != after["fingerprint"]
    assert before["fingerprints"]["test"] == after["fingerprints"]["test"]


@pytest.mark.parametrize("ending", ["", ".tar.gz", ".zip"])
def test_the_source_is_not_changed(data: Path, pets: Path, tmp_path: Path, ending: str) -> None:
    source = archive(pets, ending) if ending else pets
    paths = [path for path in tmp_path.rglob("*") if data not in (path, *path.parents)]
    before = [(path, path.stat().st_mtime_ns, path.is_dir() or path.read_bytes()) for path in paths]
    prepare(data, source)
    assert [(path, path.stat().st_mtime_ns, path.is_dir() or path.read_bytes()) for path in paths] == before
    assert len(paths) == len([path for path in tmp_path.rglob("*") if data not in (path, *path.parents)])


def repacked(pets: Path, ending: str) -> Path:
    """The pets as an archive: names in Unicode form NFD, below two folders; in a .tar, hard links as links."""
    names = {
        path: unicodedata.normalize("NFD", f"a/b/{path.relative_to(pets)}") for path in sorted(pets.rglob("*.png"))
    }
    if ending == ".zip":
        with zipfile.ZipFile(pets.with_suffix(".zip"), "w") as packed:
            for path, name in names.items():
                packed.writestr(name, path.read_bytes())
        return pets.with_suffix(".zip")
    with tarfile.open(pets.with_suffix(".tar"), "w") as packed:
        for path, name in names.items():
            packed.add(path, name)
    return pets.with_suffix(".tar")


@pytest.mark.parametrize("ending", [".tar", ".zip"])
def test_an_archive_with_other_unicode_and_hard_links_gives_what_its_folder_gives(
    data: Path, tmp_path: Path, ending: str
) -> None:
    names = [unicodedata.normalize("NFC", name) for name in ("café", "thé", "Ångström")]
    pets = image_folder(tmp_path / "pets", {f"{split}/{name}": 3 for split in ("train", "test") for name in names})
    for seed, split in ((90, "train"), (93, "test")):
        (pets / split / names[0] / "ééé.png").hardlink_to(pets / split / names[0] / "001.png")
        more = {name: png(seed=seed + number) for number, name in enumerate(("ea.png", "eé.png", "ez.png"))}
        write_files(pets / split / names[1], more)
    folder = prepare(data, pets)
    packed = preprocess("packed", data, repacked(pets, ending))
    assert packed.classes == folder.classes == sorted(names)
    assert packed.fingerprint == folder.fingerprint
    assert folder.meta["counts"]["train"] == {names[0]: 4, names[1]: 6, names[2]: 3}


def test_the_last_of_two_archive_members_of_one_name_is_used(data: Path, pets: Path) -> None:
    packed, other = archive(pets, ".tar"), png(seed=99)
    with tarfile.open(packed, "a") as file:
        info = tarfile.TarInfo("train/cat/001.png")
        info.size = len(other)
        file.addfile(info, io.BytesIO(other))
    (pets / "train/cat/001.png").write_bytes(other)  # as it is where the archive is unpacked
    assert preprocess("packed", data, packed).fingerprint == prepare(data, pets).fingerprint


def test_files_that_are_not_images_are_skipped_and_logged_in_one_line(
    data: Path, pets: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fingerprint = prepare(data, pets).fingerprint
    capsys.readouterr()
    stray = ("README.txt", "train/_classes.csv", "train/cat/Thumbs.db", "train/cat/desktop.ini", "test/dog/0.txt")
    write_files(pets, dict.fromkeys(stray, b"MZ"))
    again = prepare(data, pets, overwrite=True)
    assert (again.fingerprint, again.meta["rejected"]) == (fingerprint, [])
    assert capsys.readouterr().err == (
        "skipped 5 files (README.txt, test/dog/0.txt, train/_classes.csv, …): not images\n"
    )


def test_a_web_page_named_like_an_image_is_rejected(data: Path, pets: Path) -> None:
    write_files(pets, {"train/cat/page.jpg": b"<html>"})
    (reject,) = prepare(data, pets, ImageFolderOptions(allow_rejects=True)).meta["rejected"]
    assert (reject["path"], reject["reason"]) == ("train/cat/page.jpg", "not-an-image")


# layouts that are refused, and leave nothing behind


@pytest.mark.parametrize(
    ("layout", "parts"),
    [
        ({**SPLITS, "train/eel": 2}, ["'eel'", "in train but not in test"]),
        ({**SPLITS, "test/eel": 2}, ["'eel'", "in test but not in train"]),
        ({**SPLITS, "extra": 2}, ["train", "extra"]),
        ({**SPLITS, "extra/cat": 2}, ["train", "extra"]),
        ({"train/cat": 2, "train/dog": 2, "Training/cat": 2, "Training/dog": 2}, ["train", "Training"]),
        ({"test/cat": 2, "test/dog": 2}, ["test", "train"]),
        ({"test/cat": 2, "val/cat": 2}, ["test, val", "train"]),
        ({"train/cat": 2, "train/dog": 2, "test": 2}, ["test/000.png", "test/<class>"]),
        ({"train": 2, "test": 2}, ["/<class>"]),
        ({".": 3}, ["no class folders", "000.png", "<class>/<image>"]),
        ({"cat": 3}, ["'cat'", "two"]),
        ({"train/cat": 3, "test/cat": 3}, ["'cat'", "two"]),
        ({"cat": 5, "dog": 1}, ["'dog'", "test"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_an_unusable_layout_is_refused(data: Path, tmp_path: Path, layout: dict[str, int], parts: list[str]) -> None:
    source = image_folder(tmp_path / "source", layout)
    with refused(*parts, unchanged=data):
        prepare(data, source)


@pytest.mark.parametrize("ending", ["", ".tar", ".zip"])
@pytest.mark.parametrize(
    ("layout", "empty"), [({"cat": 5, "dog": 5}, "eel"), (SPLITS, "train/eel"), (SPLITS, "test/eel")]
)
def test_an_empty_class_folder_is_named(
    data: Path, tmp_path: Path, layout: dict[str, int], empty: str, ending: str
) -> None:
    source = image_folder(tmp_path / "source", layout)
    (source / empty).mkdir()
    if ending == ".zip":
        source = archive(source, ending)
        with zipfile.ZipFile(source, "a") as file:
            file.mkdir(empty)
    elif ending:
        with tarfile.open(tmp_path / "source.tar", "w") as file:
            file.add(source, ".")
        source = tmp_path / "source.tar"
    with refused(empty, "empty", unchanged=data):
        prepare(data, source)


def test_an_empty_folder_is_refused(data: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with refused(str(tmp_path / "empty"), "<class>/<image>", unchanged=data):
        prepare(data, tmp_path / "empty")


def test_a_missing_source_is_named(data: Path, tmp_path: Path) -> None:
    with refused(str(tmp_path / "none"), unchanged=data):
        prepare(data, tmp_path / "none")


@pytest.mark.parametrize("ending", [".tar", ".tar.gz", ".zip"])
def test_a_truncated_archive_is_refused(data: Path, pets: Path, ending: str) -> None:
    packed = archive(pets, ending)
    packed.write_bytes(packed.read_bytes()[: packed.stat().st_size // 2])
    with refused(str(packed), unchanged=data):
        prepare(data, packed)


@pytest.mark.parametrize("member", ["../evil.png", "cat/../../evil.png", "/tmp/evil-of-convline.png"])
@pytest.mark.parametrize("ending", [".tar", ".zip"])
def test_a_member_that_leaves_its_archive_is_refused(
    data: Path, pets: Path, tmp_path: Path, ending: str, member: str
) -> None:
    packed = archive(pets, ending)
    if ending == ".zip":
        with zipfile.ZipFile(packed, "a") as file:
            file.writestr(member, png())
    else:
        with tarfile.open(packed, "a") as file:
            info = tarfile.TarInfo(member)
            info.size = len(png())
            file.addfile(info, io.BytesIO(png()))
    before = contents(tmp_path)
    with refused(packed.name, member):
        prepare(data, packed)
    assert contents(tmp_path) == before
    assert not Path("/tmp/evil-of-convline.png").exists()


@pytest.mark.parametrize("ending", [".tar", ".tar.gz", ".tar.xz", ".zip"])
def test_a_folder_with_links_and_names_in_several_scripts_equals_its_archive(
    data: Path, tmp_path: Path, ending: str
) -> None:
    source = write_files(tmp_path / "pets", images({"Café": 5, "猫": 5}))
    os.link(source / "猫/000.png", source / "猫/once more.png")
    (source / "Café/linked.png").symlink_to("../Café/001.png")
    packed = tmp_path / f"pets{ending}"
    if ending == ".zip":  # whose names are not marked as UTF-8
        subprocess.run(["zip", "-qry", packed, "pets"], cwd=tmp_path, env={**os.environ, "LC_ALL": "C"}, check=True)
    else:
        subprocess.run(["tar", "-caf", packed, "pets"], cwd=tmp_path, check=True)
    from_folder, from_archive = prepare(data, source), prepare(data, packed, overwrite=True)
    assert from_archive.meta["classes"] == ["Café", "猫"] and from_archive.meta["rejected"] == []
    assert from_archive.fingerprint == from_folder.fingerprint
    assert sum(counts(from_archive).values()) == 12


def test_the_last_members_of_the_same_names_are_used_as_in_unpacking(
    data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    files = images({"cat": 5, "dog": 5})
    (tmp_path / "in").mkdir()
    for version in (dict.fromkeys(files, b"garbage"), files):
        write_files(tmp_path / "in", version)
        subprocess.run(["tar", "-rf", tmp_path / "pets.tar", "-C", tmp_path / "in", "."], check=True)
    (tmp_path / "unpacked").mkdir()
    subprocess.run(["tar", "-xf", tmp_path / "pets.tar", "-C", tmp_path / "unpacked"], check=True)
    dataset = prepare(data, tmp_path / "pets.tar")
    assert "holds 10 paths more than once" in capfd.readouterr().err and dataset.meta["rejected"] == []
    assert dataset.fingerprint == prepare(data, tmp_path / "unpacked", overwrite=True).fingerprint


def test_a_hidden_class_folder_is_logged(data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source = write_files(tmp_path / "pets", images({"cat": 5, "dog": 5, ".bird": 5}))
    assert prepare(data, source).meta["classes"] == ["cat", "dog"]
    assert "skipped hidden folders, whose names begin with a dot: .bird (5 images)" in capfd.readouterr().err


def test_an_unsupported_archive_is_named(data: Path, tmp_path: Path) -> None:
    write_files(tmp_path, {"pets.7z": b"7z"})
    with refused("pets.7z is a .7z file, which is not supported", unchanged=data):
        prepare(data, tmp_path / "pets.7z")


@pytest.mark.parametrize("name", ["", ".", "..", ".hidden", "a/b", "../a", "/a", "-a", "a b", "a\n", "archives"])
def test_a_bad_name_is_refused(data: Path, pets: Path, name: str) -> None:
    with refused("invalid dataset name", unchanged=data):
        preprocess(name, data, pets)


def test_an_unknown_name_needs_a_source(data: Path) -> None:
    with refused("pets", "digits", "mnist", "fashion-mnist", "--source", unchanged=data):
        preprocess("pets", data)


# sizes and channels


def test_images_of_several_sizes_need_a_size(data: Path, pets: Path) -> None:
    write_files(pets, {"train/dog/odd.png": png((9, 7))})
    with refused("4x4", "9x7", "train/dog/odd.png", "--image-size", unchanged=data):
        prepare(data, pets)


def test_images_that_are_not_square_keep_their_size(data: Path, tmp_path: Path) -> None:
    source = image_folder(tmp_path / "pets", SPLITS, size=(3, 5))
    assert prepare(data, source).split("train").images.shape == (7, 3, 5, 3)


def test_with_a_size_every_image_has_it(data: Path, pets: Path) -> None:
    write_files(pets, {"train/dog/odd.png": png((9, 7))})
    dataset = prepare(data, pets, ImageFolderOptions(size=(6, 5)))
    assert dataset.split("train").images.shape == (8, 6, 5, 3)
    assert (dataset.spec.height, dataset.spec.width) == (6, 5)


def run(data: Path, *arguments: object) -> tuple[int, str]:
    """`pipeline preprocess` in this process: its exit status and output."""
    result = CliRunner().invoke(app, ["preprocess", *map(str, arguments), "--data-dir", str(data)])
    return result.exit_code, result.output


def test_fit_and_resample_are_applied_and_stored_with_the_dataset(data: Path, tmp_path: Path) -> None:
    source = image_folder(tmp_path / "pets", SPLITS, size=(4, 8))
    status, output = run(data, "tiny", "--source", source, "--image-size", 4, "--fit", "pad", "--resample", "box")
    assert status == 0, output
    dataset = Dataset.open(data, "tiny")
    assert (dataset.spec.fit, dataset.spec.resample, dataset.spec.version) == ("pad", "box", 2)
    images = dataset.split("train").images
    assert not images[:, [0, 3]].any() and images[:, 1:3].any()  # 4 x 8 (height x width): black above and below


@pytest.mark.parametrize(("written", "size"), [("6", "6x6"), ("6x5", "6x5"), ("6X5", "6x5")])
def test_a_size_is_a_side_or_height_and_width(data: Path, pets: Path, written: str, size: str) -> None:
    status, output = run(data, "pets", "--source", pets, "--image-size", written)
    assert (status, f"{size}x3" in output) == (0, True)
    assert output.splitlines()[-5:-1] == [
        "class  train  test",
        "cat        4     2",
        "dog        3     1",
        "size: every image is 4x4 (height x width)",
    ]
    assert output.splitlines()[-1].startswith(f"{data / 'pets'}: 7 train, 3 test images of ")
    assert Dataset.open(data, "pets").split("test").images.shape == (3, *map(int, size.split("x")), 3)


def test_a_class_that_the_terminal_cannot_show_is_shown_as_an_escape(tmp_path: Path) -> None:
    image_folder(tmp_path / "pets", {"猫": 2, "dog": 2})
    result = run_process(tmp_path, "pipeline", "preprocess", "pets", "--source", "pets", PYTHONIOENCODING="ascii")
    assert result.stdout.splitlines()[:3] == ["class  train  test", "dog        1     1", "\\u732b          1     1"]


@pytest.mark.parametrize("written", ["", "0", "6x0", "-6", "x", "x6", "6x", "6x5x4", "6,5", "six", "1.5"])
def test_an_invalid_size_is_wrong_usage(data: Path, pets: Path, written: str) -> None:
    status, output = run(data, "pets", "--source", pets, f"--image-size={written}")
    assert (status, "--image-size" in output) == (2, True)
    assert contents(data) == {}


@pytest.mark.parametrize(
    ("channels", "coloured", "stored"),
    [("auto", 0, 1), ("auto", 1, 3), ("1", 0, 1), ("1", 1, 1), ("3", 0, 3), ("3", 1, 3)],
)
def test_channels_are_those_requested_or_detected(
    data: Path, tmp_path: Path, channels: str, coloured: int, stored: int
) -> None:
    grey = {name: encode(np.repeat(decode_grey(content), 3, 2)) for name, content in images(SPLITS, mode="L").items()}
    source = write_files(tmp_path / "pets", grey | images({"test/dog": coloured}))
    dataset = prepare(data, source, ImageFolderOptions(channels=channels))  # type: ignore[arg-type]
    assert dataset.spec.channels == stored == len(dataset.meta["mean"])
    for name in ("train", "test"):
        files = sorted(source.glob(f"{name}/*/*"))
        expected = np.stack([pixels(path, "L" if stored == 1 else "RGB") for path in files])
        np.testing.assert_array_equal(dataset.split(name).images, expected)


def decode_grey(content: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(content)) as image:
        return np.asarray(image)[..., None]


@pytest.mark.parametrize("size", [None, (3, 5)])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_stored_pixels_are_those_that_serving_decodes(
    data: Path, tmp_path: Path, mode: str, size: tuple[int, int] | None
) -> None:
    source = image_folder(tmp_path / "pets", SPLITS, size=(8, 6), mode=mode)
    dataset = prepare(data, source, ImageFolderOptions(size=size))
    served = [decode(path.read_bytes(), dataset.spec) for path in sorted(source.glob("test/*/*"))]
    np.testing.assert_array_equal(dataset.split("test").images, np.stack(served))


# unusable files


def test_one_unusable_file_in_a_hundred_is_listed_and_left_out(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = image_folder(tmp_path / "pets", {"cat": 80, "dog": 70})
    (source / "cat/007.png").write_bytes(png()[:40])
    dataset = prepare(data, source)
    assert [(reject["path"], reject["reason"]) for reject in dataset.meta["rejected"]] == [("cat/007.png", "truncated")]
    assert "cat/007.png" in capsys.readouterr().err
    stored = [image.tobytes() for name in ("train", "test") for image in dataset.split(name).images]
    whole = [pixels(path).tobytes() for path in source.rglob("*.png") if path.name != "007.png" or "dog" in path.parts]
    assert len(whole) == 149 and sorted(stored) == sorted(whole)


def test_an_unusable_file_shifts_no_label(data: Path, pets: Path) -> None:
    bad = {"train/cat/0000.png": b"", "train/cat/001.png": b"text", "train/dog/000.png": png()[:-20]}
    write_files(pets, bad)
    dataset = prepare(data, pets, ImageFolderOptions(allow_rejects=True))
    train = dataset.split("train")
    usable = [path for path in sorted(pets.glob("train/*/*")) if path.relative_to(pets).as_posix() not in bad]
    np.testing.assert_array_equal(train.images, np.stack([pixels(path) for path in usable]))
    assert [dataset.classes[label] for label in train.labels] == [path.parent.name for path in usable]
    assert {reject["path"]: reject["reason"] for reject in dataset.meta["rejected"]} == {
        "train/cat/0000.png": "empty",
        "train/cat/001.png": "not-an-image",
        "train/dog/000.png": "truncated",
    }


@pytest.mark.parametrize(("bad", "total"), [(1, 99), (2, 199), (1, 8)])
def test_more_than_one_unusable_file_in_a_hundred_is_refused(data: Path, tmp_path: Path, bad: int, total: int) -> None:
    source = image_folder(tmp_path / "pets", {"cat": total // 2, "dog": total - total // 2})
    for number in range(bad):
        (source / f"cat/{number:03}.png").write_bytes(b"")
    with refused(f"{bad} of {total}", "cat/000.png", "--allow-rejects", unchanged=data):
        prepare(data, source)
    assert len(prepare(data, source, ImageFolderOptions(allow_rejects=True)).meta["rejected"]) == bad


def test_exactly_one_unusable_file_in_a_hundred_is_accepted(data: Path, tmp_path: Path) -> None:
    source = image_folder(tmp_path / "pets", {"cat": 50, "dog": 50})
    (source / "cat/000.png").write_bytes(b"")
    assert sum(counts(prepare(data, source)).values()) == 99


def test_the_first_image_may_be_unusable(data: Path, tmp_path: Path) -> None:
    source = image_folder(tmp_path / "pets", {"cat": 50, "dog": 60}, size=(3, 5))
    (source / "cat/000.png").write_bytes(b"")
    assert prepare(data, source).split("train").images.shape[1:] == (3, 5, 3)


@pytest.mark.parametrize("bad", ["test/dog", "train/dog"])
def test_a_class_without_a_usable_image_is_refused(data: Path, pets: Path, bad: str) -> None:
    for path in (pets / bad).iterdir():
        path.write_bytes(b"")
    with refused("'dog'", bad.split("/")[0], unchanged=data):
        prepare(data, pets, ImageFolderOptions(allow_rejects=True))


def test_a_source_without_a_usable_image_is_refused(data: Path, tmp_path: Path) -> None:
    source = write_files(tmp_path / "pets", {"cat/a.txt": b"a", "dog/b.txt": b"b"})
    with refused(str(source), unchanged=data):
        prepare(data, source, ImageFolderOptions(allow_rejects=True))


@pytest.fixture
def deadly_gifs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow's reader of GIF has a defect that kills its process, as that of a C library would."""

    def die(_: object) -> None:
        faulthandler.disable()  # that of pytest, which would print a long traceback
        os.kill(os.getpid(), signal.SIGSEGV)

    monkeypatch.setattr("PIL.GifImagePlugin.GifImageFile.load", die)


@pytest.mark.usefixtures("deadly_gifs")
@pytest.mark.parametrize(
    "options", [ImageFolderOptions(), ImageFolderOptions((2, 2)), ImageFolderOptions((2, 2), jpeg="reduced")]
)
def test_a_file_that_kills_its_decoder_is_a_reject(data: Path, pets: Path, options: ImageFolderOptions) -> None:
    before = prepare(data, pets, options)
    for name in ("test/cat/!.gif", "test/dog/000.gif", "train/dog/z.gif"):  # one of them is the first file
        Image.new("L", (4, 4)).save(pets / name)
    after = prepare(data, pets, replace(options, allow_rejects=True), overwrite=True)
    assert after.fingerprint == before.fingerprint
    assert [(reject["path"], reject["reason"], reject["detail"]) for reject in after.meta["rejected"]] == [
        (path, "unreadable", "the process that decoded it ended (SIGSEGV)")
        for path in ("test/cat/!.gif", "test/dog/000.gif", "train/dog/z.gif")
    ]


def test_a_file_removed_before_it_is_decoded_is_a_reject(tmp_path: Path, pets: Path) -> None:
    paths = sorted(pets.rglob("*.png"))
    images = create_array(tmp_path / "images.npy", (len(paths), 4, 4, 3))
    files = (FileForRow(path.name, OnDisk(str(path)), row=row) for row, path in enumerate(paths) if row not in (3, 5))
    decoded = decode_into(images, files, ImageSpec(4, 4, 3), keep_size=True)
    assert {row: problem.reason for row, problem in decoded.rejects.items()} == {3: "unreadable", 5: "unreadable"}
    assert decoded.digests.keys() == set(range(len(paths)))


@pytest.mark.parametrize("jpeg", ["full", "reduced"])
def test_a_file_that_takes_too_long_to_decode_is_a_reject(
    tmp_path: Path, pets: Path, jpeg: Literal["full", "reduced"]
) -> None:
    write_files(pets, {"test/cat/!.jpg": slow_jpeg(2000)})
    prepared = decode_folder(pets, tmp_path, ImageFolderOptions((2, 2), allow_rejects=True, jpeg=jpeg), time_limit=0.5)
    assert [(reject["path"], reject["reason"]) for reject in prepared.rejects] == [("test/cat/!.jpg", "timeout")]
    assert {split: len(rows) for split, rows in prepared.rows.items()} == {"train": 7, "test": 3}


def test_where_processes_cannot_be_forked_the_dataset_is_the_same(
    data: Path, many: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = preprocess("many", data, many).fingerprint
    monkeypatch.setattr("convline.process_pool.can_fork", lambda: False)
    assert preprocess("again", data, many).fingerprint == expected


@pytest.fixture(scope="module")
def many(all_cpus: None, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: ARG001
    """Enough images for several processes."""
    return image_folder(tmp_path_factory.mktemp("many") / "pets", {"cat": 300, "dog": 300}, size=(2, 2))


def test_many_images_decoded_by_several_processes_keep_their_order(data: Path, many: Path) -> None:
    dataset = preprocess("many", data, many)
    files = {label: [pixels(path).tobytes() for path in sorted(many.glob(f"{label}/*"))] for label in ("cat", "dog")}
    for name, count in (("train", 240), ("test", 60)):
        split = dataset.split(name)
        for number, label in enumerate(dataset.classes):
            stored = [image.tobytes() for image in split.images[split.labels == number]]
            positions = [files[label].index(image) for image in stored]
            assert len(set(positions)) == count and positions == sorted(positions)


def test_an_unusable_file_among_many_is_listed(data: Path, many: Path, tmp_path: Path) -> None:
    source = shutil.copytree(many, tmp_path / "pets")
    (source / "dog/123.png").write_bytes(b"text")
    dataset = preprocess("many", data, source)
    assert [reject["path"] for reject in dataset.meta["rejected"]] == ["dog/123.png"]
    assert sum(counts(dataset).values()) == 599


def test_an_odd_size_among_many_is_named(data: Path, many: Path, tmp_path: Path) -> None:
    source = shutil.copytree(many, tmp_path / "pets")
    (source / "dog/123.png").write_bytes(png((9, 7)))
    with refused("2x2", "9x7", "dog/123.png", "--image-size", unchanged=data):
        preprocess("many", data, source)


# existing datasets, and leftovers of killed processes


def test_an_existing_dataset_is_refused_and_kept(data: Path, pets: Path) -> None:
    prepare(data, pets)
    (pets / "train/cat/000.png").unlink()
    with refused(str(data / "pets"), "--overwrite", unchanged=data):
        prepare(data, pets)


def test_overwriting_replaces_the_whole_dataset(data: Path, pets: Path, tmp_path: Path) -> None:
    prepare(data, pets)
    (data / "pets/notes.txt").write_text("of the old one")
    other = image_folder(tmp_path / "other", {"eel": 5, "fox": 5})
    assert prepare(data, other, overwrite=True).classes == ["eel", "fox"]
    assert contents(data).keys() == {"pets", "pets/meta.json", *(f"pets/{name}" for name in SAMPLES | OF_FILES)}


def test_a_failing_overwrite_keeps_the_earlier_dataset(data: Path, pets: Path) -> None:
    prepare(data, pets)
    (pets / "test/dog/000.png").write_bytes(b"")
    with refused("--allow-rejects", unchanged=data):
        prepare(data, pets, overwrite=True)
    with refused("'dog'", unchanged=data):  # fails after its images are decoded
        prepare(data, pets, ImageFolderOptions(allow_rejects=True), overwrite=True)


def test_what_a_killed_process_left_is_removed(data: Path, pets: Path) -> None:
    write_files(data / ".pets.00aa.tmp", {"decoded.npy": b"half"})
    prepare(data, pets)
    assert [path.name for path in data.iterdir()] == ["pets"]


def test_what_a_living_process_writes_is_not_touched(data: Path, pets: Path) -> None:
    with new_folder(data / "pets") as folder:
        write_files(folder, {"decoded.npy": b"half"})
        prepare(data, pets)
        assert (folder / "decoded.npy").read_bytes() == b"half"


def test_a_dataset_that_a_killed_process_was_replacing_is_put_back(data: Path, pets: Path) -> None:
    before = contents(prepare(data, pets).folder)
    (data / "pets").rename(data / ".pets.00aa.old")
    with refused("no such file"):
        prepare(data, data / "none", overwrite=True)
    assert contents(data / "pets") == before
    assert [path.name for path in data.iterdir()] == ["pets"]


def test_what_belongs_to_a_dataset_of_a_longer_name_is_not_touched(data: Path, pets: Path) -> None:
    preprocess("pets.small", data, pets)
    (data / "pets.small").rename(data / ".pets.small.00aa.old")
    before = contents(data)
    prepare(data, pets)
    assert {path: content for path, content in contents(data).items() if path.split("/")[0] != "pets"} == before


# a full disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A separate file system of 1 MiB, until it is remounted."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True)
    if mount.returncode:
        pytest.skip("this process may not mount a small file system")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)  # lazy: a failed test keeps its maps open


def run_full(folder: Path, source: Path, limit: int | None = None) -> subprocess.CompletedProcess[str]:
    """`pipeline preprocess` into `folder`/data, as a process that cannot write files of more than `limit` bytes."""
    return subprocess.run(
        command("pipeline", "preprocess", "pets", "--source", source),
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        preexec_fn=None if limit is None else lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )


def test_a_full_disk_is_said_and_nothing_is_left(small_disk: Path, tmp_path: Path) -> None:
    source = image_folder(tmp_path / "pets", {"cat": 25, "dog": 25}, size=(128, 64))  # 1.2 MB
    result = run_full(small_disk, source)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("error: No space left on device")
    assert "free some space" in result.stderr and "Traceback" not in result.stderr
    assert contents(small_disk) == {"data": None}


def test_a_file_that_may_not_grow_is_said_and_nothing_is_left(tmp_path: Path) -> None:
    source = image_folder(tmp_path / "pets", {"cat": 20, "dog": 20}, size=(32, 32))
    result = run_full(tmp_path, source, limit=50_000)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("error: File too large")
    assert "Traceback" not in result.stderr
    assert contents(tmp_path / "data") == {}


@pytest.mark.parametrize("name", ["pets", "digits"])
def test_wherever_the_disk_becomes_full_nothing_is_left(small_disk: Path, tmp_path: Path, name: str) -> None:
    """The disk is one memory page larger each time, until the dataset fits."""
    source = image_folder(tmp_path / "pets", {"cat": 10, "dog": 10}, size=(32, 32)) if name == "pets" else None
    page = resource.getpagesize()
    failures = []
    for pages in range(2, 100):
        subprocess.run(["mount", "-o", f"remount,size={pages * page}", str(small_disk)], check=True)
        try:
            preprocess(name, small_disk / "data", source)
        except OSError as error:
            failures.append((pages, error_message(error)))  # the error itself would keep its maps open
            assert contents(small_disk / "data") == {}
        else:
            break
    expected = SAMPLES | {"meta.json"} | (OF_FILES if source else set())
    assert len(failures) > 10 and contents(small_disk / "data" / name).keys() == expected
    assert [failure for failure in failures if "No space left on device" not in failure[1]] == []


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_dataset_is_prepared_on_a_disk_with_room_for_a_tenth_more(
    small_disk: Path, tmp_path: Path, mode: str
) -> None:
    counts = {"cat": 60, "dog": 60}
    source = image_folder(tmp_path / "pets", counts, size=(64, 64), mode=mode)
    size = 120 * 64 * 64 * 3  # grey ones are decoded in colour first
    subprocess.run(["mount", "-o", f"remount,size={int(1.1 * size)}", str(small_disk)], check=True)
    dataset = preprocess("pets", small_disk / "data", source)
    assert dataset.fingerprint == preprocess("pets", tmp_path / "data", source).fingerprint


# a real dataset


@pytest.mark.slow
def test_cifar_10_as_an_archive_of_jpeg_files(test_data: Path, data: Path) -> None:
    dataset = preprocess("cifar10-jpg", data, test_data / "cifar10-jpg.tar.gz")
    assert counts(dataset) == {"train": 50_000, "test": 10_000}
    assert set(dataset.meta["counts"]["train"].values()) == {5000}
    assert set(dataset.meta["counts"]["test"].values()) == {1000}
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    assert dataset.classes == names
    assert dataset.meta["rejected"] == []
    assert dataset.split("train").images.shape[1:] == (32, 32, 3)
    # 0.4914, 0.4822 and 0.4465 of 255, as every CIFAR-10 tutorial has them
    np.testing.assert_allclose(dataset.meta["mean"], (125.3, 122.9, 113.9), atol=0.5)


def test_what_another_datasets_crash_left_is_not_touched(tmp_path: Path) -> None:
    source = image_folder(tmp_path / "in", {"a": 5, "b": 5})
    other = tmp_path / "data/.tiny.400007.31337.old"
    other.mkdir(parents=True)
    preprocess("tiny", tmp_path / "data", source)
    assert other.exists()


# --- JPEGs decoded at reduced size


def photographs(folder: Path, soft: int) -> Path:
    """Large JPEGs of two classes, enlarged from `soft` x `soft` pixels of noise: the fewer, the blurrier."""
    random = np.random.default_rng(0)
    for number in range(20):
        coarse = Image.fromarray(random.integers(0, 256, (soft, soft, 3), np.uint8))
        path = folder / f"{number % 2}/{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse.resize((400, 400), Image.Resampling.BICUBIC).save(path, quality=95)
    return folder


def test_reduced_decoding_is_compared_and_its_difference_stored(data: Path, tmp_path: Path) -> None:
    source = photographs(tmp_path / "soft", soft=20)
    whole = prepare(data, source, ImageFolderOptions((32, 32)))
    reduced = prepare(data, source, ImageFolderOptions((32, 32), jpeg="reduced"), overwrite=True)
    assert "jpeg" not in whole.meta["image"] and reduced.meta["image"]["jpeg"] == "reduced"
    difference = reduced.meta["source"]["reduced_jpegs"]
    assert difference["images"] == 20 and 0 < difference["mean"] <= difference["largest"] < 2
    assert whole.meta["fingerprint"] != reduced.meta["fingerprint"]


def test_reduced_decoding_is_refused_where_pixels_differ_too_much(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.preparing.reduced_jpegs.MAX_DIFFERENCE", 0.1)
    with pytest.raises(ConvlineError, match=r"decoded at reduced size differs by .* leave out --jpeg reduced"):
        prepare(data, photographs(tmp_path / "noise", soft=400), ImageFolderOptions((32, 32), jpeg="reduced"))
    with pytest.raises(ConvlineError, match="--jpeg reduced needs --image-size"):
        prepare(data, photographs(tmp_path / "soft", soft=20), ImageFolderOptions(jpeg="reduced"))
    assert not list(data.glob("*"))
