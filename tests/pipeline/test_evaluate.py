import json
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
from PIL import Image
from scipy.stats import binomtest

from pipeline.metrics import Evaluation, ranks, wilson_interval
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


@pytest.mark.parametrize(("hits", "count"), [(0, 1), (1, 1), (0, 10), (10, 10), (3, 7), (497, 500), (8118, 10_000)])
def test_the_95_percent_interval_is_wilsons(hits: int, count: int) -> None:
    expected = binomtest(hits, count).proportion_ci(0.95, "wilson")
    assert wilson_interval(hits, count) == pytest.approx((expected.low, expected.high), abs=1e-6)


def test_nothing_is_known_where_nothing_was_looked_at() -> None:
    assert wilson_interval(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize("share", [0.02, 0.5, 0.9, 0.994])
@pytest.mark.parametrize("count", [50, 500])
def test_intervals_hold_the_true_share_in_95_of_100_samples(share: float, count: int) -> None:
    hits = np.random.default_rng(0).binomial(count, share, 20_000)
    intervals = np.array([wilson_interval(number, count) for number in range(count + 1)])[hits]
    held = ((intervals[:, 0] <= share) & (share <= intervals[:, 1])).mean()
    assert 0.91 < held < 0.99  # with few images only a few shares can occur, so that it is not exactly 0.95


def test_every_figure_has_its_interval() -> None:
    evaluation = Evaluation(["a", "b", "c"])
    evaluation.add(LOGITS[:2], np.array([0, 2]))
    evaluation.add(LOGITS[2:], np.array([2, 0]))
    intervals = evaluation.to_dict(top_k=2)["intervals"]
    assert intervals["precision_at_1"] == wilson_interval(2, 4) and intervals["precision_at_2"] == wilson_interval(4, 4)
    assert intervals["classes"]["a"] == {"precision": wilson_interval(1, 1), "recall": wilson_interval(1, 2)}
    assert intervals["classes"]["b"] == {"precision": wilson_interval(0, 2), "recall": (0.0, 1.0)}
    assert evaluation.hits.tolist() == [True, False, True, False]


def evaluate(folder: Path, *options: object) -> dict[str, Any]:
    return json.loads(run_command(folder, "pipeline", "evaluate", "digits", "--json", *options).stdout)


def test_precision_at_1_is_printed_as_the_original_did(project: Path) -> None:
    line = run_command(project, "pipeline", "evaluate", "--precision-at-1").stdout
    assert line == f"precision @ 1 = {evaluate(project)['precision_at_1']:.3f}\n"
    assert float(line.split("=")[1]) >= 0.96


def test_the_table_shows_intervals(project: Path) -> None:
    lines = run_command(project, "pipeline", "evaluate").stdout.splitlines()
    report = evaluate(project)
    lowest, highest = report["intervals"]["precision_at_1"]
    assert lines[1] == f"precision @ 1 = {report['precision_at_1']:.3f}"
    assert lines[2] == f"95% interval of precision @ 1: {lowest:.3f} to {highest:.3f} (359 images)"
    recall, (low, high) = report["classes"]["7"]["recall"], report["intervals"]["classes"]["7"]["recall"]
    assert lines[4 + 7].startswith("7 ") and lines[4 + 7].endswith(f"{recall:.3f} {low:.3f} to {high:.3f}")


@pytest.fixture(scope="module")
def digit_files(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The test images as <class>/<number>.png, in a folder mine/."""
    folder = tmp_path_factory.mktemp("files") / "mine"
    images, labels = (np.load(project / f"data/digits/test.{part}.npy") for part in ("images", "labels"))
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        path = folder / f"some/{label}/{number:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[..., 0]).save(path)
    return folder


def test_any_labelled_folder_is_evaluated_as_a_split_is(project: Path, digit_files: Path) -> None:
    expected, report = evaluate(project), evaluate(project, "--images", digit_files)
    assert report["split"] == str(digit_files)
    for key in ("count", "precision_at_1", "confusion", "intervals"):
        assert report[key] == expected[key]
    archive = shutil.make_archive(str(digit_files), "zip", digit_files)
    onnx = evaluate(project, "--images", archive, "--onnx", "--limit", 100)
    assert onnx["count"] == 100
    alone = evaluate(project, "--images", digit_files / "some/7")
    assert alone["count"] == expected["classes"]["7"]["count"]
    # evaluation.json keeps what it says about the test split
    assert json.loads((project / "runs/digits/evaluation.json").read_text())["split"] == "test"


def test_a_folder_with_another_class_is_refused(project: Path, tmp_path: Path, digit_files: Path) -> None:
    shutil.copytree(digit_files, tmp_path / "mine")
    shutil.copytree(digit_files / "some/3", tmp_path / "mine/some/three")
    error = run_command(project, "pipeline", "evaluate", "--images", tmp_path / "mine", status=1).stderr
    assert (
        "in no folder that is named like a class, such as some/three/" in error and "the classes are 0, 1, 2" in error
    )
    (tmp_path / "empty").mkdir()
    error = run_command(project, "pipeline", "evaluate", "--images", tmp_path / "empty", status=1).stderr
    assert "holds no images; expected <class>/<image>" in error


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
