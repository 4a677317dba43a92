"""What is read off the names of folders: splits, classes, files that are no images; and what is asked about."""

from __future__ import annotations

import random
import unicodedata
from collections import Counter
from pathlib import Path

import pytest

from pipeline.preparing.class_table import class_table
from pipeline.preparing.folder_layout import Layout, lay_out
from pipeline.preparing.split_names import split_of
from pipeline.preparing.stray_files import is_stray
from tests.pipeline.helpers import refused

SOURCE = Path("photos")


def read(*folders: str, files: tuple[str, ...] = ()) -> Layout:
    """The layout of a source with three images in each of the folders, and other files."""
    return lay_out(SOURCE, [f"{folder}/{number}.jpg" for folder in folders for number in range(3)] + list(files))


def splits(layout: Layout) -> dict[str, dict[str, int]]:
    """{"train": {"cat": 3, …}, …}, counted from the places."""
    found: dict[str, dict[str, int]] = {}
    for (split, label), count in Counter(layout.places.values()).items():
        found.setdefault(split, {})[label] = count
    return found


def both(*tops: str, classes: tuple[str, ...] = ("cat", "dog")) -> list[str]:
    return [f"{top}/{label}" for top in tops for label in classes]


TRAIN_AND_TEST = {"train": {"cat": 3, "dog": 3}, "test": {"cat": 3, "dog": 3}}
CLASSES = {"train": {"cat": 3, "dog": 3}}

# --- names of splits

NAMED = {
    "train": "train Train TRAIN training train_set training_set trainset training-images Training Data train2017 "
    "ILSVRC2012_img_train seg_train train_images images_train trainingImages train-jpg imgs_train data_train",
    "validation": "val valid validation Val val_set valid-images validation_dataset dev dev_set eval val2017",
    "test": "test testing TEST test_set testset test-images seg_test Test Images test1 holdout held-out test_data",
    "unlabelled": "seg_pred prediction unlabeled unlabelled_images",
    None: "cat trains trainers latest contest attest station fold1 set images data invalid devil value testimony "
    "cats_train pretest tr 2020 extra control sample",
}


@pytest.mark.parametrize(("kind", "names"), NAMED.items())
def test_splits_are_called_what_people_call_them(kind: str | None, names: str) -> None:
    spaced = names.replace("Training Data", "Training~Data").replace("Test Images", "Test~Images").split()
    assert {name: split_of(name.replace("~", " ")) for name in spaced} == dict.fromkeys(spaced, kind)


@pytest.mark.parametrize("train", ["training_set", "Train", "seg_train", "Training Data", "train2017", "imgs-train"])
@pytest.mark.parametrize("test", ["test_set", "TEST", "seg_test", "Test Images", "val2017", "dev"])
def test_folders_called_like_splits_are_splits(train: str, test: str) -> None:
    assert splits(read(*both(train, test))) == TRAIN_AND_TEST


# --- arrangements

ARRANGED = {
    "classes": ([*both("."), "./eel"], {"train": {"cat": 3, "dog": 3, "eel": 3}}),
    "below train": (both("train"), CLASSES),
    "wrapped": (both("a/b/train", "a/b/test"), TRAIN_AND_TEST),
    "each split in a second folder of its name": (both("seg_train/seg_train", "seg_test/seg_test"), TRAIN_AND_TEST),
    "images below each split": (both("train/images", "test/images"), TRAIN_AND_TEST),
    "a wrapper called like a split": (both("training_data/train", "training_data/test"), TRAIN_AND_TEST),
    "splits in each class": (["cat/train", "cat/test", "dog/train", "dog/test"], TRAIN_AND_TEST),
    "splits in each class, one unused": (
        [f"{label}/{split}" for label in ("cat", "dog") for split in ("train", "val", "test")],
        TRAIN_AND_TEST,
    ),
    "validation serves as test": (both("train", "valid"), TRAIN_AND_TEST),
    "validation beside test": (both("train", "val", "test"), TRAIN_AND_TEST),
    "images without labels": ([*both("seg_train", "seg_test"), "seg_pred/seg_pred"], TRAIN_AND_TEST),
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


@pytest.mark.parametrize(("folders", "expected"), ARRANGED.values(), ids=ARRANGED)
def test_an_arrangement_is_read(folders: list[str], expected: dict[str, dict[str, int]]) -> None:
    layout = lay_out(SOURCE, [f"{folder}/{n}.jpg".removeprefix("./") for folder in folders for n in range(3)])
    assert splits(layout) == expected
    assert layout.classes == sorted(expected["train"])


ASKED = {
    "a class called train": (["bus", "train", "car"], ["train is called like a split", "below a folder train/"]),
    "valid and invalid": (["valid", "invalid"], ["valid", "below a folder train/"]),
    "test and control": (["test", "control"], ["test", "below a folder train/"]),
    "splits without classes": (["train", "test"], ["test, train", "train/<class>/<image>", "below a folder train/"]),
    "a class called train, with folders": (
        ["bus", "train/steam", "train/electric"],
        ["train beside bus", "below a folder train/"],
    ),
    "folds": (both("fold1", "fold2", "fold3"), ["fold1, fold2, fold3", "cat, dog", "is fold1 a split", "below a"]),
    "folds that are not alike in all": (
        ["a/cat", "a/dog", "a/eel", "b/cat", "b/dog", "b/fox"],
        ["a, b", "cat, dog", "is a a split"],
    ),
    "folds with a folder between": (both("a/images", "b/images"), ["is a a split"]),
    "folds in each class": (["cat/f1", "cat/f2", "dog/f1", "dog/f2"], ["cat, dog", "f1, f2", "below a folder train/"]),
    "many patients with the same classes": (both(*map(str, range(300)), classes=("0", "1")), ["is 0 a split", "…"]),
    "names that differ in case": (["a/Cat", "a/Dog", "b/cat", "b/dog"], ["is a a split"]),
    "a split with another name beside one": (both("train", "phone"), ["train beside phone", "is phone a split"]),
    "a split and classes": ([*both("train", "test"), "extra"], ["beside extra"]),
    "two of one name": (both("train", "test", "test2"), ["test, test2", "keep one"]),
    "two to train on": (both("train", "Training", "test"), ["exactly one"]),
    "nothing to train on": (both("test", "val"), ["test, val", "exactly one folder must be named train"]),
    "classes and splits in one name": (
        ["cat_train", "cat_test", "dog_train", "dog_test"],
        ["cat_test, cat_train", "train/<class>/<image>"],
    ),
    "splits in each class, with classes in them": (
        both("a/train", "a/test", "b/train", "b/test"),
        ["holds splits (test, train)"],
    ),
    "the whole beside its classes": (["cat", "dog", "all/cat", "all/dog"], ["all", "beside it as well", "move away"]),
    "the whole beside its splits": (
        [*both("train", "test"), *both("pets/train", "pets/test")],
        ["beside pets", "move away"],
    ),
    "splits in a folder beside another": (
        [*both("set/train", "set/test"), "more"],
        ["set holds splits (test, train)", "more", "move away"],
    ),
    "a class that is divided beside one that is not": (
        ["cat/train", "cat/test", "dog"],
        ["cat holds splits (test, train)"],
    ),
    "unlabelled images beside classes": (
        ["cat", "dog", "unlabeled"],
        ["unlabeled", "move away what is not to be used"],
    ),
    "a set of data called like a split, with more in it": (
        [*both("training_data/train", "training_data/test"), "training_data/extra"],
        ["beside extra"],
    ),
    "a split without classes": ([*both("train"), "test"], ["test/0.jpg", "test/<class>/<image>", "move test away"]),
}


@pytest.mark.parametrize(("folders", "said"), ASKED.values(), ids=ASKED)
def test_what_could_be_splits_or_classes_is_asked(folders: list[str], said: list[str]) -> None:
    with refused("photos", *said):
        read(*folders)


@pytest.mark.parametrize("folders", [["test"], ["test", "test/cat", "test/dog"]])
def test_an_empty_split_is_named(folders: list[str]) -> None:
    with refused("photos: test is called like a split and holds no images"):
        lay_out(SOURCE, [f"{folder}/0.jpg" for folder in both("train")], folders)


def test_what_serves_as_what_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    read(*both("training_set", "valid"))
    told = capsys.readouterr().err
    assert "training_set is train" in told and "there is no test split: valid serves as test" in told
    read(*both("train", "valid", "test"))
    assert "test serves as test; valid (6 images) is not used" in capsys.readouterr().err
    read(*both("train", "test"), "seg_pred")
    assert "seg_pred is called like images without labels: 3 files" in capsys.readouterr().err


def test_the_order_in_which_files_are_listed_does_not_matter() -> None:
    paths = [f"{folder}/{number}.jpg" for folder in both("train", "test") for number in range(3)]
    expected = lay_out(SOURCE, paths)
    for seed in range(5):
        layout = lay_out(SOURCE, random.Random(seed).sample(paths, len(paths)))
        assert (layout.classes, dict(sorted(layout.places.items()))) == (
            expected.classes,
            dict(sorted(expected.places.items())),
        )


def test_folders_one_in_the_other_without_end_are_read() -> None:
    with refused("only the class"):
        lay_out(SOURCE, ["a/" * 5_000 + "x.jpg"])


# --- names of classes

NFC, NFD = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))


def test_one_name_in_two_forms_of_unicode_is_one_class(capsys: pytest.CaptureFixture[str]) -> None:
    assert splits(read(NFC, NFD, "tea")) == {"train": {NFC: 6, "tea": 3}}
    assert capsys.readouterr().err.startswith("2 folders are called café")
    layout = read(f"train/{NFC}", "train/tea", f"test/{NFD}", "test/tea")
    assert splits(layout) == {"train": {NFC: 3, "tea": 3}, "test": {NFC: 3, "tea": 3}}
    assert layout.classes == [NFC, "tea"]


@pytest.mark.parametrize(
    ("train", "test", "said"),
    [
        ("cat", "Cat", "class 'cat' is in train but not in test, which has 'Cat': are they one?"),
        ("cat", "cat ", "which has 'cat ': are they one?"),
        ("red panda", "red_panda", "which has 'red_panda': are they one?"),
        ("giraffe", "girafe", "which has 'girafe': are they one?"),
        ("giraffe", "owl", "class 'giraffe' is in train but not in test; add or remove it"),
    ],
)
def test_a_class_that_a_split_lacks_is_named_and_one_that_may_be_meant(train: str, test: str, said: str) -> None:
    with refused(said):
        read(f"train/{train}", "train/eel", f"test/{test}", "test/eel")


def test_names_that_look_alike_are_asked_about(capsys: pytest.CaptureFixture[str]) -> None:
    assert read("Cat", "cat", "cat ", "dog").classes == ["Cat", "cat", "cat ", "dog"]
    assert "are 'Cat' and 'cat' and 'cat ' one class? They are taken for 3" in capsys.readouterr().err
    read("+", "-", "_", "eel")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", ["a\u202egpj", "ca\u200bt", "\udcff", "a\tb", "\x1b[31m"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_a_name_that_cannot_be_shown_is_refused_in_every_split(name: str, split: str) -> None:
    with refused("is no name for a class"):
        read(*both("train", "test"), f"{split}/{name}")


# --- files that are no images

STRAYS = [
    *("README.txt", "train/_classes.csv", "train/cat/Thumbs.db", "test/dog/desktop.ini", "LICENSE", "labels.json"),
    *("train/cat/0.txt", "train/dog/1.xml", "@eaDir/x.jpg", "train/@eaDir/cat/x.jpg", "train/cat/Icon\r", "x.tar.gz"),
    *("train/cat/a.npy", "notes.MD", "ehthumbs.db", "test/classes.html", "split.py", "paper.pdf", "__MACOSX/x.jpg"),
]


def test_files_that_are_no_images_are_passed_over_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert splits(read(*both("train", "test"), files=tuple(STRAYS))) == TRAIN_AND_TEST
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1 and told[0].startswith(f"not used, as they are no images: {len(STRAYS)} files (")


@pytest.mark.parametrize(
    "path", ["a.jpg", "A.JPEG", "a", "a.heic", "a.dcm", "a.svg", "a.jpg.part", "txt", "csv/a.png", "a.raw", "a.nef"]
)
def test_what_may_be_an_image_is_none_of_them(path: str) -> None:
    assert not is_stray(path)


def test_images_beside_the_classes_are_not_used_and_told(capsys: pytest.CaptureFixture[str]) -> None:
    loose = ("0.jpg", "pets/1.jpg", "pets/train/2.jpg", "pets/train/3.jpg", "pets/train/4.jpg", "pets/train/5.jpg")
    assert splits(read(*both("pets/train", "pets/test"), files=loose)) == TRAIN_AND_TEST
    assert capsys.readouterr().err.splitlines() == [
        "not used, as they are in no class: 1 file (0.jpg)",
        "not used, as they are in no class: 1 file (pets/1.jpg)",
        "not used, as they are in no class: 4 files (pets/train/2.jpg, pets/train/3.jpg, pets/train/4.jpg, …)",
    ]


@pytest.mark.parametrize("folder", ["eel", "train/eel"])
def test_a_class_with_nothing_but_other_files_is_named(folder: str) -> None:
    others = both(*folder.split("/")[:-1] or ["."])
    with refused(f"the class folder {folder} holds no images, only files such as {folder}/a.npy"):
        lay_out(SOURCE, [f"{top}/0.jpg".removeprefix("./") for top in others] + [f"{folder}/a.npy"])


# --- the table


def test_every_class_stands_in_the_table_with_its_counts() -> None:
    table = list(class_table({"train": {"cat": 1200, "red panda": 7}, "test": {"cat": 30, "red panda": 1}}))
    assert table == ["class      train  test", "cat         1200    30", "red panda      7     1"]


def test_of_many_classes_the_largest_and_the_smallest_stand_in_the_table() -> None:
    sizes = {f"class {number:03}": 1000 - number for number in range(100)}
    table = list(class_table({"train": sizes, "test": dict.fromkeys(sizes, 1)}))
    assert [line.split()[1] for line in table[1:11]] == [f"{number:03}" for number in range(10)]
    assert table[11] == "… 80 classes of sizes between these"
    assert [line.split()[1] for line in table[12:]] == [f"{number:03}" for number in range(90, 100)]
