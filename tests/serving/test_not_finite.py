"""Scores that are not finite give a reject, in the API, in jobs and on all kinds of workers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.helper import make_node, make_tensor_value_info
from PIL import Image
from typer.testing import CliRunner

from convline.inputs.input_file import InputFile, OnDisk
from serving import Classifier, ConvlineError, Prediction, Reject
from serving.classify import classify
from serving.cli import app
from serving.external_model import ExternalModel, ExternalPreprocessing
from serving.job import Job
from serving.predict import batch_predictor
from tests.serving.helpers import csv_rows, encode, json_lines, write

EXTERNAL = ExternalModel(("red", "green", "blue"), ExternalPreprocessing.parse(["scores=probabilities"]))
# exp(100 · 1) is infinite in float32, and inf / inf is NaN; exp(100 · 0.2) is not
BRIGHT, DIM = [(255, 0, 0), (0, 255, 0)], [(50, 30, 20), (20, 30, 50), (30, 50, 20)]
COLORS = [BRIGHT[0], DIM[0], DIM[1], BRIGHT[1], DIM[2], DIM[0], BRIGHT[0]]
LABELS = [None, "red", "blue", None, "green", "red", None]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A softmax written by hand, which does not subtract the maximum."""
    nodes = [
        make_node("GlobalAveragePool", ["x"], ["p"]),
        make_node("Flatten", ["p"], ["f"], axis=1),
        make_node("Mul", ["f", "hundred"], ["z"]),
        make_node("Exp", ["z"], ["e"]),
        make_node("ReduceSum", ["e", "axis"], ["sum"]),
        make_node("Div", ["e", "sum"], ["y"]),
    ]
    weights = [numpy_helper.from_array(np.float32(100), "hundred"), numpy_helper.from_array(np.array([1]), "axis")]
    images = make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 4, 4])
    graph = helper.make_graph(nodes, "g", [images], [make_tensor_value_info("y", TensorProto.FLOAT, ["n", 3])], weights)
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "model.onnx"
    )
    return tmp_path / "model.onnx"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number, color in enumerate(COLORS):
        write(tmp_path / f"in/{number}.png", encode(Image.new("RGB", (4, 4), color), "PNG"))
    return tmp_path / "in"


def labels(entries: list[Prediction | Reject]) -> list[str | None]:
    return [
        entry.labels[0] if isinstance(entry, Prediction) else {"not-finite": None}[entry.reason] for entry in entries
    ]


def strictly(text: str) -> Any:
    def refuse(constant: str) -> NoReturn:
        raise AssertionError(f"{constant} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


@pytest.mark.parametrize("batch_size", [2, 64])
def test_the_api_gives_rejects_in_their_places(path: Path, folder: Path, batch_size: int) -> None:
    with Classifier(path, "cpu", batch_size=batch_size, external=EXTERNAL) as served:
        assert labels(served.classify_files(sorted(folder.iterdir()))) == LABELS
        assert labels(served.classify_files(sorted(folder.iterdir()), top_k=3)) == LABELS


def test_arrays_of_scores_are_finite_or_an_error(path: Path) -> None:
    images = np.array(COLORS, np.uint8)[:, None, None].repeat(4, 1).repeat(4, 2)
    with Classifier(path, "cpu", batch_size=2, external=EXTERNAL) as served:
        with pytest.raises(ConvlineError, match=r"not finite for 3 images: 0, 3, 6$"):
            served.classify_arrays(images)
        with pytest.raises(ConvlineError, match=r"not finite for 20 images: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, …$"):
            served.classify_arrays(np.full((20, 4, 4, 3), 255, np.uint8))
        assert np.isfinite(served.classify_arrays(images[[1, 2]])).all()


@pytest.mark.parametrize("provider", ["cpu", "cuda"])
def test_processes_give_rejects_in_their_places(path: Path, folder: Path, provider: str) -> None:
    """Processes that run the model, and processes that decode for an accelerator (the CPU takes its place here)."""
    with Classifier(path, "cpu", threads=1, batch_size=2, external=EXTERNAL) as served:
        served.model = replace(served.model, provider=provider)
        files = [InputFile(file.name, OnDisk(str(file))) for file in sorted(folder.iterdir())]
        batches = [files[start : start + 2] for start in range(0, len(files), 2)]
        with batch_predictor(served, 1, processes=2) as predict:
            assert labels([entry for _, entries in predict(iter(batches)) for entry in entries]) == LABELS


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_a_job_has_them_among_its_rejects_only(path: Path, folder: Path, tmp_path: Path, ending: str) -> None:
    output, report, sorted_into = tmp_path / f"out.{ending}", tmp_path / "report.html", tmp_path / "sorted"
    job = Job([str(folder)], path, output, provider="cpu", external=EXTERNAL, report=report, sort_into=sorted_into)
    summary = classify(job)
    assert dict(summary.tally.reasons) == {"not-finite": 3} and summary.tally.classified == 4
    rows = csv_rows(output) if ending == "csv" else strictly(output.read_text())
    assert [row["path"] for row in rows] == ["1.png", "2.png", "4.png", "5.png"]
    rejects = json_lines(tmp_path / f"out.{ending}.rejects.jsonl")
    assert [(one["path"], one["reason"]) for one in rejects] == [(f"{n}.png", "not-finite") for n in (0, 3, 6)]
    assert sorted(str(file.relative_to(sorted_into)) for file in sorted_into.rglob("*.png")) == [
        "blue/2.png",
        "green/4.png",
        "red/1.png",
        "red/5.png",
    ]
    assert "not-finite" in report.read_text() and "nan" not in report.read_text().lower()


def test_strict_sees_them_and_standard_output_is_json(path: Path, folder: Path, tmp_path: Path) -> None:
    classes = write(tmp_path / "classes.txt", b"red\ngreen\nblue\n")
    options = ["--model", str(path), "--classes", str(classes), "--preprocess", "scores=probabilities", "--strict"]
    result = CliRunner().invoke(app, ["classify", str(folder), *options, "--json"])
    assert result.exit_code == 3
    assert [row["label"] for row in strictly(result.stdout)] == ["red", "blue", "green", "red"]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_logit_that_is_not_finite_is_enough(tmp_path: Path, value: float) -> None:
    """One class of bright images: the others' probabilities might still look like some."""
    zero, limit, odd = (
        make_node("Constant", [], [name], value=numpy_helper.from_array(np.float32(number), name))
        for name, number in (("zero", 0), ("limit", 0.9), ("odd", value))
    )
    nodes = [
        make_node("GlobalAveragePool", ["x"], ["p"]),
        make_node("Flatten", ["p"], ["f"], axis=1),
        make_node("Greater", ["f", "limit"], ["is bright"]),
        make_node("Where", ["is bright", "odd", "f"], ["z"]),
        make_node("Sub", ["z", "zero"], ["y"]),
    ]
    images = make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 4, 4])
    outputs = [make_tensor_value_info("y", TensorProto.FLOAT, ["n", 3])]
    graph = helper.make_graph([zero, limit, odd, *nodes], "g", [images], outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, tmp_path / "model.onnx")
    external = ExternalModel(("red", "green", "blue"), ExternalPreprocessing.parse(["scores=logits"]))
    with Classifier(tmp_path / "model.onnx", "cpu", external=external) as served:
        images = [Image.new("RGB", (4, 4), color) for color in COLORS]
        assert labels(served.classify(images)) == LABELS
