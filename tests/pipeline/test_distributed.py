"""Several ranks: real processes, started by torchrun and `--devices`, that communicate over gloo."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from pipeline.training.distributed import RankGroup
from pipeline.training.launch import first_to_end
from tests.conftest import ROOT, Cli, command, run_command
from tests.pipeline import ranks
from tests.trainings import final_state

pytestmark = [pytest.mark.all, pytest.mark.usefixtures("all_cpus")]

TRAIN = ("pipeline", "train", "digits", "--tracking", "none")


@pytest.fixture(scope="module")
def data(project: Path, samples: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of datasets: digits, and rgb of 32x32x3."""
    folder = tmp_path_factory.mktemp("datasets")
    (folder / "data").mkdir()
    (folder / "data/digits").symlink_to(project / "data/digits")
    run_command(folder, "pipeline", "preprocess", "rgb", "--source", samples, "--channels", 3, "--image-size", 32)
    return folder / "data"


def by_two_ranks(data: Path, output: Path, *options: str) -> dict[str, np.ndarray]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = [sys.executable, *launcher, str(ROOT / "tests/pipeline/ranks.py"), str(data), str(output), *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(script, capture_output=True, text=True, timeout=500, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    with np.load(output) as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def shared(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    return by_two_ranks(data, tmp_path_factory.mktemp("ranks") / "two.npz")


@pytest.mark.parametrize("system", ranks.SYSTEMS)
def test_two_ranks_compute_what_one_does(data: Path, shared: dict[str, np.ndarray], system: str) -> None:
    alone = ranks.compute(data, {system: ranks.SYSTEMS[system]}, RankGroup())
    np.testing.assert_allclose(shared[f"{system}/losses"], alone[f"{system}/losses"], rtol=1e-10)
    np.testing.assert_allclose(shared[f"{system}/state"], alone[f"{system}/state"], rtol=1e-7, atol=1e-9)
    gradients, tolerance = alone[f"{system}/gradients"], 3e-4 if "BatchNorm" in system else 1e-5
    assert np.abs(shared[f"{system}/gradients"] - gradients).max() <= tolerance * np.abs(gradients).max()


@pytest.mark.slow
def test_two_ranks_of_64_images_compute_what_one_of_128_does(data: Path, tmp_path: Path) -> None:
    shared, alone = by_two_ranks(data, tmp_path / "two.npz", "--full"), ranks.compute(data, ranks.FULL, RankGroup())
    np.testing.assert_allclose(shared["cifar10 of 128/losses"], alone["cifar10 of 128/losses"], rtol=1e-10)


def precision(run: Path) -> list[float]:
    points = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [point["precision_at_1"] for point in points if "precision_at_1" in point]


def test_devices_share_a_training_and_its_evaluation(cli: Cli, cli_process: Cli, tmp_path: Path) -> None:
    """359 test images are an odd number: one rank has one more."""
    settings = ("--steps", 40, "--set", "train.evaluate_every=20", "--set", "train.log_every=1")
    result = cli_process(*TRAIN, *settings, "--devices", 2)
    assert result.stdout == "runs/digits\n"
    run = tmp_path / "runs/digits"
    points = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [point["step"] for point in points if "loss" in point] == list(range(40))
    report = json.loads(cli("pipeline", "evaluate", "--json").stdout)
    assert precision(run)[-1] == report["precision_at_1"]
    assert final_state(run)["ranks"] == 2
    assert "nothing to do" in cli(*TRAIN, *settings, "--resume").stderr  # on one device: the same run


def start(folder: Path, *arguments: object) -> subprocess.Popen[str]:
    settings = ("--steps", 100000, "--set", "train.checkpoint_every=20", "--devices", 2)
    return subprocess.Popen(
        command(*TRAIN, *settings, *arguments),
        cwd=folder,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "MLFLOW_TRACKING_URI": "http://127.0.0.1:9"},  # nothing listens there
    )


def wait_for_a_step(process: subprocess.Popen[str], beyond: int = 40) -> None:
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        if ": step " in line and int(line.split(": step ")[1].split(",")[0]) > beyond:
            return
    pytest.fail(f"the training ended (exit {process.wait()}):\n{''.join(lines[-20:])}")


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


def workers(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The ranks, in order."""
    children = psutil.Process(process.pid).children()
    ranks = {child.environ()["RANK"]: child for child in children if "RANK" in child.environ()}
    return [ranks[rank] for rank in sorted(ranks)]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_dies_ends_the_job_soon_and_it_resumes(tmp_path: Path, rank: int) -> None:
    process = start(tmp_path)
    try:
        wait_for_a_step(process)
        workers(process)[rank].kill()
        killed = time.monotonic()
        _, errors = process.communicate(timeout=60)
    finally:
        end(process)
    assert time.monotonic() - killed < 30
    assert process.returncode == 1
    assert f"rank {rank} was ended by SIGKILL; --resume" in errors
    assert "Traceback" not in errors
    saved = final_state(tmp_path / "runs/digits")["step"]
    assert saved >= 20
    stop(start(tmp_path, "--resume"), beyond=saved)


@pytest.mark.parametrize(
    ("statuses", "first"),
    [
        ([1, -signal.SIGKILL], 1),  # 0 failed because 1 was gone
        ([-signal.SIGSEGV, 1], 0),
        ([None, 1], 1),  # 0 runs
        ([0, 1], 1),  # 0 had finished
    ],
)
def test_the_named_rank_is_the_one_that_failed_first(statuses: list[int | None], first: int) -> None:
    assert first_to_end(statuses) == first


def stop(process: subprocess.Popen[str], beyond: int) -> None:
    """Ask a job to stop after step `beyond`; it must save and exit with the status of SIGTERM."""
    try:
        wait_for_a_step(process, beyond)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    finally:
        end(process)
    assert process.returncode == 143


def listening(processes: list[psutil.Process]) -> list[str]:
    """The addresses on which TCP sockets of these processes listen."""
    sockets = [socket for process in processes for socket in process.net_connections("tcp")]
    return [socket.laddr.ip for socket in sockets if socket.status == psutil.CONN_LISTEN]


def test_a_job_listens_on_loopback_only_and_its_ranks_end_with_their_launcher(tmp_path: Path) -> None:
    process = start(tmp_path, "--tracking", "mlflow")
    try:
        wait_for_a_step(process)
        job = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        assert len(job) == 4  # launcher, two ranks and the follower
        addresses = listening(job)
        assert len(addresses) >= 2 and set(addresses) <= {"127.0.0.1", "::1"}  # gloo's
        process.kill()
        assert psutil.wait_procs(job[1:], timeout=60)[1] == []
    finally:
        end(process)
    assert final_state(tmp_path / "runs/digits")["step"] > 40  # they saved


def test_a_dead_rank_is_restarted_where_restarts_are_allowed(tmp_path: Path) -> None:
    process = start(tmp_path, "--max-restarts", 1)
    try:
        wait_for_a_step(process)
        first = final_state(tmp_path / "runs/digits")["step"]
        workers(process)[1].kill()
    except BaseException:
        end(process)
        raise
    stop(process, beyond=first + 40)
    points = [json.loads(line) for line in (tmp_path / "runs/digits/metrics.jsonl").read_text().splitlines()]
    logged = [point["step"] for point in points if "loss" in point]
    assert logged == sorted(set(logged))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--devices", 999), "--devices 999: there are"),
        (("--devices", 2, "--set", "train.batch_size=65"), "train.batch_size 65 cannot be shared evenly by 2 ranks"),
        (("--devices", 2, "--set", "train.stepz=65"), "train.stepz"),
        (
            ("--devices", 2, "--set", "train.epochs=1", "--set", "schedule.warmup=23"),
            "schedule.warmup 23 is not shorter",
        ),
        (("--devices", 2, "--set", "train.precision=float16", "--device", "cpu"), "float16 needs a CUDA device"),
        (("--devices", 2, "--set", "train.accumulate=5"), "does not divide the 32 images"),
    ],
)
def test_settings_that_ranks_cannot_share_are_refused_in_one_sentence(
    cli_process: Cli, tmp_path: Path, options: tuple[object, ...], message: str
) -> None:
    error = cli_process(*TRAIN, *options, status=1).stderr
    assert error.count("error: ") == 1 and message in error
    assert not (tmp_path / "runs").exists()
