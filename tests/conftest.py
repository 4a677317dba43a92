"""What the tests share: the commands as processes, a trained and exported model, local servers."""

from __future__ import annotations

import functools
import http.server
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.tracking_server import Server

ROOT = Path(__file__).parent.parent

CPUS = sorted(os.sched_getaffinity(0))

Cli = Callable[..., subprocess.CompletedProcess[str]]


def command(*arguments: object) -> list[str]:
    """`command("pipeline", "train", …)` as an argument vector."""
    module, *rest = map(str, arguments)
    return [sys.executable, "-m", module, *rest]


def run_command(folder: Path, *arguments: object, status: int = 0, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a command in `folder`; anything but the expected exit status fails the test with its output."""
    result = subprocess.run(
        command(*arguments), cwd=folder, env={**os.environ, **env}, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == status, f"exit {result.returncode}\n{result.stdout}\n{result.stderr}"
    assert "Traceback" not in result.stderr
    return result


# of the test files, those that take minutes: begun last, they would leave the other CPUs waiting for one
LONGEST = (
    "test_faults",
    "test_walkthrough",
    "test_tracking",
    "test_cluster",
    "test_distributed",
    "test_jobs",
    "test_classify",
    "test_bench",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


def pytest_configure(config: pytest.Config) -> None:
    """Give each of several test processes CPUs of its own: trainings that share them wait for each other."""
    worker = getattr(config, "workerinput", None)
    if worker is not None:
        number = int(worker["workerid"].removeprefix("gw"))
        mine = CPUS[number :: worker["workercount"]]
        os.sched_setaffinity(0, mine or CPUS)


@pytest.fixture(scope="module")
def all_cpus() -> Iterator[None]:
    """For tests of what more than one CPU does."""
    mine = os.sched_getaffinity(0)
    os.sched_setaffinity(0, CPUS)
    yield
    os.sched_setaffinity(0, mine)


@pytest.fixture
def cli(tmp_path: Path) -> Cli:
    """`cli("pipeline", "train", "digits", status=1)` in the test's own folder."""
    return functools.partial(run_command, tmp_path)


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data/digits and runs/digits, trained (300 steps) and exported. Do not change it."""
    folder = tmp_path_factory.mktemp("project")
    run_command(folder, "pipeline", "train", "digits", "--steps", 300, "--tracking", "none")
    run_command(folder, "pipeline", "export")
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
    folder = tmp_path_factory.mktemp("samples") / "digits"
    run_command(project, "pipeline", "samples", "digits", "--output", folder)
    return folder


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


@pytest.fixture
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
