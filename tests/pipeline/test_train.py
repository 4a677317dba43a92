import os
import pty
import re
import signal
import subprocess
import sys
import tomllib
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

import models
from convline.errors import ConvlineError
from pipeline.checkpoint import load_newest, paths, step_of
from pipeline.recipe import load
from pipeline.run import Run, lock_run
from pipeline.train import train
from pipeline.training.progress_log import sparkline
from pipeline.training.threads import default_threads
from tests.conftest import ROOT, Cli, command, run_command
from tests.pipeline.helpers import refused
from tests.trainings import KILLABLE, TRAIN, assert_same_weights, final_state, points, start, wait_for_steps


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(cli: Cli, tmp_path: Path) -> None:
    for run, seed in (("a", 1), ("b", 1), ("c", 2)):
        cli(*TRAIN, "--run", run, "--steps", 20, "--seed", seed)
    runs = tmp_path / "runs"
    assert_same_weights(runs / "a", runs / "b")
    assert not torch.equal(final_state(runs / "a")["raw"]["fc2.weight"], final_state(runs / "c")["raw"]["fc2.weight"])


def test_a_run_holds_what_the_contract_names(project: Path) -> None:
    run = project / "runs/digits"
    assert tomllib.loads((run / "recipe.toml").read_text())["train"]["steps"] == 300
    state = final_state(run)
    assert {"format", "step", "raw", "averaged", "optimizer", "threads"} <= state.keys()
    assert [path.name for path in paths(run / "checkpoints")] == ["step-300.pt"]
    logged = points(run)
    assert [p["step"] for p in logged if "loss" in p] == [*range(0, 300, 10), 299]
    assert [p["step"] for p in logged if "precision_at_1" in p] == [0, 250, 300]
    first = next(p for p in logged if "loss" in p)
    assert first["loss"] == first["smoothed_loss"]
    assert {
        "time",
        "batch_accuracy",
        "learning_rate",
        "images_per_second",
        "seconds_per_batch",
        "elapsed",
    } <= first.keys()
    assert logged[-1].keys() >= {"training_seconds", "seconds_per_100_steps"}


def test_smoothed_loss_is_the_moving_average_of_every_step(cli: Cli, tmp_path: Path) -> None:
    cli(*TRAIN, "--steps", 30, "--set", "train.log_every=1")
    logged = [p for p in points(tmp_path / "runs/digits") if "loss" in p]
    smoothed = logged[0]["loss"]
    for point in logged:
        smoothed = 0.9 * smoothed + 0.1 * point["loss"]
        assert point["smoothed_loss"] == pytest.approx(smoothed, rel=1e-5)


def test_training_into_an_existing_run_needs_resume_or_overwrite(own_project: Path) -> None:
    before = {p: p.read_bytes() for p in (own_project / "runs").rglob("*") if p.is_file()}
    result = run_command(own_project, *TRAIN, status=1)
    assert "--resume" in result.stderr
    assert "--overwrite" in result.stderr
    both = run_command(own_project, *TRAIN, "--resume", "--overwrite", status=2)
    assert "contradict" in both.stderr
    assert before == {p: p.read_bytes() for p in (own_project / "runs").rglob("*") if p.is_file()}


def test_resuming_a_finished_run_does_nothing(own_project: Path) -> None:
    checkpoint = own_project / "runs/digits/checkpoints/step-300.pt"
    before = checkpoint.stat().st_mtime_ns
    assert "finished" in run_command(own_project, *TRAIN, "--steps", 300, "--resume").stderr
    run_command(own_project, *TRAIN, "--steps", 300, "--resume", "--set", "train.log_every=50")
    assert checkpoint.stat().st_mtime_ns == before


def test_resuming_another_recipe_names_what_differs(own_project: Path) -> None:
    result = run_command(
        own_project, *TRAIN, "--steps", 300, "--resume", "--set", "model.filters=8", "--seed", 5, status=1
    )
    assert "model.filters, train.seed" in result.stderr


SHORT = ("train.batch_size=16", "train.checkpoint_every=9", "train.evaluate_every=10", "schedule.name=exponential")
STAIRS = (*SHORT, "schedule.rate=0.5", "schedule.every=7")


def trained(project: Path, run: Path, steps: int, *settings: str, **options: Any) -> Path:
    """The folder of a run that is trained in this process."""
    recipe = load("digits", [*(settings or STAIRS), f"train.steps={steps}"])
    return train(recipe, run, project / "data", "cpu", tracking=False, **options).folder


def test_the_network_is_built_once_before_the_first_step(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[str] = []

    def counted(name: str, *arguments: Any, **options: Any) -> torch.nn.Module:
        built.append(name)
        return models.build(name, *arguments, **options)

    monkeypatch.setattr("pipeline.network.build", counted)
    trained(project, tmp_path / "run", 2)
    assert built == ["digits_convnet"]
    trained(project, tmp_path / "run", 4, resume=True)
    assert built == 2 * ["digits_convnet"]


def stopped(project: Path, run: Path, at: int, steps: int, *settings: str) -> None:
    """A run like one of `steps` steps that was killed after the checkpoint of step `at`."""
    trained(project, run, steps, *settings)
    for path in paths(run / "checkpoints"):
        if step_of(path) > at:
            path.unlink()


@pytest.mark.parametrize("before", [12, 30])
def test_a_run_continued_to_another_number_of_steps_equals_one_of_that_number(
    project: Path, tmp_path: Path, before: int
) -> None:
    if before == 12:
        trained(project, tmp_path / "resumed", before)  # finished, then continued
    else:
        stopped(project, tmp_path / "resumed", 18, before)  # now ends sooner
    resumed = trained(project, tmp_path / "resumed", 24, resume=True)
    assert_same_weights(resumed, trained(project, tmp_path / "whole", 24))
    assert tomllib.loads((resumed / "recipe.toml").read_text())["train"]["steps"] == 24
    logged = [point["step"] for point in points(resumed) if "loss" in point]
    assert logged == sorted(set(logged)) and logged[-1] == 23
    assert "training_seconds" in points(resumed)[-1]


def test_a_run_whose_learning_rates_depend_on_the_number_of_steps_keeps_that_number(
    project: Path, tmp_path: Path
) -> None:
    run, cosine = tmp_path / "run", (*SHORT[:3], "schedule.name=cosine")
    trained(project, run, 12, *cosine)
    with refused("12 steps", "24", "schedule 'cosine'", "--overwrite", unchanged=run):
        trained(project, run, 24, *cosine, resume=True)
    with refused("has trained 12 steps already", unchanged=run):
        trained(project, run, 11, *cosine, resume=True)
    # the learning rates of the warm-up do not depend on the number of steps
    warming_up = (*SHORT[:3], "schedule.name=linear", "schedule.warmup=10")
    stopped(project, tmp_path / "warming-up", 9, 12, *warming_up)
    resumed = trained(project, tmp_path / "warming-up", 20, *warming_up, resume=True)
    assert_same_weights(resumed, trained(project, tmp_path / "warmed-up", 20, *warming_up))


def test_a_resumed_training_keeps_its_number_of_threads_unless_threads_is_given(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = torch.get_num_threads()
    try:
        monkeypatch.setenv("OMP_NUM_THREADS", "2")
        run = trained(project, tmp_path / "run", 9)
        assert final_state(run)["threads"] == 2
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        assert final_state(trained(project, run, 12, resume=True))["threads"] == 2
        assert "--threads" not in capsys.readouterr().err
        assert final_state(trained(project, run, 15, resume=True, threads=1))["threads"] == 1
        assert "--threads 1: the checkpoint was trained with 2" in capsys.readouterr().err
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("variables", "spins"), [({}, "2000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "passive"}, "0")]
)
def test_idle_threads_spin_briefly_unless_the_user_sets_how_long(variables: dict[str, str], spins: str) -> None:
    """By what libgomp itself prints when it is loaded."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    load = "import ctypes, pathlib, importlib.util as u, pipeline; "
    load += "ctypes.CDLL(str(next(pathlib.Path(u.find_spec('torch').origin).parent.rglob('libgomp*.so*'))))"
    loaded = subprocess.run(
        [sys.executable, "-c", load],
        env={**inherited, **variables, "OMP_DISPLAY_ENV": "verbose"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"GOMP_SPINCOUNT = '{spins}'" in loaded.stderr


@pytest.mark.parametrize(
    ("environment", "ranks", "threads"),
    [
        ({}, 1, 8),
        ({}, 3, 2),
        ({}, 16, 1),
        ({"OMP_NUM_THREADS": "3"}, 1, 3),
        ({"OMP_NUM_THREADS": "3,2"}, 2, 3),
        ({"OMP_NUM_THREADS": "0"}, 1, 8),
        ({"OMP_NUM_THREADS": "many"}, 1, 8),
        ({"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "x"}, 2, 4),  # set by torchrun
        ({"OMP_NUM_THREADS": "2", "TORCHELASTIC_RUN_ID": "x"}, 2, 2),
        ({"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "x"}, 1, 1),  # torchrun does not set it for a single rank
        ({"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "x", "CONVLINE_MEETING_FILE": "y"}, 2, 1),  # --devices
    ],
)
def test_omp_num_threads_counts_where_the_user_has_set_it(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], ranks: int, threads: int
) -> None:
    monkeypatch.setattr("pipeline.training.threads.usable_cpus", lambda: 8)
    for name in ("OMP_NUM_THREADS", "TORCHELASTIC_RUN_ID", "CONVLINE_MEETING_FILE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert default_threads(ranks) == threads


def test_resuming_on_another_dataset_is_refused(own_project: Path) -> None:
    meta = own_project / "data/digits/meta.json"
    meta.write_text(meta.read_text().replace('"fingerprint": "', '"fingerprint": "0'))
    result = run_command(own_project, *TRAIN, "--steps", 300, "--resume", status=1)
    assert "the dataset's fingerprint" in result.stderr


def test_resume_without_a_run_starts_at_step_0(cli: Cli, tmp_path: Path) -> None:
    cli(*TRAIN, "--steps", 5, "--resume")
    assert points(tmp_path / "runs/digits")[0]["step"] == 0


def test_overwrite_replaces_the_run(own_project: Path) -> None:
    run_command(own_project, *TRAIN, "--steps", 5, "--overwrite")
    assert not (own_project / "runs/digits/model.onnx").exists()
    assert final_state(own_project / "runs/digits")["step"] == 5


@pytest.mark.parametrize(
    ("file", "old", "new", "problem"),
    [
        ("recipe.toml", "[train]", "[train", "is damaged"),
        ("recipe.toml", "[train]", "[train]\nof_a_newer_version = 1", "train.of_a_newer_version is not a known field"),
        ("run.json", "{", "", "is damaged"),
    ],
)
def test_overwrite_replaces_a_run_that_cannot_be_read(
    own_project: Path, file: str, old: str, new: str, problem: str
) -> None:
    path = own_project / "runs/digits" / file
    path.write_text(path.read_text().replace(old, new, 1))
    assert problem in run_command(own_project, *TRAIN, "--steps", 5, "--resume", status=1).stderr
    run_command(own_project, *TRAIN, "--steps", 5, "--overwrite")
    assert final_state(own_project / "runs/digits")["step"] == 5


@pytest.mark.all
def test_two_trainings_into_one_run_are_refused(tmp_path: Path, cli: Cli) -> None:
    process = start(tmp_path)
    try:
        wait_for_steps(process, 10)
        process.send_signal(signal.SIGSTOP)  # otherwise it might end before the others start
        assert "being trained by another process" in cli(*TRAIN, *KILLABLE, "--resume", status=1).stderr
        assert "being trained by another process" in cli(*TRAIN, *KILLABLE, "--overwrite", status=1).stderr
    finally:
        process.kill()
        process.communicate()


def test_a_loss_that_diverges_stops_the_run_and_keeps_the_checkpoint(cli: Cli, tmp_path: Path) -> None:
    settings = ["optimizer.name=sgd", "optimizer.learning_rate=1e18", "train.checkpoint_every=1", "train.log_every=50"]
    result = cli(*TRAIN, *(a for s in settings for a in ("--set", s)), status=1)
    assert "stopped being finite at step" in result.stderr
    state = final_state(tmp_path / "runs/digits")
    assert all(value.isfinite().all() for part in ("raw", "averaged") for value in state[part].values())


def test_a_network_that_does_not_accept_the_images_is_refused_before_anything_is_written(
    cli: Cli, tmp_path: Path
) -> None:
    result = cli("pipeline", "train", "simple-convnet", "--dataset", "digits", "--set", "model.filter_size=9", status=1)
    assert "8x8x1" in result.stderr
    assert "9x9" in result.stderr
    assert not (tmp_path / "runs").exists()


def test_a_batch_larger_than_an_independent_draw_is_refused(cli: Cli) -> None:
    settings = ("--set", "data.sampling=independent", "--set", "train.batch_size=5000")
    assert "exceeds the 1438 training images" in cli(*TRAIN, *settings, status=1).stderr


def test_a_dataset_without_a_source_is_explained(cli: Cli) -> None:
    assert "--source" in cli(*TRAIN, "--dataset", "pets", status=1).stderr


@pytest.mark.parametrize("device", ["cpu:0", "meta", "mps", "gpu", "cuda:99"])
def test_an_unknown_or_missing_device_is_refused(cli: Cli, tmp_path: Path, device: str) -> None:
    assert f"--device {device}" in cli(*TRAIN, "--device", device, status=1).stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("options", [("--steps", 1), ("--steps", 10, "--set", "train.checkpoint_every=1")])
def test_an_update_that_overflows_is_never_saved(cli: Cli, tmp_path: Path, options: tuple[object, ...]) -> None:
    huge = ("--set", "optimizer.name=sgd", "--set", "optimizer.learning_rate=1e38")
    assert "stopped being finite" in cli(*TRAIN, *huge, *options, status=1).stderr
    assert load_newest(tmp_path / "runs/digits/checkpoints") is None


@pytest.mark.parametrize(
    "setting", ["model.filters=0", "model.filters=-1", "optimizer.nesterov=true", "train.seed=99999999999999999999"]
)
def test_values_that_no_network_or_optimiser_accepts_are_refused_before_anything_is_written(
    cli: Cli, tmp_path: Path, setting: str
) -> None:
    sgd = ("--set", "optimizer.name=sgd") if "nesterov" in setting else ()
    result = cli(*TRAIN, *sgd, "--set", setting, status=1)
    assert "unexpected error" not in result.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", ["../escaped", "/tmp/escaped", "", "a/b", "x.onnx", "-x"])
def test_a_run_name_must_be_a_plain_folder_name(cli: Cli, tmp_path: Path, name: str) -> None:
    assert "invalid run name" in cli(*TRAIN, f"--run={name}", status=1).stderr
    assert not list(tmp_path.glob("**/run.json"))


@pytest.mark.all
def test_preparing_a_dataset_again_does_not_affect_a_running_training(tmp_path: Path, cli: Cli, samples: Path) -> None:
    """The splits are opened once: the memory maps keep the files with which the training started."""
    cli("pipeline", "preprocess", "digits")
    process = start(tmp_path)
    wait_for_steps(process, 10)
    cli("pipeline", "preprocess", "digits", "--source", samples, "--image-size", 12, "--overwrite")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors


def test_steps_since_a_truncated_checkpoint_are_trained_again(own_project: Path) -> None:
    last = own_project / "runs/digits/checkpoints/step-300.pt"
    os.truncate(last, last.stat().st_size // 2)
    run_command(own_project, *TRAIN, "--steps", 300, "--resume")
    assert final_state(own_project / "runs/digits")["step"] == 300


def test_a_training_by_winograds_algorithm_resumes_to_the_same_weights(cli: Cli, tmp_path: Path) -> None:
    settings = ("--set", "model.name=cifar10", "--set", "train.checkpoint_every=3", "--steps", 6)
    for name in ("whole", "resumed"):
        cli(*TRAIN, *settings, "--run", name)
    (tmp_path / "runs/resumed/checkpoints/step-6.pt").unlink()
    cli(*TRAIN, *settings, "--run", "resumed", "--resume")
    assert_same_weights(tmp_path / "runs/whole", tmp_path / "runs/resumed")


def test_data_beyond_the_memory_limit_is_streamed_to_the_same_weights(cli: Cli, tmp_path: Path) -> None:
    held = cli(*TRAIN, "--run", "held", "--steps", 60, "--set", "augment.flip=true")
    streamed = cli(*TRAIN, "--run", "streamed", "--steps", 60, "--set", "augment.flip=true", "--memory-limit", 1000)
    assert "held on cpu" in held.stderr
    assert "streamed from disk" in streamed.stderr
    assert_same_weights(tmp_path / "runs/held", tmp_path / "runs/streamed")


def test_bfloat16_trains_weights_that_stay_float32(cli: Cli, tmp_path: Path) -> None:
    cli(*TRAIN, "--steps", 200, "--set", "train.precision=bfloat16")
    state = final_state(tmp_path / "runs/digits")
    assert {value.dtype for part in ("raw", "averaged") for value in state[part].values()} == {torch.float32}
    logged = [point for point in points(tmp_path / "runs/digits") if "loss" in point]
    assert logged[-1]["smoothed_loss"] < 0.5 * logged[0]["loss"]
    assert all(point["gradient_norm"] > 0 for point in logged)


@pytest.mark.slow
def test_a_compiled_network_trains_as_the_eager_one_does(cli: Cli, tmp_path: Path) -> None:
    settings = ("--set", "model.name=cifar10", "--set", "train.log_every=1", "--steps", 10)
    losses = {}
    for compiled in ("false", "true"):
        cli(*TRAIN, *settings, "--run", compiled, "--set", f"train.compile={compiled}")
        losses[compiled] = [point["loss"] for point in points(tmp_path / "runs" / compiled) if "loss" in point]
    assert losses["true"] == pytest.approx(losses["false"], rel=1e-4)


@pytest.mark.slow
def test_memory_stays_bounded_on_cifar10(cli: Cli, tmp_path: Path, test_data: Path) -> None:
    """The training sees all images and evaluates the whole test split. Most of the memory is torch itself."""
    cli("pipeline", "preprocess", "cifar10-jpg", "--source", test_data / "cifar10-jpg.tar.gz")
    settings = ("--dataset", "cifar10-jpg", "--steps", 450, "--set", "train.evaluate_every=150")
    training = command("pipeline", "train", "cifar10", *settings, "--tracking", "none")
    # started by a small process: a new one's maximum begins at the memory of the process that starts it
    small = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""
    kilobytes = subprocess.check_output([sys.executable, "-c", small, *training], cwd=tmp_path)
    assert int(kilobytes) * 1024 < 1.2e9


@pytest.mark.all
def test_a_terminal_shows_the_loss_as_it_falls(tmp_path: Path) -> None:
    leader, follower = pty.openpty()
    arguments = command("pipeline", "train", "digits", "--steps", 300, "--tracking", "none")
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100", "PYTHONIOENCODING": "utf-8"}
    with subprocess.Popen(arguments, cwd=tmp_path, stdout=subprocess.PIPE, stderr=follower, env=environment) as process:
        os.close(follower)
        shown = b""
        with suppress(OSError):  # how Linux reports that the last process has closed the terminal
            while data := os.read(leader, 4096):
                shown += data
        os.close(leader)
    output = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.decode())
    assert process.returncode == 0 and "300/300 steps" in output and "images/s" in output
    assert re.search("loss [▁▂▃▄▅▆▇█]{20,30} [0-9.e-]+ · [0-9,]+ images/s · test 0.9", output)


def test_a_sparkline_has_one_bar_per_value() -> None:
    assert (sparkline([7.0]), sparkline([0, 1, 7]), sparkline([1, float("nan")])) == ("▁", "▁▂█", "")


def test_a_link_in_place_of_a_runs_lock_is_refused(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_bytes(b"precious")
    run = Run(tmp_path, {}, load("digits"))
    for name, held in (("lock", lock_run(run.folder)), ("sync.lock", run.sending())):
        (tmp_path / name).symlink_to(precious)
        with pytest.raises(ConvlineError, match=rf"{name} is a link, .*; remove it"), held:
            pass
    assert precious.read_bytes() == b"precious"
