import hashlib
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torchvision

from pipeline.download import download
from pipeline.preparing.official_datasets import OfficialDataset, known_datasets
from tests.conftest import Cli, QuietHandler
from tests.pipeline.helpers import contents, refused, write_files

FILES = {"images.gz": b"images" * 1000, "labels.gz": b"labels" * 10}

Serve = Callable[..., str]


@pytest.fixture
def good(tmp_path: Path) -> Path:
    """A folder that holds the right archives."""
    return write_files(tmp_path / "good", FILES)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    return folder


def dataset_on(*mirrors: str, files: dict[str, bytes] = FILES) -> OfficialDataset:
    """A dataset of `files` on these mirrors."""
    checksums = {name: "md5:" + hashlib.md5(content).hexdigest() for name, content in files.items()}
    return OfficialDataset("shapes", "idx", ["round", "square"], list(mirrors), checksums)


def counting() -> tuple[type[QuietHandler], list[str]]:
    """A handler, and the list of paths that were requested from it."""
    requested: list[str] = []

    class Counting(QuietHandler):
        def do_GET(self) -> None:
            requested.append(self.path)
            super().do_GET()

    return Counting, requested


class CutOff(QuietHandler):
    """Announces the length of the whole body, but sends half of it."""

    def do_GET(self) -> None:
        body = Path(self.translate_path(self.path)).read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2])


class CutOffSilently(CutOff):
    """Sends half of the body, without announcing a length."""

    def send_header(self, keyword: str, value: str) -> None:
        if keyword != "Content-Length":
            super().send_header(keyword, value)


class Encoded(QuietHandler):
    """Declares the archives gzip-encoded, as some servers do with .gz files."""

    def end_headers(self) -> None:
        self.send_header("Content-Encoding", "gzip")
        super().end_headers()


def unreachable() -> str:
    """The URL of a port on which no server listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}/"


def assert_downloaded(paths: list[Path], data: Path) -> None:
    folder = data / "archives/shapes"
    assert paths == [folder / name for name in FILES]
    assert contents(folder) == FILES  # and nothing temporary


def test_the_archives_are_fetched_in_their_order(good: Path, data: Path, serve: Serve) -> None:
    assert_downloaded(download(dataset_on(serve(good)), data), data)


def test_a_gz_file_is_not_decompressed_where_the_server_calls_it_encoded(good: Path, data: Path, serve: Serve) -> None:
    assert_downloaded(download(dataset_on(serve(good, Encoded)), data), data)


def test_a_mirror_may_lack_its_final_slash_and_be_below_a_folder(good: Path, data: Path, serve: Serve) -> None:
    assert_downloaded(download(dataset_on(serve(good.parent) + "good"), data), data)


def test_a_whole_file_is_not_fetched_again(good: Path, data: Path, serve: Serve) -> None:
    handler, requested = counting()
    url = serve(good, handler)
    download(dataset_on(url), data)
    assert requested == ["/images.gz", "/labels.gz"]
    assert_downloaded(download(dataset_on(url), data), data)
    assert len(requested) == 2


def test_a_whole_file_needs_no_network(good: Path, data: Path, serve: Serve) -> None:
    download(dataset_on(serve(good)), data)
    assert_downloaded(download(dataset_on(unreachable()), data), data)


@pytest.mark.parametrize("damaged", [b"", FILES["images.gz"][:-1], b"x" + FILES["images.gz"][1:]])
def test_only_a_damaged_file_is_fetched_again(good: Path, data: Path, serve: Serve, damaged: bytes) -> None:
    handler, requested = counting()
    url = serve(good, handler)
    paths = download(dataset_on(url), data)
    paths[0].write_bytes(damaged)
    assert_downloaded(download(dataset_on(url), data), data)
    assert requested[2:] == ["/images.gz"]


def test_mirrors_from_the_command_line_are_tried_first(good: Path, data: Path, serve: Serve) -> None:
    (first, first_requested), (second, second_requested) = counting(), counting()
    download(dataset_on(serve(good, second)), data, [serve(good, first)])
    assert (len(first_requested), second_requested) == (2, [])


@pytest.fixture(params=["another file", "cut off", "cut off silently", "not there", "unreachable", "no such folder"])
def bad(request: pytest.FixtureRequest, good: Path, tmp_path: Path, serve: Serve) -> tuple[str, str]:
    """The URL of a mirror that fails, and part of the reason given."""
    wrong = write_files(tmp_path / "wrong", dict.fromkeys(FILES, b"<html>This page has moved.</html>"))
    mirrors: dict[str, Callable[[], tuple[str, str]]] = {
        "another file": lambda: (serve(wrong), "checksum"),
        "cut off": lambda: (serve(good, CutOff), "truncated"),
        "cut off silently": lambda: (serve(good, CutOffSilently), "checksum"),
        "not there": lambda: (serve(tmp_path / "wrong", QuietHandler) + "elsewhere/", "404"),
        "unreachable": lambda: (unreachable(), "cannot be reached"),
        "no such folder": lambda: ((tmp_path / "none").as_uri(), "no such file"),
    }
    return mirrors[request.param]()


def test_after_a_bad_mirror_comes_the_next(bad: tuple[str, str], good: Path, data: Path, serve: Serve) -> None:
    assert_downloaded(download(dataset_on(bad[0], serve(good)), data), data)


def test_without_a_good_mirror_nothing_is_left(bad: tuple[str, str], data: Path) -> None:
    url, reason = bad
    with refused("images.gz", "shapes", url, reason, "--mirror", str(data)):
        download(dataset_on(url), data)
    assert [path for path in data.rglob("*") if not path.is_dir()] == []


def test_every_mirror_that_failed_is_named(data: Path) -> None:
    one, other = unreachable(), unreachable()
    with refused(one, other):
        download(dataset_on(other), data, [one])


def test_what_was_fetched_before_a_failure_is_kept(good: Path, data: Path, serve: Serve) -> None:
    (good / "labels.gz").unlink()
    with refused("labels.gz", "404"):
        download(dataset_on(serve(good)), data)
    assert contents(data / "archives/shapes") == {"images.gz": FILES["images.gz"]}


def test_a_folder_is_a_mirror(good: Path, data: Path) -> None:
    assert_downloaded(download(dataset_on(), data, [good.as_uri()]), data)
    assert contents(good) == FILES


def test_a_folder_with_a_space_in_its_name_is_a_mirror(tmp_path: Path, data: Path) -> None:
    folder = write_files(tmp_path / "my mirror", FILES)
    assert_downloaded(download(dataset_on(), data, [folder.as_uri()]), data)


def test_a_url_of_an_unknown_scheme_is_refused(data: Path) -> None:
    with refused("gopher://example.org", "--mirror"):
        download(dataset_on("gopher://example.org"), data)


@pytest.mark.parametrize(
    ("name", "source"),
    [("mnist", torchvision.datasets.MNIST), ("fashion-mnist", torchvision.datasets.FashionMNIST)],
)
def test_names_and_checksums_are_those_of_torchvision(name: str, source: type[torchvision.datasets.MNIST]) -> None:
    listed = known_datasets()[name].files
    assert list(listed) == [
        "train-images-idx3-ubyte.gz",
        "train-labels-idx1-ubyte.gz",
        "t10k-images-idx3-ubyte.gz",
        "t10k-labels-idx1-ubyte.gz",
    ]
    assert listed == {file: f"md5:{checksum}" for file, checksum in source.resources}


def test_files_of_cifar10_and_svhn_are_those_of_torchvision() -> None:
    # torchvision lists only the pickled edition of CIFAR-10
    assert known_datasets()["cifar10"].files == {"cifar-10-binary.tar.gz": "md5:c32a1d4ab5d03f1284b67883e8d87530"}
    splits = torchvision.datasets.SVHN.split_list
    listed = {splits[split][1]: f"md5:{splits[split][2]}" for split in ("train", "test")}
    assert known_datasets()["svhn"].files == listed


def test_the_classes_of_fashion_mnist_are_those_of_torchvision() -> None:
    assert known_datasets()["fashion-mnist"].classes == torchvision.datasets.FashionMNIST.classes


def test_mnist_is_downloaded_and_its_paths_are_printed(cli: Cli, test_data: Path, tmp_path: Path, serve: Serve) -> None:
    result = cli("pipeline", "download", "mnist", "--mirror", serve(test_data / "mnist"))
    names = known_datasets()["mnist"].files
    assert result.stdout.splitlines() == [f"data/archives/mnist/{name}" for name in names]
    assert contents(tmp_path / "data/archives/mnist") == contents(test_data / "mnist")


def test_a_dataset_that_cannot_be_downloaded_is_refused_with_those_that_can(cli: Cli, tmp_path: Path) -> None:
    result = cli("pipeline", "download", "minst", status=1)
    assert "archives of minst" in result.stderr and "fashion-mnist" in result.stderr
    assert contents(tmp_path) == {}


def test_digits_needs_no_download(cli: Cli, tmp_path: Path) -> None:
    assert "embedded" in cli("pipeline", "download", "digits").stderr
    assert contents(tmp_path) == {}
