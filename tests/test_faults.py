"""What can happen to a training from outside: kills, signals, torn files, full disks, servers that fail."""

import json
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import mlflow
import psutil
import pytest

from pipeline.engine.checkpoint import paths
from tests.conftest import Cli, command, run_command
from tests.trainings import KILLABLE, TRAIN, assert_same_weights, final_state, points, start, wait_for_steps


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    run_command(folder, *TRAIN, *KILLABLE)
    return folder / "runs/digits"


def being_saved(run: Path) -> list[Path]:
    return list((run / "checkpoints").glob(".step-*.tmp"))


def kill_while_saving(process: subprocess.Popen[str], run: Path) -> None:
    while not any(f".{process.pid}." in path.name for path in being_saved(run)):
        assert process.poll() is None, "the training ended before it was killed"
    process.kill()
    process.communicate()


def kill_at_some_step(process: subprocess.Popen[str], after: int) -> None:
    """Not at a line of the log, but anywhere within the steps that follow it."""
    wait_for_steps(process, after)
    time.sleep(random.random() / 20)
    assert process.poll() is None, "the training ended before it was killed"
    process.kill()
    process.communicate()


@pytest.mark.parametrize("kills", [5, pytest.param(20, marks=pytest.mark.slow)])
def test_a_training_killed_again_and_again_ends_with_the_same_bits(
    uninterrupted: Path, tmp_path: Path, cli: Cli, kills: int
) -> None:
    run = tmp_path / "runs/digits"
    torn = 0
    for kill in range(kills):
        process = start(tmp_path, "--resume")
        if kill % 2:
            kill_while_saving(process, run)
            torn += len(being_saved(run))
        else:
            kill_at_some_step(process, (kill * 400 // kills + 9) // 10 * 10)
    assert torn, "no kill met a save"
    cli(*TRAIN, *KILLABLE, "--resume")
    assert not being_saved(run)
    assert_same_weights(run, uninterrupted)
    mine, theirs = ([(point["step"], point.get("loss")) for point in points(r)] for r in (run, uninterrupted))
    assert mine == theirs  # no step stands twice, none is missing


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_first(
    uninterrupted: Path, tmp_path: Path, cli: Cli, number: signal.Signals, status: int
) -> None:
    process = start(tmp_path)
    wait_for_steps(process, 50)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == status
    assert "Traceback" not in errors
    run = tmp_path / "runs/digits"
    saved = final_state(run)["step"]
    assert saved > 50
    assert [point["step"] for point in points(run) if "loss" in point][-1] == (saved - 1) // 10 * 10
    cli(*TRAIN, *KILLABLE, "--resume")
    assert_same_weights(run, uninterrupted)


def test_a_torn_checkpoint_is_skipped(uninterrupted: Path, tmp_path: Path, cli: Cli) -> None:
    process = start(tmp_path)
    wait_for_steps(process, 100)
    process.kill()
    process.communicate()
    run = tmp_path / "runs/digits"
    newest = paths(run / "checkpoints")[-1]
    os.truncate(newest, newest.stat().st_size // 2)
    assert f"{newest.name} is damaged and skipped" in cli(*TRAIN, *KILLABLE, "--resume").stderr
    assert_same_weights(run, uninterrupted)


def test_a_full_disk_leaves_the_last_checkpoint(uninterrupted: Path, tmp_path: Path, cli: Cli) -> None:
    """The kernel refuses what goes beyond 1 MB of a file; a checkpoint has 40."""
    process = start(tmp_path)
    wait_for_steps(process, 20)
    process.kill()
    process.communicate()
    run = tmp_path / "runs/digits"
    before = {path: path.read_bytes() for path in paths(run / "checkpoints")}
    limited = subprocess.run(
        command(*TRAIN, *KILLABLE, "--resume"),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20)),
    )
    assert limited.returncode == 1
    error = limited.stderr.splitlines()[-1]
    last = list(before)[-1].name
    assert "could not be saved: File too large" in error and f"{last} is whole" in error and "--resume" in error
    assert {path: path.read_bytes() for path in paths(run / "checkpoints")} == before
    cli(*TRAIN, *KILLABLE, "--resume")
    assert_same_weights(run, uninterrupted)


def test_points_that_cannot_be_written_end_the_training(tmp_path: Path) -> None:
    process = start(tmp_path, "--set", "train.steps=100000", "--set", "train.checkpoint_every=100000")
    wait_for_steps(process, 10)
    size = (tmp_path / "runs/digits/metrics.jsonl").stat().st_size
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size + 1000, size + 1000))
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "metrics.jsonl could not be written" in errors and "Traceback" not in errors


@pytest.fixture
def server(tmp_path: Path) -> Iterator["Server"]:
    started = Server(tmp_path)
    yield started
    started.signal(signal.SIGKILL)


class Server:
    """A real MLflow server on loopback."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = probe.getsockname()[1]
        self._folder = folder
        self.uri = f"http://127.0.0.1:{self._port}"
        self.start()

    def start(self) -> None:
        options = ["--host", "127.0.0.1", "--port", str(self._port), "--workers", "1"]
        store = ["--backend-store-uri", f"sqlite:///{self._folder}/server.db"]
        with (self._folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "mlflow", "server", *options, *store],
                cwd=self._folder,
                stdout=log,
                stderr=log,
                env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},  # a dozen processes besides
                start_new_session=True,
            )
        while True:
            assert self._process.poll() is None, (self._folder / "server.log").read_text()
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self._port)) == 0:
                    return
            time.sleep(0.1)

    def signal(self, number: signal.Signals) -> None:
        os.killpg(self._process.pid, number)
        if number == signal.SIGKILL:
            self._process.wait()


@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP])
def test_a_server_that_fails_costs_a_training_nothing(tmp_path: Path, server: Server, fault: signal.Signals) -> None:
    env = {**os.environ, "MLFLOW_TRACKING_URI": server.uri, "MLFLOW_HTTP_REQUEST_TIMEOUT": "3"}
    training = command("pipeline", "train", "digits", "--steps", 10000)
    run = tmp_path / "runs/digits"
    with (tmp_path / "errors").open("wb") as errors:  # a pipe that nobody reads would stop it
        process = subprocess.Popen(training, cwd=tmp_path, env=env, stderr=errors)
    try:
        begin_tracking(process, run)
        server.signal(fault)
        failed = time.time()
        wait_until(process, lambda: state(run).get("problem") is not None)  # the follower has noticed
        noticed = time.time()
        process.wait(300)
    finally:
        process.kill()
    assert process.returncode == 0
    assert (tmp_path / "errors").read_text().count("warning: ") == 1
    last = points(run)[-1]
    assert last["tracking_seconds"] < 0.02 * last["training_seconds"]
    assert any(failed < point["time"] < noticed for point in points(run)), "the training waited for the server"
    if fault == signal.SIGKILL:
        server.start()
    else:
        server.signal(signal.SIGCONT)
    run_command(tmp_path, "pipeline", "sync", MLFLOW_TRACKING_URI=server.uri)
    history = mlflow.MlflowClient(server.uri).get_metric_history(state(run)["mlflow_run"], "loss")
    assert [(metric.step, metric.value) for metric in history] == losses(run)


def losses(run: Path) -> list[tuple[int, float]]:
    return [(point["step"], point["loss"]) for point in points(run) if "loss" in point]


def state(run: Path) -> dict:
    path = run / "sync.json"
    return json.loads(path.read_text()) if path.exists() else {}


def wait_until(process: subprocess.Popen, condition: Callable[[], bool]) -> None:
    while not condition():
        assert process.poll() is None, "the training ended too soon: give it more steps"
        time.sleep(0.05)


def begin_tracking(process: subprocess.Popen, run: Path) -> None:
    """Hold the training until its follower has begun: with the lowest priority on one busy CPU it takes minutes to."""
    wait_until(process, lambda: (run / "metrics.jsonl").exists() and points(run) != [])
    process.send_signal(signal.SIGSTOP)
    wait_until(process, lambda: state(run).get("step", -1) >= 0)
    process.send_signal(signal.SIGCONT)


def test_a_follower_that_is_killed_is_started_again(tmp_path: Path) -> None:
    training = command("pipeline", "train", "digits", "--steps", 100000)
    process = subprocess.Popen(training, cwd=tmp_path, stderr=subprocess.DEVNULL)
    run = tmp_path / "runs/digits"
    try:
        begin_tracking(process, run)
        first = follower(process)
        os.kill(first, signal.SIGKILL)
        place = state(run)["step"]
        wait_until(process, lambda: points(run)[-1]["step"] > place)
        process.send_signal(signal.SIGSTOP)
        wait_until(process, lambda: state(run)["step"] > place)
        process.send_signal(signal.SIGCONT)
        assert follower(process) != first
        process.send_signal(signal.SIGTERM)
        process.wait(120)
    finally:
        process.kill()
    assert process.returncode == 143
    run_command(tmp_path, "pipeline", "sync")
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    history = client.get_metric_history(state(run)["mlflow_run"], "loss")
    assert [(metric.step, metric.value) for metric in history] == losses(run)


def follower(process: subprocess.Popen) -> int:
    (child,) = [child for child in psutil.Process(process.pid).children() if "sync" in child.cmdline()]
    return child.pid
