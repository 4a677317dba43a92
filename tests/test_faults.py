"""What can happen to a training from outside: kills, signals, torn files, full disks."""

import os
import random
import resource
import signal
import subprocess
import time
from pathlib import Path

import pytest

from pipeline.checkpoint import paths
from serving.model import open_model
from tests.conftest import Cli, command, run_command
from tests.shared import shared_folder
from tests.trainings import KILLABLE, TRAIN, assert_same_weights, final_state, points, start, wait_for_steps

pytestmark = pytest.mark.all


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = shared_folder(tmp_path_factory, "uninterrupted", lambda folder: run_command(folder, *TRAIN, *KILLABLE))
    return folder / "runs/digits"


def being_saved(run: Path) -> list[Path]:
    return list((run / "checkpoints").glob(".step-*.tmp"))


def kill(process: subprocess.Popen[str]) -> None:
    assert process.poll() is None, "the training ended before it was killed"
    process.kill()
    process.communicate()


def killed_after(folder: Path, steps: int) -> Path:
    """A run whose training was killed after so many steps."""
    process = start(folder)
    wait_for_steps(process, steps)
    kill(process)
    return folder / "runs/digits"


def kill_while_saving(process: subprocess.Popen[str], run: Path) -> None:
    torn = set(being_saved(run))  # by the kill before, until the training removes it
    while not set(being_saved(run)) - torn:
        assert process.poll() is None, "the training ended before it was killed"
    kill(process)


def kill_at_some_step(process: subprocess.Popen[str], after: int) -> None:
    """Not at a line of the log, but anywhere within the steps that follow it."""
    wait_for_steps(process, after)
    time.sleep(random.random() / 20)
    kill(process)


@pytest.mark.parametrize("kills", [5, pytest.param(20, marks=pytest.mark.slow)])
def test_a_training_killed_again_and_again_ends_with_the_same_bits(
    uninterrupted: Path, tmp_path: Path, cli: Cli, kills: int
) -> None:
    run = tmp_path / "runs/digits"
    torn = 0
    for number in range(kills):
        process = start(tmp_path, "--resume")
        if number % 2:
            kill_while_saving(process, run)
            torn += len(being_saved(run))
        else:
            kill_at_some_step(process, (number * 400 // kills + 9) // 10 * 10)
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
    assert errors.endswith(
        f"stopped: runs/digits/checkpoints/step-{saved}.pt is saved, --resume continues from step {saved}\n"
    )
    assert [point["step"] for point in points(run) if "loss" in point][-1] == (saved - 1) // 10 * 10
    cli(*TRAIN, *KILLABLE, "--resume")
    assert_same_weights(run, uninterrupted)


def test_a_torn_checkpoint_is_skipped(uninterrupted: Path, tmp_path: Path, cli: Cli) -> None:
    run = killed_after(tmp_path, 100)
    newest = paths(run / "checkpoints")[-1]
    os.truncate(newest, newest.stat().st_size // 2)
    assert f"{newest.name} is damaged and skipped" in cli(*TRAIN, *KILLABLE, "--resume").stderr
    assert_same_weights(run, uninterrupted)


def test_a_full_disk_leaves_the_last_checkpoint(uninterrupted: Path, tmp_path: Path, cli: Cli) -> None:
    """The kernel refuses what goes beyond 1 MB of a file; a checkpoint has 40."""
    run = killed_after(tmp_path, 20)
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
    assert "could not be saved: File too large" in error and f"{last} is intact" in error and "--resume" in error
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


@pytest.mark.parametrize("kills", [5, pytest.param(30, marks=pytest.mark.slow)])
def test_an_export_killed_at_any_moment_leaves_a_proven_file(own_project: Path, kills: int) -> None:
    """The file from before, or the new one; half of the kills meet it while it is written and proven."""
    model = own_project / "runs/digits/model.onnx"
    began = time.monotonic()
    run_command(own_project, "pipeline", "export")
    seconds = time.monotonic() - began
    new = model.read_bytes()
    run_command(own_project, "pipeline", "export", "--precision", "fp16")
    old = model.read_bytes()
    assert old != new
    for number in range(kills):
        process = subprocess.Popen(
            command("pipeline", "export"), cwd=own_project, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        delay = random.random() * seconds
        if number % 2:
            while not list(model.parent.glob(".model.onnx.*.tmp")) and process.poll() is None:
                time.sleep(0.001)
            delay = random.random() * 0.5
        time.sleep(delay)
        process.kill()
        process.wait()
        assert model.read_bytes() in (old, new)
        assert open_model(model).metadata["parity"]["passed"]
        model.write_bytes(old)
    run_command(own_project, "pipeline", "export")
    assert model.read_bytes() == new
    assert not list(model.parent.glob(".*.tmp"))
