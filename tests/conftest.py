"""What the tests share: the commands, a trained and exported model, local servers."""

from __future__ import annotations

import functools
import http.server
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from convline.cpus import usable_cpus
from tests.commands import Cli, command, run_command, run_process
from tests.pipeline.helpers import image_folder
from tests.shared import shared_folder
from tests.tracking_server import Server

__all__ = ["CPUS", "ROOT", "Cli", "QuietHandler", "command", "run_command", "run_process"]

ROOT = Path(__file__).parent.parent

CPUS = sorted(os.sched_getaffinity(0))


def pytest_xdist_auto_num_workers() -> int:
    """One test process for each CPU that may be used, whatever the machine has."""
    return usable_cpus()


def pytest_configure(config: pytest.Config) -> None:
    """Give each of several test processes CPUs of its own: trainings that share them wait for each other."""
    worker = getattr(config, "workerinput", None)
    if worker is not None:
        number = int(worker["workerid"].removeprefix("gw"))
        mine = CPUS[number :: worker["workercount"]]
        os.sched_setaffinity(0, mine or CPUS)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest test first: a test process that began it last would be left alone with it."""

    def seconds(item: pytest.Item) -> int:
        marker = item.get_closest_marker("timeout")
        return marker.args[0] if marker else 0

    items.sort(key=lambda item: seconds(item) <= 600)


@pytest.fixture(scope="module")
def all_cpus() -> Iterator[None]:
    """For tests of what more than one CPU does."""
    mine = os.sched_getaffinity(0)
    os.sched_setaffinity(0, CPUS)
    yield
    os.sched_setaffinity(0, mine)


@pytest.fixture
def cli(tmp_path: Path) -> Cli:
    """`cli("pipeline", "train", "digits", status=1)` in the test's own folder, by `run_command`."""
    return functools.partial(run_command, tmp_path)


@pytest.fixture
def cli_process(tmp_path: Path) -> Cli:
    """As `cli`, but as a process of its own."""
    return functools.partial(run_process, tmp_path)


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data/digits and runs/digits, trained (300 steps) and exported. Do not change it."""

    def make(folder: Path) -> None:
        run_command(folder, "pipeline", "train", "digits", "--steps", 300, "--tracking", "none")
        run_command(folder, "pipeline", "export")

    folder = tmp_path_factory.mktemp("project") / "project"  # a copy, as commands write into the run that they read
    shutil.copytree(shared_folder(tmp_path_factory, "project", make), folder)
    return folder


@pytest.fixture
def own_project(project: Path, tmp_path: Path) -> Path:
    """A copy of `project` that the test may change."""
    folder = tmp_path / "project"
    shutil.copytree(project, folder)
    return folder


@pytest.fixture(scope="session")
def model(project: Path) -> Path:
    """An exported digits model. Do not change it."""
    return project / "runs/digits/model.onnx"


@pytest.fixture(scope="session")
def samples(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """100 test images of digits as <class>/<i>.png. Do not change it."""

    def make(folder: Path) -> None:
        run_command(project, "pipeline", "samples", "digits", "--output", folder / "digits")

    return shared_folder(tmp_path_factory, "samples", make) / "digits"


@pytest.fixture(scope="session")
def insects(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with any-size.onnx (and its names), which takes RGB images of three classes and tells how
    unfamiliar they are, and the images of noise in source/ that it learned. Do not change it."""

    def make(folder: Path) -> None:
        counts = {f"{split}/{label}": 8 for split in ("train", "test") for label in ("ant", "bee", "cat")}
        image_folder(folder / "source", counts, (24, 24))
        run_command(folder, "pipeline", "preprocess", "insects", "--source", "source")
        options = ("--steps", 20, "--tracking", "none", "--set", "train.evaluate_every=0", "--set", "data.validation=6")
        run_command(folder, "pipeline", "train", "digits", "--dataset", "insects", *options)
        asked = ("--any-size", "--unfamiliar", "--output", "any-size.onnx", "--tracking", "none")
        run_command(folder, "pipeline", "export", *asked)

    return shared_folder(tmp_path_factory, "insects", make)


@pytest.fixture(scope="session")
def test_data() -> Path:
    """Real MNIST and CIFAR-10, where the machine has them."""
    if "CONVLINE_TEST_DATA" not in os.environ:
        pytest.skip("CONVLINE_TEST_DATA does not say where the real datasets are")
    return Path(os.environ["CONVLINE_TEST_DATA"])


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """An MLflow server that is not started yet."""
    made = Server(tmp_path)
    yield made
    made.close()


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture(scope="module")
def serve() -> Iterator[Callable[..., str]]:
    """`serve(folder)` -> the URL of a local HTTP server over it; `handler` replaces how it answers."""
    servers = []

    def start(folder: Path, handler: type[QuietHandler] = QuietHandler) -> str:
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(handler, directory=str(folder)))
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}/"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()
