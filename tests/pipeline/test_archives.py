import gzip
import struct
from pathlib import Path

import numpy as np
import pytest

from pipeline.download import Official
from pipeline.engine.archives import read_idx, read_idx_archives
from pipeline.preprocess import preprocess
from tests.pipeline.helpers import refused

# counts of the digits 0 to 9, as commonly published for MNIST
MNIST_TRAIN = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
MNIST_TEST = [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]

UNSIGNED_BYTES = 8


def idx(*shape: int, body: bytes, kind: int = UNSIGNED_BYTES) -> bytes:
    """An IDX file by its description at yann.lecun.com: magic 0 0 kind rank, big-endian sizes, the bytes."""
    return struct.pack(f">BBBB{len(shape)}I", 0, 0, kind, len(shape), *shape) + body


def compressed(path: Path, content: bytes) -> Path:
    path.write_bytes(gzip.compress(content))
    return path


@pytest.fixture
def shapes(tmp_path: Path) -> tuple[Official, list[Path]]:
    """3 training and 2 test images of 2x4 pixels, numbered on from 0, and their labels."""
    files = {
        "train-images.gz": idx(3, 2, 4, body=bytes(range(24))),
        "train-labels.gz": idx(3, body=bytes([1, 0, 1])),
        "test-images.gz": idx(2, 2, 4, body=bytes(range(24, 40))),
        "test-labels.gz": idx(2, body=bytes([0, 1])),
    }
    official = Official("shapes", "idx", ["round", "square"], [], dict.fromkeys(files, "md5:0"))
    return official, [compressed(tmp_path / name, content) for name, content in files.items()]


def test_an_idx_file_is_read_in_its_shape(tmp_path: Path) -> None:
    array = read_idx(compressed(tmp_path / "a.gz", idx(2, 1, 3, body=b"\x00\x01\x02\xfd\xfe\xff")))
    assert array.dtype == np.uint8
    assert array.tolist() == [[[0, 1, 2]], [[253, 254, 255]]]


@pytest.mark.parametrize(
    "content",
    [
        idx(2, 1, 3, body=bytes(5)),
        idx(2, 1, 3, body=bytes(7)),
        idx(2, 1, 3, body=b""),
        idx(2, 1, 3, body=b"")[:10],
        idx(6, body=bytes(6), kind=0x0D),
        b"\x01" + idx(6, body=bytes(6))[1:],
        b"<html>This page has moved.</html>",
        b"\x00\x00",
        b"",
    ],
    ids=["short", "long", "no pixels", "half a header", "floats", "magic", "html", "two bytes", "empty"],
)
def test_what_is_no_idx_file_of_bytes_is_named(tmp_path: Path, content: bytes) -> None:
    path = compressed(tmp_path / "a.gz", content)
    with refused(str(path), "download it again"):
        read_idx(path)


@pytest.mark.parametrize("cut", [-1, -9, 12, 5, 0], ids=lambda cut: f"[:{cut}]")
def test_a_truncated_gz_file_is_named(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "a.gz"
    path.write_bytes(gzip.compress(idx(200, body=bytes(200)))[:cut])
    with refused(str(path), "download it again"):
        read_idx(path)


def test_a_damaged_gz_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.gz"
    content = bytearray(gzip.compress(idx(200, body=np.random.default_rng(0).bytes(200))))
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    with refused(str(path), "damaged"):
        read_idx(path)


def test_a_file_that_is_not_compressed_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.gz"
    path.write_bytes(idx(2, body=bytes(2)))
    with refused(str(path), "damaged"):
        read_idx(path)


def test_four_archives_become_two_splits(shapes: tuple[Official, list[Path]]) -> None:
    prepared = read_idx_archives(*shapes)
    assert (prepared.images.dtype, prepared.labels.dtype) == (np.uint8, np.int64)
    assert prepared.images.shape == (5, 2, 4, 1)
    assert prepared.images.ravel().tolist() == list(range(40))
    assert prepared.labels.tolist() == [1, 0, 1, 0, 1]
    assert {name: rows.tolist() for name, rows in prepared.rows.items()} == {"train": [0, 1, 2], "test": [3, 4]}
    assert (prepared.spec.height, prepared.spec.width, prepared.spec.channels) == (2, 4, 1)
    assert prepared.classes == ["round", "square"]


@pytest.mark.parametrize(("archive", "labels"), [(1, [1, 0]), (1, [1, 0, 1, 1]), (3, [0]), (3, [0, 1, 1])], ids=str)
def test_labels_that_are_not_as_many_as_the_images_are_refused(
    shapes: tuple[Official, list[Path]], archive: int, labels: list[int]
) -> None:
    official, paths = shapes
    compressed(paths[archive], idx(len(labels), body=bytes(labels)))
    with refused("shapes", "differ in number"):
        read_idx_archives(official, paths)


def test_labels_of_one_split_do_not_make_up_for_those_of_the_other(shapes: tuple[Official, list[Path]]) -> None:
    official, paths = shapes
    compressed(paths[1], idx(2, body=bytes([1, 0])))
    compressed(paths[3], idx(3, body=bytes([1, 0, 1])))
    with refused("shapes", "differ in number"):
        read_idx_archives(official, paths)


def test_mnist_is_prepared_from_its_archives(test_data: Path, tmp_path: Path) -> None:
    dataset = preprocess("mnist", tmp_path, mirrors=[(test_data / "mnist").as_uri()])
    digits = [str(digit) for digit in range(10)]
    assert dataset.classes == digits
    assert dataset.meta["counts"] == {
        "train": dict(zip(digits, MNIST_TRAIN, strict=True)),
        "test": dict(zip(digits, MNIST_TEST, strict=True)),
    }
    for name, counts in (("train", MNIST_TRAIN), ("test", MNIST_TEST)):
        split = dataset.split(name)
        assert split.images.shape == (sum(counts), 28, 28, 1)
        assert np.bincount(split.labels).tolist() == counts
    # 0.1307 and 0.3081, as every PyTorch tutorial has them
    assert dataset.meta["mean"][0] / 255 == pytest.approx(0.1307, abs=5e-5)
    assert dataset.meta["std"][0] / 255 == pytest.approx(0.3081, abs=5e-5)
