"""What a prepared dataset keeps of each row beside pixels and label: its path in the source, and its group.

`<split>.files.txt` has a path a line. `train.groups.npy`, int64 [n], exists where images with the same pixels stay
together: rows with one number are all held out as validation, or none is.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convline.errors import ConvlineError
from pipeline.preparing.integrity import REMEDY

ESCAPES = {"\\": "\\\\", "\n": "\\n", "\r": "\\r"}  # a line must not end within a path


def write_paths(folder: Path, split: str, paths: list[str]) -> None:
    """Write the paths of a split's images. Backslashes and line ends are escaped."""
    table = str.maketrans({**ESCAPES})
    text = "".join(f"{path.translate(table)}\n" for path in paths)
    (folder / f"{split}.files.txt").write_text(text, encoding="utf-8", errors="surrogateescape", newline="\n")


def read_paths(folder: Path, split: str, count: int) -> list[str] | None:
    """The path of each of `count` rows; None where the dataset's source had none, or an earlier convline prepared it.

    Raises ConvlineError where the file has another number of lines.
    """
    path = folder / f"{split}.files.txt"
    try:
        lines = path.read_text(encoding="utf-8", errors="surrogateescape").split("\n")[:-1]
    except FileNotFoundError:
        return None
    if len(lines) != count:
        raise ConvlineError(f"{path} has {len(lines)} lines for {count} images; {REMEDY}")
    originals = {escape: character for character, escape in ESCAPES.items()}
    return [re.sub(r"\\.", lambda escape: originals[escape[0]], line) if "\\" in line else line for line in lines]


def position_in_split(split: str, row: int) -> str:
    """The name of an image that has no path: "train 0"."""
    return f"{split} {row}"


def write_groups(folder: Path, groups: NDArray[np.int64]) -> str | None:
    """Write the groups of the training images, and return their SHA-256; None, and no file, where each is alone."""
    if len(np.unique(groups)) == len(groups):
        return None
    np.save(folder / "train.groups.npy", groups)
    return hashlib.sha256(np.ascontiguousarray(groups).data).hexdigest()


def read_groups(folder: Path, meta: dict[str, Any]) -> NDArray[np.int64] | None:
    """Raises ConvlineError where they are missing, or are not those that `meta` describes."""
    if not meta.get("groups"):
        return None
    path = folder / "train.groups.npy"
    try:
        groups: NDArray[np.int64] = np.load(path, allow_pickle=False)
        if hashlib.sha256(np.ascontiguousarray(groups).data).hexdigest() == meta["groups"]:
            return groups
    except (OSError, ValueError, EOFError) as error:
        raise ConvlineError(f"{path} is missing or damaged ({error}); {REMEDY}") from error
    raise ConvlineError(f"{path} was changed since the dataset was prepared; {REMEDY}")
