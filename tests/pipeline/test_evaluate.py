import json
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest

from pipeline.metrics import Evaluation, ranks
from tests.conftest import command, run_command

LOGITS = np.array([[3, 2, 1], [1, 3, 2], [1, 2, 3], [2, 3, 1]], np.float32)


def test_ranks_count_the_classes_with_larger_logits() -> None:
    assert ranks(LOGITS, np.array([0, 0, 0, 0])).tolist() == [0, 2, 2, 1]


def test_of_equal_logits_the_earlier_class_is_first() -> None:
    equal = np.zeros((3, 3), np.float32)
    assert ranks(equal, np.array([0, 1, 2])).tolist() == [0, 1, 2]


def test_a_row_with_nan_is_never_a_hit() -> None:
    logits = np.array([[np.nan, 0, 0], [9, np.nan, 0]], np.float32)
    evaluation = Evaluation(["a", "b", "c"])
    evaluation.add(logits, np.array([0, 0]))
    assert [evaluation.precision_at(k) for k in (1, 2, 3)] == [0, 0, 0]


def test_figures_equal_those_computed_by_hand() -> None:
    evaluation = Evaluation(["a", "b", "c"])
    evaluation.add(LOGITS[:2], np.array([0, 2]))  # a as a, c as b
    evaluation.add(LOGITS[2:], np.array([2, 0]))  # c as c, a as b
    report = evaluation.to_dict(top_k=2)
    assert report["count"] == 4
    assert report["precision_at_1"] == 0.5
    assert report["precision_at_2"] == 1.0
    assert report["confusion"] == [[1, 1, 0], [0, 0, 0], [0, 1, 1]]
    assert report["classes"]["a"] == {"count": 2, "precision": 1.0, "recall": 0.5}
    assert report["classes"]["b"] == {"count": 0, "precision": 0.0, "recall": None}


def evaluate(folder: Path, *options: object) -> dict[str, Any]:
    return json.loads(run_command(folder, "pipeline", "evaluate", "digits", "--json", *options).stdout)


def test_precision_at_1_is_printed_as_the_original_did(project: Path) -> None:
    line = run_command(project, "pipeline", "evaluate", "--precision-at-1").stdout
    assert line == f"precision @ 1 = {evaluate(project)['precision_at_1']:.3f}\n"
    assert float(line.split("=")[1]) >= 0.96


def test_the_exported_file_scores_as_the_checkpoint_does(project: Path) -> None:
    assert evaluate(project, "--onnx")["precision_at_1"] == evaluate(project)["precision_at_1"]
    assert evaluate(project, "--onnx")["confusion"] == evaluate(project)["confusion"]


def test_limit_takes_the_first_images(project: Path) -> None:
    labels = np.load(project / "data/digits/test.labels.npy")[:50]
    counts = [figures["count"] for figures in evaluate(project, "--limit", 50)["classes"].values()]
    assert counts == np.bincount(labels, minlength=10).tolist()


def test_another_split_and_raw_weights_are_evaluated(project: Path) -> None:
    train = evaluate(project, "--split", "train", "--weights", "raw")
    assert (train["count"], train["split"], train["weights"]) == (1438, "train", "raw")


def test_precision_at_k_increases_to_one(project: Path) -> None:
    report = evaluate(project, "--top-k", 10)
    figures = [report[f"precision_at_{k}"] for k in range(1, 11)]
    assert figures == sorted(figures)
    assert figures[-1] == 1.0


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--split", "validation"], "the validation split of digits is empty"),
        (["--top-k", "11"], "choose a smaller K"),
        (["--onnx", "--weights", "raw"], "averaged weights"),
        (["--device", "cuda:99"], "CUDA devices"),
        (["--device", "cuda:99", "--onnx"], "CUDA devices"),
    ],
)
def test_an_impossible_evaluation_is_explained(project: Path, options: list[str], sentence: str) -> None:
    assert sentence in run_command(project, "pipeline", "evaluate", "digits", *options, status=1).stderr


def test_an_unknown_run_is_refused_with_the_names_of_all_runs(project: Path) -> None:
    result = run_command(project, "pipeline", "evaluate", "cifar", status=1)
    assert "no run at runs/cifar" in result.stderr
    assert "digits" in result.stderr


def test_another_dataset_under_the_same_name_is_refused(own_project: Path) -> None:
    meta = own_project / "data/digits/meta.json"
    meta.write_text(meta.read_text().replace('"fingerprint": "', '"fingerprint": "0'))
    assert "fingerprint" in run_command(own_project, "pipeline", "evaluate", status=1).stderr


WATCH = ("pipeline", "evaluate", "digits", "--watch", "--interval", 0.1)


def watched(project: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (project / "runs/digits/watched.jsonl").read_text().splitlines()]


def test_watching_a_finished_run_evaluates_its_checkpoint_once(own_project: Path) -> None:
    output = run_command(own_project, *WATCH, "--tracking", "none").stdout
    expected = evaluate(own_project)["precision_at_1"]
    assert output == f"step 300: precision @ 1 = {expected:.3f}\n"
    assert [(point["step"], point["watched_precision_at_1"]) for point in watched(own_project)] == [(300, expected)]
    assert run_command(own_project, *WATCH, "--tracking", "none").stdout == ""
    raw = json.loads(run_command(own_project, *WATCH, "--tracking", "none", "--weights", "raw", "--json").stdout)
    assert raw["precision_at_1"] == watched(own_project)[-1]["watched_raw_precision_at_1"]


@pytest.mark.all
def test_a_training_is_watched_until_it_ends(tmp_path: Path) -> None:
    settings = ("--steps", 100000, "--set", "train.checkpoint_every=100", "--tracking", "none")
    training = subprocess.Popen(
        command("pipeline", "train", "digits", *settings), cwd=tmp_path, stderr=subprocess.DEVNULL
    )
    while not (tmp_path / "runs/digits/checkpoints/step-100.pt").exists():
        assert training.poll() is None
        time.sleep(0.1)
    training.send_signal(signal.SIGSTOP)  # so that the watcher gets enough of a single CPU
    watching = subprocess.Popen(command(*WATCH), cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    try:
        assert watching.stdout is not None
        first = [watching.stdout.readline()]
        training.send_signal(signal.SIGCONT)
        first += [watching.stdout.readline()]
        training.send_signal(signal.SIGTERM)
        training.wait(60)
        rest, _ = watching.communicate(timeout=120)
    finally:
        training.kill()
        watching.kill()
    assert training.returncode == 143
    assert watching.returncode == 0
    lines = [*first, *rest.splitlines()]
    steps = [int(line.split()[1].rstrip(":")) for line in lines]
    assert steps == sorted(set(steps)) == [point["step"] for point in watched(tmp_path)]
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    run = json.loads((tmp_path / "runs/digits/sync.json").read_text())["mlflow_run"]
    history = client.get_metric_history(run, "watched_precision_at_1")
    assert [(metric.step, metric.value) for metric in history] == [
        (point["step"], point["watched_precision_at_1"]) for point in watched(tmp_path)
    ]


def test_an_exported_file_cannot_be_watched(project: Path) -> None:
    assert "--watch" in run_command(project, *WATCH, "--onnx", status=2).stderr
