"""Readers of official archives by format: IDX (MNIST), CIFAR's binary records, SVHN's .mat files, embedded digits.

To add a format, add a reader and an entry in FORMATS.
"""

from __future__ import annotations

import gzip
import hashlib
import math
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from convline.errors import ConvlineError
from convline.images import ImageSpec
from convline.inputs.archives import read_archive
from pipeline.preparing.decoded_source import DecodedSource
from pipeline.preparing.fingerprint import split_fingerprint

if TYPE_CHECKING:
    from pipeline.preparing.official_datasets import OfficialDataset

DOWNLOAD_AGAIN = "delete it and download it again"
DOWNLOAD_ALL_AGAIN = "delete its archives and download them again"


def read_idx_archives(dataset: OfficialDataset, paths: Sequence[Path]) -> DecodedSource:
    """Gzipped IDX files: train images, train labels, test images, test labels. Raises ConvlineError for others."""
    train_images, train_labels, test_images, test_labels = (read_idx(path) for path in paths)
    if [train_images.ndim, train_labels.ndim, test_images.ndim, test_labels.ndim] != [3, 1, 3, 1]:
        raise ConvlineError(
            f"{dataset.name}: its archives are not images, labels, images, labels in this order; {DOWNLOAD_ALL_AGAIN}"
        )
    images = np.concatenate([train_images, test_images])[..., None]
    labels = np.concatenate([train_labels, test_labels]).astype(np.int64)
    if len(images) != len(labels) or len(train_images) != len(train_labels):
        raise ConvlineError(f"{dataset.name}: images and labels differ in number; {DOWNLOAD_ALL_AGAIN}")
    return _with_test_split(dataset, images, labels, len(train_labels))


def read_idx(path: Path) -> NDArray[np.uint8]:
    """A gzipped IDX file of unsigned bytes (the format of http://yann.lecun.com/exdb/mnist/).

    Raises ConvlineError for other or damaged files.
    """
    try:
        content = gzip.decompress(path.read_bytes())
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ConvlineError(f"{path} is damaged ({error}); {DOWNLOAD_AGAIN}") from error
    if len(content) < 4 or content[:3] != b"\x00\x00\x08":
        raise ConvlineError(f"{path} is not an IDX file of unsigned bytes; {DOWNLOAD_AGAIN}")
    rank = content[3]
    header_size = 4 + 4 * rank
    if len(content) < header_size:
        raise ConvlineError(f"{path} ends inside its header; {DOWNLOAD_AGAIN}")
    shape = struct.unpack_from(f">{rank}I", content, 4)
    if len(content) - header_size != math.prod(shape):
        raise ConvlineError(
            f"{path} has {len(content) - header_size} bytes of data, its header says {shape}; {DOWNLOAD_AGAIN}"
        )
    return np.frombuffer(content, np.uint8, offset=header_size).reshape(shape)


CIFAR_RECORD_SIZE = 1 + 3 * 32 * 32  # bytes: the label, then the red, green and blue plane, row by row


def read_cifar_binary(dataset: OfficialDataset, paths: Sequence[Path]) -> DecodedSource:
    """A tar of files of 3,073-byte records (https://www.cs.toronto.edu/~kriz/cifar.html, "binary version"):
    data_batch_*.bin for training, test_batch.bin for testing. Raises ConvlineError for other archives."""
    (archive,) = paths
    members = {Path(file.path).name: file.read() for file in read_archive(archive) if file.path.endswith(".bin")}
    train = b"".join(members[name] for name in sorted(members) if name.startswith("data_batch_"))
    test = members.get("test_batch.bin", b"")
    for split, content in (("training", train), ("test", test)):
        if not content or len(content) % CIFAR_RECORD_SIZE:
            raise ConvlineError(
                f"{archive} holds {len(content)} bytes of {split} records, not a multiple of {CIFAR_RECORD_SIZE}; "
                f"{DOWNLOAD_AGAIN}"
            )
    records = np.frombuffer(train + test, np.uint8).reshape(-1, CIFAR_RECORD_SIZE)
    labels = records[:, 0].astype(np.int64)
    images = np.ascontiguousarray(records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    return _with_test_split(dataset, images, labels, len(train) // CIFAR_RECORD_SIZE)


def read_svhn(dataset: OfficialDataset, paths: Sequence[Path]) -> DecodedSource:
    """train_32x32.mat and test_32x32.mat (http://ufldl.stanford.edu/housenumbers, format 2): `X` uint8
    [32, 32, 3, n], `y` [n, 1] with the digit 0 as 10. Raises ConvlineError for other files."""
    splits = [_read_mat(path, len(dataset.classes)) for path in paths]
    images = np.concatenate([images for images, _ in splits])
    labels = np.concatenate([labels for _, labels in splits])
    return _with_test_split(dataset, images, labels, train_count=len(splits[0][0]))


def _read_mat(path: Path, classes: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    from scipy.io import loadmat

    try:
        content = loadmat(path, variable_names=["X", "y"])
        images, labels = content["X"].transpose(3, 0, 1, 2), content["y"].astype(np.int64).ravel()
    # scipy's reader raises many kinds of exceptions for damaged files
    except Exception as error:
        raise ConvlineError(f"{path} is damaged ({error}); {DOWNLOAD_AGAIN}") from error
    if images.dtype != np.uint8 or images.shape[1:] != (32, 32, 3) or len(images) != len(labels):
        raise ConvlineError(
            f"{path} holds {images.dtype} images of {images.shape} and {len(labels)} labels, not uint8 of 32x32x3; "
            f"{DOWNLOAD_AGAIN}"
        )
    if not ((labels >= 1) & (labels <= classes)).all():
        raise ConvlineError(f"{path} has labels outside 1 to {classes}; {DOWNLOAD_AGAIN}")
    return images, labels % 10


def read_digits(dataset: OfficialDataset, _: Sequence[Path]) -> DecodedSource:
    """The 8x8 digits that come with scikit-learn, their 17 grey levels scaled to 0 to 255."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)[..., None]
    labels = digits.target.astype(np.int64)
    source = {"name": "scikit-learn digits", "sha256": split_fingerprint(images, labels)}
    rows = {"train": np.arange(len(labels))}
    return DecodedSource(images, labels, rows, dataset.classes, ImageSpec(8, 8, 1), source)


def _with_test_split(
    dataset: OfficialDataset, images: NDArray[np.uint8], labels: NDArray[np.int64], train_count: int
) -> DecodedSource:
    """The first `train_count` images as train, the others as test.

    Raises ConvlineError for an empty split, and for labels beyond the dataset's classes.
    """
    if not 0 < train_count < len(labels):
        raise ConvlineError(f"{dataset.name}: a split has no images; {DOWNLOAD_ALL_AGAIN}")
    if labels.max() >= len(dataset.classes):
        raise ConvlineError(
            f"{dataset.name} has an image of class {labels.max()}, but its last class is {len(dataset.classes) - 1}; "
            f"{DOWNLOAD_ALL_AGAIN}"
        )
    rows = np.arange(len(labels))
    height, width, channels = images.shape[1:]
    splits = {"train": rows[:train_count], "test": rows[train_count:]}
    spec = ImageSpec(height, width, channels)
    return DecodedSource(images, labels, splits, dataset.classes, spec, _name_and_hash(dataset))


def _name_and_hash(dataset: OfficialDataset) -> dict[str, str]:
    """A name for the archives, and one SHA-256 over all of their published checksums."""
    checksums = "\n".join(f"{name} {checksum}" for name, checksum in dataset.files.items())
    return {"name": f"{dataset.name}, official archives", "sha256": hashlib.sha256(checksums.encode()).hexdigest()}


@dataclass(frozen=True)
class ArchiveFormat:
    """How many archives a dataset of this format has, and the function that reads them."""

    archive_count: int
    read: Callable[[OfficialDataset, Sequence[Path]], DecodedSource]


FORMATS = {
    "idx": ArchiveFormat(4, read_idx_archives),
    "cifar-binary": ArchiveFormat(1, read_cifar_binary),
    "svhn-mat": ArchiveFormat(2, read_svhn),
    "embedded-digits": ArchiveFormat(0, read_digits),
}
