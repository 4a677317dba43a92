"""Splits, classes and skipped files as read off folder and file names; ambiguous layouts are refused."""

from __future__ import annotations

import random
import unicodedata
from collections import Counter
from pathlib import Path

import pytest

from pipeline.preparing.dataset_summary import class_counts_table
from pipeline.preparing.folder_layout import FolderLayout, read_layout
from pipeline.preparing.skipped_files import is_skipped
from pipeline.preparing.split_names import split_of
from tests.pipeline.helpers import refused

SOURCE = Path("photos")


def read(*folders: str, files: tuple[str, ...] = ()) -> FolderLayout:
    """The layout of a source with three images in each of the folders, and with other files."""
    return read_layout(SOURCE, [f"{folder}/{number}.jpg" for folder in folders for number in range(3)] + list(files))


def splits(layout: FolderLayout) -> dict[str, dict[str, int]]:
    """{"train": {"cat": 3, …}, …}, counted from the layout."""
    found: dict[str, dict[str, int]] = {}
    for (split, label), count in Counter(layout.split_and_class.values()).items():
        found.setdefault(split, {})[label] = count
    return found


def classes_in(*parents: str, classes: tuple[str, ...] = ("cat", "dog")) -> list[str]:
    return [f"{parent}/{label}" for parent in parents for label in classes]


TRAIN_AND_TEST = {"train": {"cat": 3, "dog": 3}, "test": {"cat": 3, "dog": 3}}
ALL_SPLITS = {**TRAIN_AND_TEST, "validation": {"cat": 3, "dog": 3}}
CLASSES = {"train": {"cat": 3, "dog": 3}}

# --- names of splits

SPLIT_NAMES = {
    "train": "train Train TRAIN training train_set training_set trainset training-images Training Data train2017 "
    "ILSVRC2012_img_train seg_train train_images images_train trainingImages train-jpg imgs_train data_train",
    "validation": "val valid validation Val val_set valid-images validation_dataset dev dev_set eval val2017",
    "test": "test testing TEST test_set testset test-images seg_test Test Images test1 holdout held-out test_data",
    "unlabelled": "seg_pred prediction unlabeled unlabelled_images",
    None: "cat trains trainers latest contest attest station fold1 set images data invalid devil value testimony "
    "cats_train pretest tr 2020 extra control sample",
}


@pytest.mark.parametrize(("kind", "names"), SPLIT_NAMES.items())
def test_usual_names_of_splits_are_recognised(kind: str | None, names: str) -> None:
    spaced = names.replace("Training Data", "Training~Data").replace("Test Images", "Test~Images").split()
    assert {name: split_of(name.replace("~", " ")) for name in spaced} == dict.fromkeys(spaced, kind)


@pytest.mark.parametrize("train", ["training_set", "Train", "seg_train", "Training Data", "train2017", "imgs-train"])
@pytest.mark.parametrize("test", ["test_set", "TEST", "seg_test", "Test Images", "val2017", "dev"])
def test_folders_named_like_splits_are_splits(train: str, test: str) -> None:
    assert splits(read(*classes_in(train, test))) == TRAIN_AND_TEST


# --- layouts

LAYOUTS = {
    "classes": ([*classes_in("."), "./eel"], {"train": {"cat": 3, "dog": 3, "eel": 3}}),
    "below train": (classes_in("train"), CLASSES),
    "wrapped": (classes_in("a/b/train", "a/b/test"), TRAIN_AND_TEST),
    "each split in two folders of its name": (
        classes_in("seg_train/seg_train", "seg_test/seg_test"),
        TRAIN_AND_TEST,
    ),
    "images below each split": (classes_in("train/images", "test/images"), TRAIN_AND_TEST),
    "a wrapper named like a split": (classes_in("training_data/train", "training_data/test"), TRAIN_AND_TEST),
    "splits in each class": (["cat/train", "cat/test", "dog/train", "dog/test"], TRAIN_AND_TEST),
    "splits in each class, with validation": (
        [f"{label}/{split}" for label in ("cat", "dog") for split in ("train", "val", "test")],
        ALL_SPLITS,
    ),
    "validation serves as test": (classes_in("train", "valid"), TRAIN_AND_TEST),
    "validation beside test": (classes_in("train", "val", "test"), ALL_SPLITS),
    "images without labels": ([*classes_in("seg_train", "seg_test"), "seg_pred/seg_pred"], TRAIN_AND_TEST),
    "classes with other folders in each": (
        ["cat/indoor", "cat/sofa", "dog/park", "dog/street"],
        {"train": {"cat": 6, "dog": 6}},
    ),
    "classes with one same folder in each": (["cat/images", "dog/images"], CLASSES),
    "classes with images and the same folders": (
        ["cat", "cat/indoor", "cat/outdoor", "dog", "dog/indoor", "dog/outdoor"],
        {"train": {"cat": 9, "dog": 9}},
    ),
    "classes with the same folders, below train": (
        ["train/cat/2023", "train/cat/2024", "train/dog/2023", "train/dog/2024"],
        {"train": {"cat": 6, "dog": 6}},
    ),
    "a class called train, below train": (
        ["train/bus", "train/train", "train/car"],
        {"train": {"bus": 3, "car": 3, "train": 3}},
    ),
    "a class called train, with folders, below train": (
        ["train/bus", "train/train/steam", "train/train/electric"],
        {"train": {"bus": 3, "train": 6}},
    ),
    "valid and invalid, below train": (["train/valid", "train/invalid"], {"train": {"invalid": 3, "valid": 3}}),
    "valid and invalid in splits": (
        ["train/valid", "train/invalid", "test/valid", "test/invalid"],
        {"train": {"invalid": 3, "valid": 3}, "test": {"invalid": 3, "valid": 3}},
    ),
}


@pytest.mark.parametrize(("folders", "expected"), LAYOUTS.values(), ids=LAYOUTS)
def test_a_layout_is_read(folders: list[str], expected: dict[str, dict[str, int]]) -> None:
    layout = read_layout(SOURCE, [f"{folder}/{n}.jpg".removeprefix("./") for folder in folders for n in range(3)])
    assert splits(layout) == expected
    assert layout.classes == sorted(expected["train"])


AMBIGUOUS_LAYOUTS = {
    "a class called train": (["bus", "train", "car"], ["train is named like a split", "into a folder train/"]),
    "valid and invalid": (["valid", "invalid"], ["valid", "into a folder train/"]),
    "test and control": (["test", "control"], ["test", "into a folder train/"]),
    "splits without classes": (["train", "test"], ["test, train", "train/<class>/<image>", "into a folder train/"]),
    "a class called train, with folders": (
        ["bus", "train/steam", "train/electric"],
        ["train beside bus", "into a folder train/"],
    ),
    "folds": (classes_in("fold1", "fold2", "fold3"), ["fold1, fold2, fold3", "cat, dog", "is fold1 a split", "into a"]),
    "folds that share some classes": (
        ["a/cat", "a/dog", "a/eel", "b/cat", "b/dog", "b/fox"],
        ["a, b", "cat, dog", "is a a split"],
    ),
    "folds with a folder between": (classes_in("a/images", "b/images"), ["is a a split"]),
    "folds in each class": (["cat/f1", "cat/f2", "dog/f1", "dog/f2"], ["cat, dog", "f1, f2", "into a folder train/"]),
    "many patients with the same classes": (
        classes_in(*map(str, range(300)), classes=("0", "1")),
        ["is 0 a split", "…"],
    ),
    "class names that differ in case": (["a/Cat", "a/Dog", "b/cat", "b/dog"], ["is a a split"]),
    "a split with another name beside one": (classes_in("train", "phone"), ["train beside phone", "is phone a split"]),
    "a split and classes": ([*classes_in("train", "test"), "extra"], ["beside extra"]),
    "two test splits": (classes_in("train", "test", "test2"), ["test, test2", "keep one"]),
    "two train splits": (classes_in("train", "Training", "test"), ["exactly one"]),
    "no train split": (classes_in("test", "val"), ["test, val", "exactly one folder must be named train"]),
    "classes and splits in one name": (
        ["cat_train", "cat_test", "dog_train", "dog_test"],
        ["cat_test, cat_train", "train/<class>/<image>"],
    ),
    "splits in each class, with classes in them": (
        classes_in("a/train", "a/test", "b/train", "b/test"),
        ["holds splits (test, train)"],
    ),
    "a copy of all classes beside the classes": (
        ["cat", "dog", "all/cat", "all/dog"],
        ["all", "holds the same folders", "as are beside it", "move away"],
    ),
    "a copy of all splits beside the splits": (
        [*classes_in("train", "test"), *classes_in("pets/train", "pets/test")],
        ["beside pets", "move away"],
    ),
    "splits in a folder beside another": (
        [*classes_in("set/train", "set/test"), "more"],
        ["set holds splits (test, train)", "more", "move away"],
    ),
    "a class that is divided beside one that is not": (
        ["cat/train", "cat/test", "dog"],
        ["cat holds splits (test, train)"],
    ),
    "unlabelled images beside classes": (
        ["cat", "dog", "unlabeled"],
        ["unlabeled", "move away folders that should not be used"],
    ),
    "a dataset folder named like a split, with another folder in it": (
        [*classes_in("training_data/train", "training_data/test"), "training_data/extra"],
        ["beside extra"],
    ),
    "a split without classes": (
        [*classes_in("train"), "test"],
        ["test/0.jpg", "test/<class>/<image>", "move test away"],
    ),
}


@pytest.mark.parametrize(("folders", "parts"), AMBIGUOUS_LAYOUTS.values(), ids=AMBIGUOUS_LAYOUTS)
def test_an_ambiguous_layout_is_refused_with_a_question(folders: list[str], parts: list[str]) -> None:
    with refused("photos", *parts):
        read(*folders)


@pytest.mark.parametrize("folders", [["test"], ["test", "test/cat", "test/dog"]])
def test_an_empty_split_is_named(folders: list[str]) -> None:
    with refused("photos: test is named like a split but holds no images"):
        read_layout(SOURCE, [f"{folder}/0.jpg" for folder in classes_in("train")], folders)


def test_the_use_of_splits_is_logged(capsys: pytest.CaptureFixture[str]) -> None:
    read(*classes_in("training_set", "valid"))
    logged = capsys.readouterr().err
    assert "training_set is train" in logged and "there is no test split: valid serves as test" in logged
    read(*classes_in("train", "valid", "test"))
    assert "splits: valid is validation" in capsys.readouterr().err
    read(*classes_in("train", "test"), "seg_pred")
    assert "seg_pred/2.jpg): seg_pred is named like a folder of unlabelled images" in capsys.readouterr().err


def test_the_order_in_which_files_are_listed_does_not_matter() -> None:
    paths = [f"{folder}/{number}.jpg" for folder in classes_in("train", "test") for number in range(3)]
    expected = read_layout(SOURCE, paths)
    for seed in range(5):
        layout = read_layout(SOURCE, random.Random(seed).sample(paths, len(paths)))
        assert (layout.classes, dict(sorted(layout.split_and_class.items()))) == (
            expected.classes,
            dict(sorted(expected.split_and_class.items())),
        )


def test_deeply_nested_folders_are_read() -> None:
    with refused("only one class"):
        read_layout(SOURCE, ["a/" * 5_000 + "x.jpg"])


# --- names of classes

NFC, NFD = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))


def test_one_name_in_two_forms_of_unicode_is_one_class(capsys: pytest.CaptureFixture[str]) -> None:
    assert splits(read(NFC, NFD, "tea")) == {"train": {NFC: 6, "tea": 3}}
    assert capsys.readouterr().err.startswith("2 folders are named café")
    layout = read(f"train/{NFC}", "train/tea", f"test/{NFD}", "test/tea")
    assert splits(layout) == {"train": {NFC: 3, "tea": 3}, "test": {NFC: 3, "tea": 3}}
    assert layout.classes == [NFC, "tea"]


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        ("cat", "Cat", "class 'cat' is in train but not in test, which has 'Cat': are they one class?"),
        ("cat", "cat ", "which has 'cat ': are they one class?"),
        ("red panda", "red_panda", "which has 'red_panda': are they one class?"),
        ("giraffe", "girafe", "which has 'girafe': are they one class?"),
        ("giraffe", "owl", "class 'giraffe' is in train but not in test; add or remove it"),
    ],
)
def test_a_class_missing_from_a_split_is_named_with_a_similar_one(train: str, test: str, message: str) -> None:
    with refused(message):
        read(f"train/{train}", "train/eel", f"test/{test}", "test/eel")


def test_class_names_that_look_alike_are_logged(capsys: pytest.CaptureFixture[str]) -> None:
    assert read("Cat", "cat", "cat ", "dog").classes == ["Cat", "cat", "cat ", "dog"]
    assert "'Cat' and 'cat' and 'cat ' look alike; they are 3 separate classes" in capsys.readouterr().err
    read("+", "-", "_", "eel")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", ["a\u202egpj", "ca\u200bt", "\udcff", "a\tb", "\x1b[31m"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_a_name_that_cannot_be_shown_is_refused_in_every_split(name: str, split: str) -> None:
    with refused("invalid class name"):
        read(*classes_in("train", "test"), f"{split}/{name}")


# --- skipped files

SKIPPED = [
    *("README.txt", "train/_classes.csv", "train/cat/Thumbs.db", "test/dog/desktop.ini", "LICENSE", "labels.json"),
    *("train/cat/0.txt", "train/dog/1.xml", "@eaDir/x.jpg", "train/@eaDir/cat/x.jpg", "train/cat/Icon\r", "x.tar.gz"),
    *("train/cat/a.npy", "notes.MD", "ehthumbs.db", "test/classes.html", "split.py", "paper.pdf", "__MACOSX/x.jpg"),
]


def test_files_that_are_not_images_are_skipped_and_logged_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert splits(read(*classes_in("train", "test"), files=tuple(SKIPPED))) == TRAIN_AND_TEST
    logged = capsys.readouterr().err.splitlines()
    assert len(logged) == 1 and logged[0].startswith(f"skipped {len(SKIPPED)} files (")


@pytest.mark.parametrize(
    "path", ["a.jpg", "A.JPEG", "a", "a.heic", "a.dcm", "a.svg", "a.jpg.part", "txt", "csv/a.png", "a.raw", "a.nef"]
)
def test_a_file_that_may_be_an_image_is_not_skipped(path: str) -> None:
    assert not is_skipped(path)


def test_images_outside_class_folders_are_skipped_and_logged(capsys: pytest.CaptureFixture[str]) -> None:
    loose = ("0.jpg", "pets/1.jpg", "pets/train/2.jpg", "pets/train/3.jpg", "pets/train/4.jpg", "pets/train/5.jpg")
    assert splits(read(*classes_in("pets/train", "pets/test"), files=loose)) == TRAIN_AND_TEST
    assert capsys.readouterr().err.splitlines() == [
        "skipped 1 file (0.jpg): not in a class folder",
        "skipped 1 file (pets/1.jpg): not in a class folder",
        "skipped 4 files (pets/train/2.jpg, pets/train/3.jpg, pets/train/4.jpg, …): not in a class folder",
    ]


@pytest.mark.parametrize("folder", ["eel", "train/eel"])
def test_a_class_folder_with_only_skipped_files_is_named(folder: str) -> None:
    others = classes_in(*folder.split("/")[:-1] or ["."])
    with refused(f"the class folder {folder} holds no images, only files such as {folder}/a.npy"):
        read_layout(SOURCE, [f"{top}/0.jpg".removeprefix("./") for top in others] + [f"{folder}/a.npy"])


# --- the table of class counts


def test_the_table_shows_the_counts_of_every_class() -> None:
    table = list(class_counts_table({"train": {"cat": 1200, "red panda": 7}, "test": {"cat": 30, "red panda": 1}}))
    assert table == ["class      train  test", "cat         1200    30", "red panda      7     1"]


def test_of_many_classes_the_table_shows_the_largest_and_the_smallest() -> None:
    sizes = {f"class {number:03}": 1000 - number for number in range(100)}
    table = list(class_counts_table({"train": sizes, "test": dict.fromkeys(sizes, 1)}))
    assert [line.split()[1] for line in table[1:11]] == [f"{number:03}" for number in range(10)]
    assert table[11] == "… 80 classes of sizes between these"
    assert [line.split()[1] for line in table[12:]] == [f"{number:03}" for number in range(90, 100)]
