"""Whether the arrays of a prepared dataset are those that its meta.json tells of.

Each array is read whole and compared before it is used. Large ones (at 1.4 GB/s) leave a stamp, `verified.json`: while
their files have the same size, times and inode, and meta.json says the same, they are not read again. A change of any
kind moves the time of the last change (ctime), which no program can set back.
"""

from __future__ import annotations

import hashlib
import json
import mmap
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convline.console import log
from convline.errors import ConvlineError
from convline.files import atomic_write

CHUNK = 2**24  # bytes of images read at once
STAMPED = 2**24  # bytes of images from which a stamp is left: reading that many takes 0.1 s
TOLD = 2**30  # bytes of images from which a log line says why nothing happens for a second
STAMP = "verified.json"
AGAIN = "prepare the dataset again"

_verified: dict[tuple[Path, str], dict[str, Any]] = {}  # by this process


def open_arrays(folder: Path, meta: dict[str, Any], split: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images (memory-mapped, private to this process) and labels of a split as it was prepared.

    Raises ConvlineError where they are missing, or not what `meta` tells of.
    """
    paths = [folder / f"{split}.{kind}.npy" for kind in ("images", "labels")]
    try:
        images = np.lib.format.open_memmap(paths[0], mode="c")  # np.load would open a .npz as well
        with paths[1].open("rb") as file:
            labels = np.lib.format.read_array(file, allow_pickle=False)
    except PermissionError:
        raise
    # a damaged header is a Python expression that may raise anything
    except Exception as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ConvlineError(f"{folder} is damaged ({reason}); {AGAIN}") from error
    counts, image = meta["counts"][split], meta["image"]
    told = (sum(counts.values()), image["height"], image["width"], image["channels"])
    for path, array, kind, shape in ((paths[0], images, np.uint8, told), (paths[1], labels, np.int64, told[:1])):
        if not isinstance(array, np.ndarray) or (array.dtype, array.shape) != (np.dtype(kind), shape):
            found = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else "something else"
            raise ConvlineError(f"{path} holds {found} and not {np.dtype(kind)} {shape}, as meta.json says; {AGAIN}")
    if len(labels) and not 0 <= labels.min() <= labels.max() < len(counts):
        raise ConvlineError(f"{paths[1]} holds labels that are none of the {len(counts)} classes; {AGAIN}")
    _verify(folder, meta, split, images, labels)
    return images, labels


def _verify(
    folder: Path, meta: dict[str, Any], split: str, images: NDArray[np.uint8], labels: NDArray[np.int64]
) -> None:
    """Raises ConvlineError where the arrays are not those that `meta` names by their fingerprint."""
    now = _marks(folder, meta, split)  # before they are read: a change meanwhile makes the stamp void
    if _verified.get((folder, split)) == now or (images.nbytes >= STAMPED and _stamps(folder).get(split) == now):
        return
    if images.nbytes >= TOLD:
        log(f"verifying {images.nbytes / 1e9:.1f} GB of images in {folder}, once")
    differs = []
    if fingerprint(images, labels) != meta["fingerprints"][split]:
        differs.append("its fingerprint differs")
    if np.bincount(labels, minlength=len(meta["classes"])).tolist() != list(meta["counts"][split].values()):
        differs.append("the numbers of images a class differ")
    if split == "train" and not all(
        np.allclose(found, meta[name], rtol=1e-9, atol=1e-9)
        for name, found in zip(("mean", "std"), moments(images), strict=True)
    ):
        differs.append("mean and std differ")
    forget(images)
    if differs:
        raise ConvlineError(
            f"{folder} was changed since it was prepared: the {split} images or labels are not those that meta.json "
            f"tells of ({', '.join(differs)}); {AGAIN}"
        )
    _verified[folder, split] = now
    if images.nbytes >= STAMPED:
        with suppress(OSError), atomic_write(folder / STAMP, "w") as file:  # a folder that is read-only has no stamp
            json.dump({**_stamps(folder), split: now}, file, indent=2)


def _marks(folder: Path, meta: dict[str, Any], split: str) -> dict[str, Any]:
    """What changes whenever the files of a split do. Of `meta` what was read: the file may have been replaced since."""
    marks: dict[str, Any] = {"meta": hashlib.sha256(json.dumps(meta).encode()).hexdigest()}
    for name in (f"{split}.images.npy", f"{split}.labels.npy"):
        told = (folder / name).stat()
        marks[name] = [told.st_size, told.st_mtime_ns, told.st_ctime_ns, told.st_ino]
    return marks


def _stamps(folder: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError, RecursionError):
        stamps = json.loads((folder / STAMP).read_text(encoding="utf-8"))
        return stamps if isinstance(stamps, dict) else {}
    return {}


def fingerprint(images: NDArray[np.uint8], labels: NDArray[np.int64]) -> str:
    """SHA-256 over shape, pixels and labels."""
    digest = hashlib.sha256(f"{images.shape}".encode())
    step = _rows(images)
    for start in range(0, len(images), step):
        digest.update(np.ascontiguousarray(images[start : start + step]).data)
    digest.update(np.ascontiguousarray(labels).data)
    return digest.hexdigest()


def moments(images: NDArray[np.uint8]) -> tuple[list[float], list[float]]:
    """Mean and (population) standard deviation of each channel, exact: from histograms."""
    channels, step = images.shape[-1], _rows(images)
    histogram = np.zeros((channels, 256))
    for start in range(0, len(images), step):
        for channel in range(channels):
            pixels = images[start : start + step, ..., channel].ravel()
            histogram[channel] += np.bincount(pixels, minlength=256)
    share = histogram / histogram.sum(1, keepdims=True)
    values = np.arange(256)
    mean = share @ values
    variance = share @ values**2 - mean**2
    return mean.tolist(), np.sqrt(np.maximum(variance, 0)).tolist()


def forget(images: NDArray[np.uint8]) -> None:
    """Drop the pages that were read from the map: they count as this process's memory, and the file stays."""
    pages: object = images.base
    if isinstance(pages, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        pages.madvise(mmap.MADV_DONTNEED)


def _rows(images: NDArray[np.uint8]) -> int:
    """How many images are read at once."""
    return max(1, CHUNK // max(1, images[:1].nbytes))
