"""mistakes.csv: what a run gets wrong, in its folder and in MLflow."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import mlflow
import numpy as np
import pytest
from PIL import Image

from pipeline.dataset import Split
from pipeline.metrics import Evaluation
from pipeline.reporting.mistakes_table import MAX_ROWS, write_mistakes
from pipeline.reporting.predictions import SplitPredictions
from pipeline.run import Run
from serving import Classifier
from tests.conftest import run_command
from tests.pipeline.helpers import png, write_files

QUIET = ("--set", "train.evaluate_every=0", "--set", "data.validation=0", "--set", "train.batch_size=4")


def rows(folder: Path, run: str) -> list[dict[str, str]]:
    path = folder / f"runs/{run}/mistakes.csv"
    with path.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def noise(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on images of noise, which it gets wrong half of the time; some file names are hard to write as CSV."""
    folder = tmp_path_factory.mktemp("noise")
    odd = ['a,"b".png', "line\nend.png", "return\rhere.png", "Ünïcödé.png", *(f"{number}.png" for number in range(8))]
    names = [f"{split}/{label}/{name}" for split in ("train", "test") for label in ("cat", "dog, big") for name in odd]
    write_files(folder / "source", {name: png((8, 8), seed=seed) for seed, name in enumerate(names)})
    run_command(folder, "pipeline", "preprocess", "noise", "--source", "source")
    run_command(folder, "pipeline", "train", "digits", "--dataset", "noise", "--run", "noise", "--steps", 2, *QUIET)
    run_command(folder, "pipeline", "export", "noise")
    return folder


def expected_mistakes(folder: Path) -> list[tuple[str, str, str, float]]:
    """The wrong answers of the exported file for the source's own test images, the most confident first."""
    classifier = Classifier(folder / "runs/noise/model.onnx")
    wrong = []
    for path in (folder / "source/test").rglob("*.png"):
        name = str(path.relative_to(folder / "source"))
        (answer,) = classifier.classify([Image.open(path)])
        if answer.labels[0] != path.parent.name:
            wrong.append((name, path.parent.name, answer.labels[0], float(answer.probabilities[0])))
    return sorted(wrong, key=lambda row: -row[3])


def test_evaluation_and_report_write_the_mistakes_and_mlflow_has_them(noise: Path) -> None:
    expected = expected_mistakes(noise)
    assert len(expected) >= 4
    for command in ("evaluate", "report"):
        (noise / "runs/noise/mistakes.csv").unlink(missing_ok=True)
        report = run_command(noise, "pipeline", command, "noise", *(["--json"] if command == "evaluate" else []))
        written = rows(noise, "noise")
        assert sorted(row["path"] for row in written) == sorted(path for path, *_ in expected)
        by_path = {path: (truth, predicted, probability) for path, truth, predicted, probability in expected}
        for row in written:
            truth, predicted, probability = by_path[row["path"]]
            assert (row["truth"], row["predicted"]) == (truth, predicted)
            assert float(row["probability"]) == pytest.approx(probability, abs=2e-6)
        shown = [float(row["probability"]) for row in written]
        assert shown == sorted(shown, reverse=True)
        if command == "evaluate":
            assert "mistakes" not in json.loads(report.stdout)
    client = mlflow.MlflowClient(f"sqlite:///{noise / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("convline")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    downloaded = Path(client.download_artifacts(run.info.run_id, "mistakes.csv"))
    assert downloaded.read_bytes() == (noise / "runs/noise/mistakes.csv").read_bytes()


def test_other_images_and_parts_of_the_split_leave_the_table_as_it_was(noise: Path) -> None:
    table = noise / "runs/noise/mistakes.csv"
    table.write_text("as it was")
    run_command(noise, "pipeline", "evaluate", "noise", "--limit", 3)
    run_command(noise, "pipeline", "evaluate", "noise", "--split", "train")
    run_command(noise, "pipeline", "evaluate", "noise", "--weights", "raw")
    run_command(noise, "pipeline", "evaluate", "noise", "--images", noise / "source/test")
    assert table.read_text() == "as it was"


def test_without_paths_the_row_in_the_split_stands_for_the_image(own_project: Path) -> None:
    run_command(own_project, "pipeline", "evaluate", "digits", "--onnx")
    images, labels = (np.load(own_project / f"data/digits/test.{part}.npy") for part in ("images", "labels"))
    classifier = Classifier(own_project / "runs/digits/model.onnx")
    answers = [answer.labels[0] for answer in classifier.classify([image[..., 0] for image in images])]
    wrong = {row for row, answer in enumerate(answers) if answer != str(labels[row])}
    written = rows(own_project, "digits")
    assert wrong and {int(row["row"]) for row in written} == wrong
    assert all(row["predicted"] == answers[int(row["row"])] for row in written)
    assert list(written[0]) == ["row", "truth", "predicted", "probability"]


def test_only_the_most_confident_mistakes_are_written(own_project: Path) -> None:
    run = Run.open(own_project / "runs/digits")
    count = MAX_ROWS + 50
    confidence = np.linspace(0.2, 0.9, count, dtype=np.float32)
    labels = np.zeros(count, np.int64)
    split = Split("test", np.zeros((count, 1, 1, 1), np.uint8), labels, np.arange(count))
    predictions = SplitPredictions(split, Evaluation(run.classes), labels, labels + 1, confidence)
    write_mistakes(run, predictions, [f"{number}.png" for number in range(count)])
    written = rows(own_project, "digits")
    assert [row["path"] for row in written] == [f"{number}.png" for number in range(count - 1, 49, -1)]
    assert written[0] == {"path": f"{count - 1}.png", "truth": "0", "predicted": "1", "probability": "0.900000"}
