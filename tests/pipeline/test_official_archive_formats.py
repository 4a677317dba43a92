import gzip
import hashlib
import io
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import tomli_w

from pipeline.dataset import Dataset
from pipeline.preparing.official_archive_formats import read_cifar_binary, read_idx, read_idx_archives, read_svhn
from pipeline.preparing.official_datasets import OfficialDataset, known_datasets
from pipeline.preprocess import preprocess
from tests.conftest import Cli
from tests.pipeline.helpers import refused

# counts of the digits 0 to 9 in MNIST, as commonly published
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
def shapes(tmp_path: Path) -> tuple[OfficialDataset, list[Path]]:
    """3 training and 2 test images of 2x4 pixels, whose values count up from 0, and their labels."""
    files = {
        "train-images.gz": idx(3, 2, 4, body=bytes(range(24))),
        "train-labels.gz": idx(3, body=bytes([1, 0, 1])),
        "test-images.gz": idx(2, 2, 4, body=bytes(range(24, 40))),
        "test-labels.gz": idx(2, body=bytes([0, 1])),
    }
    dataset = OfficialDataset("shapes", "idx", ["round", "square"], [], dict.fromkeys(files, "md5:0"))
    return dataset, [compressed(tmp_path / name, content) for name, content in files.items()]


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
def test_a_file_that_is_not_idx_of_unsigned_bytes_is_named(tmp_path: Path, content: bytes) -> None:
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


def test_four_archives_become_two_splits(shapes: tuple[OfficialDataset, list[Path]]) -> None:
    prepared = read_idx_archives(*shapes)
    assert prepared.images.dtype == np.uint8 and prepared.labels.dtype == np.int64
    assert prepared.images.shape == (5, 2, 4, 1)
    assert prepared.images.ravel().tolist() == list(range(40))
    assert prepared.labels.tolist() == [1, 0, 1, 0, 1]
    assert {name: rows.tolist() for name, rows in prepared.rows.items()} == {"train": [0, 1, 2], "test": [3, 4]}
    assert (prepared.spec.height, prepared.spec.width, prepared.spec.channels) == (2, 4, 1)
    assert prepared.classes == ["round", "square"]


@pytest.mark.parametrize(("archive", "labels"), [(1, [1, 0]), (1, [1, 0, 1, 1]), (3, [0]), (3, [0, 1, 1])], ids=str)
def test_another_number_of_labels_than_images_is_refused(
    shapes: tuple[OfficialDataset, list[Path]], archive: int, labels: list[int]
) -> None:
    dataset, paths = shapes
    compressed(paths[archive], idx(len(labels), body=bytes(labels)))
    with refused("shapes", "differ in number"):
        read_idx_archives(dataset, paths)


def test_surplus_labels_of_one_split_do_not_fill_up_the_other(shapes: tuple[OfficialDataset, list[Path]]) -> None:
    dataset, paths = shapes
    compressed(paths[1], idx(2, body=bytes([1, 0])))
    compressed(paths[3], idx(3, body=bytes([1, 0, 1])))
    with refused("shapes", "differ in number"):
        read_idx_archives(dataset, paths)


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


# CIFAR-10, binary version: records of a label and three planes


def record(label: int, first: int) -> bytes:
    """Red counts up from `first`, green is 1, blue is 2."""
    return bytes([label]) + bytes((first + i) % 256 for i in range(1024)) + b"\x01" * 1024 + b"\x02" * 1024


def cifar_archive(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in {"readme.html": b"<html>", "batches.meta.txt": b"airplane\n", **files}.items():
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


CIFAR = OfficialDataset("planes", "cifar-binary", ["plane", "car", "bird"])
BATCHES = {
    "test_batch.bin": record(2, 7) + record(0, 8),
    "data_batch_2.bin": record(0, 5) + record(1, 6),
    "data_batch_1.bin": record(1, 3) + record(2, 4),
}


def test_cifar_records_become_images_in_the_order_of_their_batches(tmp_path: Path) -> None:
    prepared = read_cifar_binary(CIFAR, [cifar_archive(tmp_path / "c.tar.gz", BATCHES)])
    assert prepared.images.shape == (6, 32, 32, 3) and prepared.images.dtype == np.uint8
    assert prepared.labels.tolist() == [1, 2, 0, 1, 2, 0]
    assert prepared.rows["train"].tolist() == [0, 1, 2, 3] and prepared.rows["test"].tolist() == [4, 5]
    assert prepared.images[:, 0, 0].tolist() == [[first, 1, 2] for first in (3, 4, 5, 6, 7, 8)]
    assert prepared.images[0, 1, :3, 0].tolist() == [35, 36, 37]  # the second row follows the first


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"data_batch_1.bin": record(0, 0)[:-1]}, "not a multiple of 3073"),
        ({"data_batch_1.bin": b"", "data_batch_2.bin": b""}, "0 bytes of training records"),
        ({"test_batch.bin": b""}, "0 bytes of test records"),
    ],
)
def test_a_cifar_archive_of_other_records_is_refused(tmp_path: Path, files: dict[str, bytes], message: str) -> None:
    path = cifar_archive(tmp_path / "c.tar.gz", BATCHES | files)
    with refused(str(path), message, "download it again"):
        read_cifar_binary(CIFAR, [path])


def test_a_class_beyond_the_last_is_refused_in_every_format(
    tmp_path: Path, shapes: tuple[OfficialDataset, list[Path]]
) -> None:
    cifar = cifar_archive(tmp_path / "c.tar.gz", BATCHES | {"test_batch.bin": record(3, 0)})
    with refused("planes has an image of class 3, but its last class is 2"):
        read_cifar_binary(CIFAR, [cifar])
    dataset, paths = shapes
    compressed(paths[3], idx(2, body=bytes([2, 1])))
    with refused("shapes has an image of class 2, but its last class is 1"):
        read_idx_archives(dataset, paths)


def test_idx_archives_in_another_order_are_refused(shapes: tuple[OfficialDataset, list[Path]]) -> None:
    dataset, paths = shapes
    with refused("images, labels, images, labels"):
        read_idx_archives(dataset, [paths[1], paths[0], paths[2], paths[3]])


def test_a_damaged_cifar_archive_is_refused(tmp_path: Path) -> None:
    path = cifar_archive(tmp_path / "c.tar.gz", BATCHES)
    path.write_bytes(path.read_bytes()[:-40])
    with refused(str(path)):
        read_cifar_binary(CIFAR, [path])


# SVHN, cropped digits: MATLAB files


def svhn_file(path: Path, labels: list[int], first: int = 0, **changed: np.ndarray) -> Path:
    """All values of image i are `first` + i, except for a 255 at row 1, column 2, channel 0."""
    images = np.empty((32, 32, 3, len(labels)), np.uint8)
    images[:] = first + np.arange(len(labels))
    images[1, 2, 0] = 255
    scipy.io.savemat(path, {"X": images, "y": np.array(labels, np.uint8)[:, None], **changed})
    return path


SVHN = OfficialDataset("houses", "svhn-mat", [str(digit) for digit in range(10)])


def test_svhn_files_become_digits_and_ten_is_zero(tmp_path: Path) -> None:
    paths = [svhn_file(tmp_path / "train.mat", [1, 10, 9]), svhn_file(tmp_path / "test.mat", [10, 2], first=100)]
    prepared = read_svhn(SVHN, paths)
    assert prepared.images.shape == (5, 32, 32, 3)
    assert prepared.labels.tolist() == [1, 0, 9, 0, 2]
    assert prepared.images[:, 0, 0, 0].tolist() == [0, 1, 2, 100, 101]
    assert (prepared.images[:, 1, 2] == [[255, i, i] for i in (0, 1, 2, 100, 101)]).all()
    assert prepared.rows["train"].tolist() == [0, 1, 2] and prepared.rows["test"].tolist() == [3, 4]


@pytest.mark.parametrize(
    "changed",
    [
        {"y": np.array([[11]], np.uint8)},
        {"y": np.array([[0]], np.uint8)},
        {"y": np.array([[1], [2]], np.uint8)},
        {"X": np.zeros((32, 32, 3, 1))},
        {"X": np.zeros((28, 28, 3, 1), np.uint8)},
        {"X": np.zeros(4, np.uint8)},
    ],
    ids=["11", "0", "two labels", "floats", "small", "flat"],
)
def test_a_mat_file_that_is_not_svhn_is_refused(tmp_path: Path, changed: dict[str, np.ndarray]) -> None:
    path = svhn_file(tmp_path / "train.mat", [1], 0, **changed)
    with refused(str(path), "download it again"):
        read_svhn(SVHN, [path, path])


def test_mat_files_without_images_are_refused(tmp_path: Path) -> None:
    empty = svhn_file(tmp_path / "a.mat", [], X=np.zeros((32, 32, 3, 0), np.uint8), y=np.zeros((0, 1), np.uint8))
    with refused("houses: a split has no images", "download them again"):
        read_svhn(SVHN, [empty, empty])


@pytest.mark.parametrize("content", [b"", b"<html>This page has moved.</html>" * 20, None])
def test_a_damaged_mat_file_is_refused(tmp_path: Path, content: bytes | None) -> None:
    path = svhn_file(tmp_path / "train.mat", [1, 2])
    path.write_bytes(path.read_bytes()[:5000] if content is None else content)
    with refused(str(path), "download it again"):
        read_svhn(SVHN, [path, path])


# official archives on a server


def test_official_archives_are_downloaded_and_prepared(tmp_path: Path, cli: Cli, serve: Callable[..., str]) -> None:
    """The test writes its own table of datasets, with its archives, mirror and checksums."""
    mirror = tmp_path / "mirror"
    mirror.mkdir()
    labels = list(range(1, 11)) * 2
    all_records = b"".join(record(label % 10, label) for label in labels)
    files = {
        "cifar10": [cifar_archive(mirror / "cifar-10-binary.tar.gz", dict.fromkeys(BATCHES, all_records))],
        "svhn": [svhn_file(mirror / "train_32x32.mat", labels), svhn_file(mirror / "test_32x32.mat", labels)],
    }
    known = known_datasets()
    table = {
        name: {
            "format": known[name].format,
            "classes": known[name].classes,
            "image": known[name].image,
            "mirrors": [serve(mirror)],
            "files": {path.name: "md5:" + hashlib.md5(path.read_bytes()).hexdigest() for path in paths},
        }
        for name, paths in files.items()
    }
    (tmp_path / "datasets.toml").write_text(tomli_w.dumps(table))
    for name, counts in (("cifar10", "40 train, 20 test"), ("svhn", "20 train, 20 test")):
        result = cli("pipeline", "preprocess", name, CONVLINE_DATASETS="datasets.toml")
        *lines, last = result.stdout.splitlines()
        assert last == f"data/{name}: {counts} images of 32x32x3, 10 classes, 0 rejected"
        assert [line.rsplit(maxsplit=2)[0] for line in lines[:11]] == ["class", *known[name].classes]
        assert Dataset.open(tmp_path / "data", name).classes == known[name].classes
    (tmp_path / "data/archives/svhn/test_32x32.mat").write_bytes(b"other")
    again = cli("pipeline", "preprocess", "svhn", "--overwrite", CONVLINE_DATASETS="datasets.toml")
    assert again.stderr.count("downloading") == 1  # only the damaged file


TABLE = """
[x]
classes = ["a", "b"]
format = "idx"
mirrors = []
files = {a = "md5:0", b = "md5:0", c = "md5:0", d = "md5:0"}
"""


@pytest.mark.parametrize(
    "content",
    [
        None,
        "[x",
        "[x]\nclasses = []\n",
        "[x]\nfolder = 1\n",
        TABLE.replace("idx", "idxx") + "image = [2, 2, 1]\n",
        TABLE.replace(', d = "md5:0"', "") + "image = [2, 2, 1]\n",
        TABLE,
    ],
    ids=["missing", "not TOML", "no format", "unknown field", "unknown format", "three archives", "no image"],
)
def test_an_invalid_table_of_datasets_is_named(cli: Cli, tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "datasets.toml").write_text(content)
    result = cli("pipeline", "download", "x", CONVLINE_DATASETS="datasets.toml", status=1)
    assert result.stderr.startswith("error: the table of datasets datasets.toml cannot be read")
