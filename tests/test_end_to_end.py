"""The main jobs as a user runs them, on real images."""

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Cli

pytestmark = pytest.mark.all


def precision(text: str) -> float:
    return float(text.rpartition("=")[2])


def train_mnist(cli: Cli, url: str, *options: object) -> None:
    cli("pipeline", "download", "mnist", "--mirror", url)
    cli("pipeline", "train", "simple-convnet", "--tracking", "none", *options)
    assert "parity passed" in cli("pipeline", "export").stdout


def test_mnist_from_a_mirror_to_a_table_of_predictions(
    cli: Cli, tmp_path: Path, test_data: Path, serve: Callable[..., str]
) -> None:
    train_mnist(cli, serve(test_data / "mnist"), "--steps", 1200, "--set", "model.hidden_size=64")
    figure = cli("pipeline", "evaluate", "--precision-at-1").stdout
    assert precision(figure) >= 0.95
    assert cli("pipeline", "evaluate", "--precision-at-1", "--onnx").stdout == figure
    cli("pipeline", "samples", "mnist", "--count", 200, "--output", "samples")
    model = "runs/simple-convnet/model.onnx"
    cli("serving", "classify", "samples", "--model", model, "--output", "out.csv")
    with (tmp_path / "out.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 200
    assert sum(row["path"].split("/")[0] == row["label"] for row in rows) >= 180


@pytest.mark.slow
def test_simple_convnet_reaches_the_published_neighbourhood(
    cli: Cli, test_data: Path, serve: Callable[..., str]
) -> None:
    """Published: 98.60%."""
    train_mnist(cli, serve(test_data / "mnist"))
    assert precision(cli("pipeline", "evaluate", "--precision-at-1").stdout) >= 0.975


def test_a_recipe_trains_on_a_users_own_images(cli: Cli, tmp_path: Path, samples: Path) -> None:
    """Folders of PNG files, made from digits: the way of somebody who brings photographs."""
    cli("pipeline", "preprocess", "own", "--source", samples)
    meta = json.loads((tmp_path / "data/own/meta.json").read_text())
    assert meta["image"]["channels"] == 1
    assert sum(meta["counts"]["test"].values()) == 20
    cli("pipeline", "train", "digits", "--dataset", "own", "--run", "try", "--steps", 100, "--tracking", "none")
    assert "parity passed" in cli("pipeline", "export", "try").stdout
    cli("serving", "classify", samples, "--model", "runs/try/model.onnx", "--output", "out.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert sum(row["path"].split("/")[0] == row["label"] for row in rows) >= 80
