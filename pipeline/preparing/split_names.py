"""What people call the folders of a training, a validation and a test split."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from typing import Literal

Kind = Literal["train", "validation", "test", "unlabelled"]

WORDS: dict[str, Kind] = {
    **dict.fromkeys(("train", "training", "trn"), "train"),
    **dict.fromkeys(
        ("val", "valid", "validation", "validate", "validating", "dev", "eval", "evaluation"), "validation"
    ),
    **dict.fromkeys(("test", "testing", "holdout", "heldout"), "test"),
    **dict.fromkeys(("pred", "predict", "prediction", "predictions", "unlabelled", "unlabeled"), "unlabelled"),
}
FILLERS = (
    *("set", "sets", "data", "dataset", "datasets", "split", "part", "subset", "folder", "dir", "files"),
    *("image", "images", "img", "imgs", "photo", "photos", "picture", "pictures", "pic", "pics", "sample", "samples"),
    *("jpg", "jpeg", "png", "seg", "ilsvrc", "imagenet", "coco", "raw", "resized", "cropped"),
)
_FILLER = f"(?:{'|'.join(FILLERS)})*"
_SPLIT = re.compile(f"{_FILLER}({'|'.join(WORDS)}){_FILLER}")


def split_of(name: str) -> Kind | None:
    """Which split a folder of this name is: "training_set", "Test Images", "seg_pred", "train2017"; None: no split."""
    if not name.isprintable():
        return None
    letters = re.sub(r"[\W\d_]+", "", unicodedata.normalize("NFKC", name).casefold())
    found = _SPLIT.fullmatch(letters)
    return WORDS[found.group(1)] if found else None


def are_of_classes_and_splits(names: Iterable[str]) -> bool:
    """Whether every name is that of a class and a split, such as cat_train, cat_test, dog_train, dog_test."""
    classes: dict[Kind, set[str]] = {}
    for name in names:
        words = re.findall(r"[^\W\d_]+", name.casefold())
        kinds = [WORDS[word] for word in words if word in WORDS]
        rest = " ".join(word for word in words if word not in WORDS)
        if len(kinds) != 1 or not rest:
            return False
        classes.setdefault(kinds[0], set()).add(rest)
    trained = classes.pop("train", set())
    return any(trained & others for others in classes.values())
