"""Readers of official archives. A new format is a function here and a line in READERS."""

from __future__ import annotations

import gzip
import hashlib
import math
import struct
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from convline.errors import ConvlineError
from convline.images import ImageSpec
from convline.inputs.archives import read_archive
from pipeline.preparing.integrity import fingerprint
from pipeline.preparing.official_datasets import OfficialDataset
from pipeline.preparing.prepared import Prepared


def read_idx_archives(official: OfficialDataset, paths: Sequence[Path]) -> Prepared:
    """Train images, train labels, test images, test labels, each a gzipped IDX file."""
    train_images, train_labels, test_images, test_labels = (read_idx(path) for path in paths)
    if [train_images.ndim, train_labels.ndim, test_images.ndim, test_labels.ndim] != [3, 1, 3, 1]:
        raise ConvlineError(f"{official.name}: its archives are not images, labels, images, labels; fetch them again")
    images = np.concatenate([train_images, test_images])[..., None]
    labels = np.concatenate([train_labels, test_labels]).astype(np.int64)
    if len(images) != len(labels) or len(train_images) != len(train_labels):
        raise ConvlineError(f"{official.name}: images and labels differ in number; fetch the archives again")
    return _in_two_parts(official, images, labels, len(train_labels))


def read_idx(path: Path) -> NDArray[np.uint8]:
    """A gzipped IDX file of unsigned bytes (the format of http://yann.lecun.com/exdb/mnist/).

    Raises ConvlineError where it is not one.
    """
    try:
        content = gzip.decompress(path.read_bytes())
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ConvlineError(f"{path} is damaged ({error}); delete it and download it again") from error
    if len(content) < 4 or content[:3] != b"\x00\x00\x08":
        raise ConvlineError(f"{path} is no IDX file of unsigned bytes; download it again")
    rank = content[3]
    if len(content) < 4 + 4 * rank:
        raise ConvlineError(f"{path} ends inside its header; download it again")
    shape = struct.unpack_from(f">{rank}I", content, 4)
    start = 4 + 4 * rank
    if len(content) - start != math.prod(shape):
        raise ConvlineError(f"{path} announces {shape} and holds {len(content) - start} bytes; download it again")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


CIFAR_RECORD = 1 + 3 * 32 * 32  # the label, then the red, green and blue plane, row by row


def read_cifar_binary(official: OfficialDataset, paths: Sequence[Path]) -> Prepared:
    """A tar of files of 3,073-byte records (https://www.cs.toronto.edu/~kriz/cifar.html, "binary version"):
    data_batch_*.bin to train on, test_batch.bin to test. Raises ConvlineError where it is not one."""
    (archive,) = paths
    members = {Path(file.path).name: file.read() for file in read_archive(archive) if file.path.endswith(".bin")}
    train = b"".join(members[name] for name in sorted(members) if name.startswith("data_batch_"))
    test = members.get("test_batch.bin", b"")
    for split, content in (("training", train), ("test", test)):
        if not content or len(content) % CIFAR_RECORD:
            raise ConvlineError(
                f"{archive} holds {len(content)} bytes of {split} records, no multiple of {CIFAR_RECORD}; "
                "delete it and download it again"
            )
    records = np.frombuffer(train + test, np.uint8).reshape(-1, CIFAR_RECORD)
    labels = records[:, 0].astype(np.int64)
    images = np.ascontiguousarray(records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    return _in_two_parts(official, images, labels, len(train) // CIFAR_RECORD)


def read_svhn(official: OfficialDataset, paths: Sequence[Path]) -> Prepared:
    """train_32x32.mat and test_32x32.mat (http://ufldl.stanford.edu/housenumbers, format 2): `X` uint8
    [32, 32, 3, n], `y` [n, 1] with the digit 0 as 10. Raises ConvlineError where they are not."""
    parts = [_read_mat(path, len(official.classes)) for path in paths]
    images = np.concatenate([images for images, _ in parts])
    return _in_two_parts(official, images, np.concatenate([labels for _, labels in parts]), len(parts[0][0]))


def _read_mat(path: Path, classes: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    from scipy.io import loadmat

    try:
        content = loadmat(path, variable_names=["X", "y"])
        images, labels = content["X"].transpose(3, 0, 1, 2), content["y"].astype(np.int64).ravel()
    # scipy's reader stumbles over a damaged file in many ways
    except Exception as error:
        raise ConvlineError(f"{path} is damaged ({error}); delete it and download it again") from error
    if images.dtype != np.uint8 or images.shape[1:] != (32, 32, 3) or len(images) != len(labels):
        raise ConvlineError(
            f"{path} holds {images.dtype} images of {images.shape} and {len(labels)} labels, not uint8 of 32x32x3; "
            "delete it and download it again"
        )
    if not ((labels >= 1) & (labels <= classes)).all():
        raise ConvlineError(f"{path} has labels beyond 1 to {classes}; delete it and download it again")
    return images, labels % 10


def read_digits(official: OfficialDataset, _: Sequence[Path]) -> Prepared:
    """scikit-learn's 8x8 digits, whose 17 levels become 0 to 255; they come with the library."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)[..., None]
    labels = digits.target.astype(np.int64)
    source = {"name": "scikit-learn digits", "sha256": fingerprint(images, labels)}
    return Prepared(images, labels, {"train": np.arange(len(labels))}, official.classes, ImageSpec(8, 8, 1), source)


def _in_two_parts(
    official: OfficialDataset, images: NDArray[np.uint8], labels: NDArray[np.int64], training: int
) -> Prepared:
    """The first `training` images to train on, the others to test. Raises ConvlineError for other classes."""
    if not 0 < training < len(labels):
        raise ConvlineError(f"{official.name}: a split has no images; delete its archives and download them again")
    if labels.max() >= len(official.classes):
        raise ConvlineError(
            f"{official.name} has an image of class {labels.max()}, the last is {len(official.classes) - 1}; "
            "delete its archives and download them again"
        )
    rows = np.arange(len(labels))
    height, width, channels = images.shape[1:]
    splits = {"train": rows[:training], "test": rows[training:]}
    return Prepared(images, labels, splits, official.classes, ImageSpec(height, width, channels), _source(official))


def _source(official: OfficialDataset) -> dict[str, str]:
    """The archives' name and one SHA-256 over all of their published checksums."""
    checksums = "\n".join(f"{name} {checksum}" for name, checksum in official.files.items())
    return {"name": f"{official.name}, official archives", "sha256": hashlib.sha256(checksums.encode()).hexdigest()}


READERS: dict[str, Callable[[OfficialDataset, Sequence[Path]], Prepared]] = {
    "idx": read_idx_archives,
    "cifar-binary": read_cifar_binary,
    "svhn-mat": read_svhn,
    "embedded-digits": read_digits,
}
