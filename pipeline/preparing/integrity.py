"""Verifies that the arrays of a prepared dataset are those its meta.json describes, by fingerprint.

Each array is read in full and compared before it is used. After large ones are verified (at 1.4 GB/s), a stamp file,
`verified.json`, is written: they are not read again while their files have the same size, times and inode, and
meta.json the same content. Any change to a file moves the time of its last status change (ctime), which no program can
set back.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convline.console import log
from convline.errors import ConvlineError
from convline.files import atomic_write
from pipeline.preparing.channel_statistics import mean_and_std
from pipeline.preparing.fingerprint import split_fingerprint

STAMP_MIN_BYTES = 2**24  # of images for which a stamp is written: reading fewer takes less than 0.1 s
LOG_MIN_BYTES = 2**30  # of images for which a log line explains the pause of a second or more
STAMP_NAME = "verified.json"
REMEDY = "prepare the dataset again"

_verified: dict[tuple[Path, str], dict[str, Any]] = {}  # file states that this process verified, by folder and split


def open_arrays(folder: Path, meta: dict[str, Any], split: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """The verified images (memory-mapped, private to this process) and labels of a split.

    Raises ConvlineError where they are missing, or are not what `meta` describes.
    """
    images_path, labels_path = (folder / f"{split}.{kind}.npy" for kind in ("images", "labels"))
    try:
        images = np.lib.format.open_memmap(images_path, mode="c")  # np.load would open a .npz as well
        with labels_path.open("rb") as file:
            labels = np.lib.format.read_array(file, allow_pickle=False)
    except PermissionError:
        raise
    # a damaged header is a Python expression that may raise anything
    except Exception as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ConvlineError(f"{folder} is damaged ({reason}); {REMEDY}") from error
    counts, image = meta["counts"][split], meta["image"]
    total = sum(counts.values())
    _check_array(images_path, images, np.uint8, (total, image["height"], image["width"], image["channels"]))
    _check_array(labels_path, labels, np.int64, (total,))
    if len(labels) and not 0 <= labels.min() <= labels.max() < len(counts):
        raise ConvlineError(f"{labels_path} holds labels that are none of the {len(counts)} classes; {REMEDY}")
    _verify(folder, meta, split, images, labels)
    return images, labels


def _check_array(path: Path, array: object, dtype: type, shape: tuple[int, ...]) -> None:
    if isinstance(array, np.ndarray) and (array.dtype, array.shape) == (np.dtype(dtype), shape):
        return
    actual = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else "something else"
    raise ConvlineError(f"{path} holds {actual} and not {np.dtype(dtype)} {shape}, as meta.json says; {REMEDY}")


def _verify(
    folder: Path, meta: dict[str, Any], split: str, images: NDArray[np.uint8], labels: NDArray[np.int64]
) -> None:
    """Raises ConvlineError where fingerprint, counts or statistics of the arrays are not those in `meta`."""
    state = _file_state(folder, meta, split)  # before the arrays are read, so that a later change makes the stamp void
    if _verified.get((folder, split)) == state:
        return
    if images.nbytes >= STAMP_MIN_BYTES and _read_stamps(folder).get(split) == state:
        return
    if images.nbytes >= LOG_MIN_BYTES:
        log(f"verifying {images.nbytes / 1e9:.1f} GB of images in {folder}, once")
    differences = []
    if split_fingerprint(images, labels) != meta["fingerprints"][split]:
        differences.append("its fingerprint differs")
    if np.bincount(labels, minlength=len(meta["classes"])).tolist() != list(meta["counts"][split].values()):
        differences.append("the numbers of images per class differ")
    if split == "train" and not all(
        np.allclose(actual, meta[name], rtol=1e-9, atol=1e-9)
        for name, actual in zip(("mean", "std"), mean_and_std(images), strict=True)
    ):
        differences.append("mean and std differ")
    if differences:
        raise ConvlineError(
            f"{folder} was changed since it was prepared: the {split} images or labels are not those in meta.json "
            f"({', '.join(differences)}); {REMEDY}"
        )
    _verified[folder, split] = state
    if images.nbytes >= STAMP_MIN_BYTES:
        with suppress(OSError), atomic_write(folder / STAMP_NAME, "w") as file:  # none in a folder that is read-only
            json.dump({**_read_stamps(folder), split: state}, file, indent=2)


def _file_state(folder: Path, meta: dict[str, Any], split: str) -> dict[str, Any]:
    """What changes whenever the files of a split do: file status fields, and a hash of `meta` as it was read, because
    the file may have been replaced since."""
    state: dict[str, Any] = {"meta": hashlib.sha256(json.dumps(meta).encode()).hexdigest()}
    for name in (f"{split}.images.npy", f"{split}.labels.npy"):
        status = (folder / name).stat()
        state[name] = [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
    return state


def _read_stamps(folder: Path) -> dict[str, Any]:
    """The file states in the stamp file, by split; empty where the file is missing or damaged."""
    with suppress(OSError, ValueError, RecursionError):
        stamps = json.loads((folder / STAMP_NAME).read_text(encoding="utf-8"))
        return stamps if isinstance(stamps, dict) else {}
    return {}
