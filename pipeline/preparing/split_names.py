"""Which names of folders and files count as train, validation or test splits: `training_set`, `valid`, `val2017`, …"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from pathlib import PurePosixPath
from typing import Literal

SplitKind = Literal["train", "validation", "test", "unlabelled"]

SPLIT_WORDS: dict[str, SplitKind] = {
    **dict.fromkeys(("train", "training", "trn"), "train"),
    **dict.fromkeys(
        ("val", "valid", "validation", "validate", "validating", "dev", "eval", "evaluation"), "validation"
    ),
    **dict.fromkeys(("test", "testing", "holdout", "heldout"), "test"),
    **dict.fromkeys(("pred", "predict", "prediction", "predictions", "unlabelled", "unlabeled"), "unlabelled"),
}
FILLER_WORDS = (  # may stand before and after a split word
    *("set", "sets", "data", "dataset", "datasets", "split", "part", "subset", "folder", "dir", "files"),
    *("image", "images", "img", "imgs", "photo", "photos", "picture", "pictures", "pic", "pics", "sample", "samples"),
    *("jpg", "jpeg", "png", "seg", "ilsvrc", "imagenet", "coco", "raw", "resized", "cropped", "partial"),
)
_FILLERS = f"(?:{'|'.join(FILLER_WORDS)})*"
_SPLIT = re.compile(f"{_FILLERS}({'|'.join(SPLIT_WORDS)}){_FILLERS}")


def split_of(name: str) -> SplitKind | None:
    """The split that a folder name stands for, as "training_set", "seg_pred" and "train2017" do; None for others."""
    if not name.isprintable():
        return None
    letters = re.sub(r"[\W\d_]+", "", unicodedata.normalize("NFKC", name).casefold())
    match = _SPLIT.fullmatch(letters)
    return SPLIT_WORDS[match.group(1)] if match else None


def split_of_folders(path: str) -> SplitKind | None:
    """The split that the innermost folder named like one, of those above a file, stands for."""
    return next((kind for name in reversed(path.split("/")[:-1]) if (kind := split_of(name))), None)


def split_of_file(path: str) -> SplitKind | None:
    """The split in the words of a file's name, as in `test-00000-of-00001.parquet` and `pets_train.parquet`, or else
    that of its folders."""
    stem = PurePosixPath(path).stem
    kinds = {split_of(word) for word in re.findall(r"[^\W\d_]+", stem)} - {None}
    return split_of(stem) or (kinds.pop() if len(kinds) == 1 else split_of_folders(path))


def combine_class_and_split(names: Iterable[str]) -> bool:
    """Whether every name consists of a class and a split, as cat_train, cat_test, dog_train, dog_test do."""
    classes: dict[SplitKind, set[str]] = {}
    for name in names:
        words = re.findall(r"[^\W\d_]+", name.casefold())
        kinds = [SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS]
        label = " ".join(word for word in words if word not in SPLIT_WORDS)
        if len(kinds) != 1 or not label:
            return False
        classes.setdefault(kinds[0], set()).add(label)
    train_classes = classes.pop("train", set())
    return any(train_classes & others for others in classes.values())
