"""Faults of tracking: servers that are killed or freeze, a follower that is killed."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import psutil
import pytest

from tests.conftest import command, run_command
from tests.tracking_server import Server
from tests.trainings import points

pytestmark = pytest.mark.all


@pytest.mark.parametrize(("fault", "steps"), [(signal.SIGKILL, 4000), (signal.SIGSTOP, 8000)])
def test_a_server_that_fails_costs_a_training_nothing(
    tmp_path: Path, server: Server, fault: signal.Signals, steps: int
) -> None:
    server.start()
    env = {**os.environ, "MLFLOW_TRACKING_URI": server.uri, "MLFLOW_HTTP_REQUEST_TIMEOUT": "3"}
    training = command("pipeline", "train", "digits", "--steps", steps)
    run = tmp_path / "runs/digits"
    with (tmp_path / "errors").open("wb") as errors:  # a pipe that is not read would block it
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
    until = max(noticed, failed + 5)  # a killed server is noticed at once, perhaps between two points
    assert any(failed < point["time"] < until for point in points(run)), "the training waited for the server"
    if fault == signal.SIGKILL:
        server.start()
    else:
        server.signal(signal.SIGCONT)
    run_command(tmp_path, "pipeline", "sync", MLFLOW_TRACKING_URI=server.uri)
    history = mlflow.MlflowClient(server.uri).get_metric_history(state(run)["mlflow_run"], "loss")
    assert [(metric.step, metric.value) for metric in history] == losses(run)


def losses(run: Path) -> list[tuple[int, float]]:
    return [(point["step"], point["loss"]) for point in points(run) if "loss" in point]


def state(run: Path) -> dict[str, Any]:
    path = run / "sync.json"
    return json.loads(path.read_text()) if path.exists() else {}


def wait_until(process: subprocess.Popen[bytes], condition: Callable[[], bool]) -> None:
    while not condition():
        assert process.poll() is None, "the training ended too soon: give it more steps"
        time.sleep(0.05)


def begin_tracking(process: subprocess.Popen[bytes], run: Path) -> None:
    """Pause the training until its follower has started, which takes long on a busy CPU because of its low priority."""
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
        sent_step = state(run)["step"]
        wait_until(process, lambda: points(run)[-1]["step"] > sent_step and followers(process) not in ([], [first]))
        process.send_signal(signal.SIGSTOP)
        wait_until(process, lambda: state(run)["step"] > sent_step)
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


def follower(process: subprocess.Popen[bytes]) -> int:
    (child,) = followers(process)
    return child


def followers(process: subprocess.Popen[bytes]) -> list[int]:
    """The processes of a training's followers that are alive."""
    children = psutil.Process(process.pid).children()
    return [child.pid for child in children if child.status() != psutil.STATUS_ZOMBIE and "sync" in child.cmdline()]
