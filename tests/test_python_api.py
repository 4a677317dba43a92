"""The Python API: `from convline import Classifier, train, evaluate, export`, used as a script or a notebook does."""

from __future__ import annotations

import inspect
import json
import os
import signal
import subprocess
import sys
import threading
import time
import tomllib
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import pytest

import convline
import pipeline.cli
from convline import Classifier, ConvlineError, ModelError, Prediction, Reject, TrainedRun, evaluate, export, train
from pipeline.recipe import find
from tests.conftest import ROOT
from tests.pipeline.helpers import image_folder

PUBLIC = [
    "Classifier",
    "ConvlineError",
    "ImageError",
    "ModelError",
    "Prediction",
    "Reject",
    "TrainedRun",
    "evaluate",
    "export",
    "preprocess",
    "train",
]


def test_the_public_names() -> None:
    assert sorted(convline.__all__) == PUBLIC == dir(convline)
    assert all(getattr(convline, name).__name__ == name for name in PUBLIC)
    with pytest.raises(AttributeError, match="no attribute 'tarin'"):
        _ = convline.tarin


def imported_by(code: str) -> set[str]:
    """Which heavy packages a new process has imported after running `code`."""
    code += "\nimport sys; print(*{'numpy', 'onnxruntime', 'torch', 'mlflow'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_a_name_imports_only_what_it_needs() -> None:
    assert imported_by("from convline import ConvlineError, evaluate, export, preprocess, train") == set()
    assert imported_by("from convline import Classifier") == {"numpy", "onnxruntime"}


@pytest.mark.parametrize("name", ["train", "evaluate", "export", "preprocess"])
def test_arguments_are_named_as_the_options_of_the_command_with_the_same_defaults(name: str) -> None:
    options = inspect.signature(getattr(pipeline.cli, name)).parameters
    arguments = inspect.signature(getattr(convline, name)).parameters
    in_python_only = {"data", "image_size", "set"} if name == "train" else set()
    assert set(arguments) - set(options) == in_python_only
    differ = {key for key in set(arguments) & set(options) if str(arguments[key].default) != str(options[key].default)}
    assert differ <= {"batch_size"}  # None is the stage's own default here


class Folders(TypedDict):
    data_dir: Path
    runs_dir: Path


def arrays_of_test(folders: Folders) -> tuple[np.ndarray, np.ndarray]:
    """The test images of digits and their labels, as they are stored."""
    digits = folders["data_dir"] / "digits"
    return np.load(digits / "test.images.npy"), np.load(digits / "test.labels.npy")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    home = tmp_path_factory.mktemp("home")
    return {"data_dir": home / "data", "runs_dir": home / "runs"}


@pytest.fixture(scope="module")
def run(folders: Folders) -> TrainedRun:
    """A short training of digits. Do not change it."""
    settings = {"train.batch_size": 64, "train.log_every": 20, "model": {"filters": 8}, "train.evaluate_every": None}
    return train("digits", run="few", steps=60, seed=3, set=settings, tracking="none", **folders)


def test_a_run_has_what_it_was_told(run: TrainedRun, folders: Folders) -> None:
    recipe = tomllib.loads((folders["runs_dir"] / "few/recipe.toml").read_text())
    assert (run.name, run.folder, run.classes) == ("few", folders["runs_dir"] / "few", list("0123456789"))
    assert (recipe["train"]["steps"], recipe["train"]["seed"], recipe["train"]["batch_size"]) == (60, 3, 64)
    assert (recipe["model"]["filters"], recipe["train"]["evaluate_every"]) == (8, 0)
    assert repr(run) == f"TrainedRun('{run.folder}')"


def test_metrics_are_rows_of_the_file_of_metrics(run: TrainedRun) -> None:
    rows = run.metrics()
    assert rows == [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [0, 20, 40, 59]


@pytest.fixture(scope="module")
def exported(run: TrainedRun, folders: Folders) -> Path:
    return export(run.name, tracking="none", **folders).path


@pytest.mark.usefixtures("exported")
def test_evaluate_counts_as_numpy_does(run: TrainedRun, folders: Folders) -> None:
    images, labels = arrays_of_test(folders)
    with run.classifier("cpu") as classifier:
        predicted = classifier.classify_arrays(images).argmax(1)
    for report in (run.evaluate(top_k=2), evaluate("few", onnx=True, top_k=2, **folders)):
        assert report["precision_at_1"] == pytest.approx(np.mean(predicted == labels), abs=1e-9)
        assert report["precision_at_1"] < report["precision_at_2"] <= 1
        recalls = [np.mean(predicted[labels == digit] == digit) for digit in range(10)]
        assert [report["classes"][name]["recall"] for name in run.classes] == pytest.approx(recalls)
    assert evaluate("few", "train", limit=100, weights="raw", **folders)["count"] == 100


def test_an_export_goes_where_it_is_told_with_its_proof(run: TrainedRun, tmp_path: Path) -> None:
    exported = run.export(tmp_path / "few.onnx", precision="fp16", tracking="none")
    assert exported.path == tmp_path / "few.onnx" and exported.report["precision"] == "fp16"
    assert exported.report == json.loads((tmp_path / "few.parity.json").read_text())
    assert "fp16" in exported.table()


def test_an_exported_file_classifies(exported: Path, folders: Folders) -> None:
    images, labels = arrays_of_test(folders)
    with Classifier(exported) as classifier:
        entries = classifier.classify([images[0, :, :, 0], b"no image"])
    assert isinstance(entries[0], Prediction) and entries[0].labels == (str(labels[0]),)
    assert isinstance(entries[1], Reject)


def test_without_a_name_the_run_trained_last_is_meant(run: TrainedRun, folders: Folders) -> None:
    newest = train("digits", run="newest", steps=1, tracking="none", **folders)
    assert TrainedRun.open(**folders).folder == newest.folder
    assert TrainedRun.open("few", **folders).metrics() == run.metrics()


def test_images_of_ones_own_are_prepared_first(tmp_path: Path) -> None:
    image_folder(tmp_path / "pets", {"cat": 10, "dog": 10}, size=(30, 40))
    folders = {"data_dir": tmp_path / "data", "runs_dir": tmp_path / "runs"}
    options: dict[str, Any] = {"steps": 1, "tracking": "none", **folders}

    def shape(name: str) -> list[int]:
        image = json.loads((tmp_path / f"data/{name}/meta.json").read_text())["image"]
        return [image["height"], image["width"]]

    with pytest.raises(ConvlineError, match="give the run a name: run='my-digits'"):
        train("digits", tmp_path / "pets", **options)
    run = train("digits", str(tmp_path / "pets"), run="pets", **options)
    assert run.classes == ["cat", "dog"] and shape("pets") == [8, 8]  # digits' own size
    wide = train("digits", tmp_path / "pets", run="wide", image_size=(12, 16), **options)
    assert shape("wide") == [12, 16] and wide.evaluate()["count"] == 4

    with pytest.raises(ConvlineError, match="resume=True goes on with it, overwrite=True replaces it"):
        train("digits", tmp_path / "pets", run="pets", **options)
    assert train("digits", tmp_path / "pets", run="pets", resume=True, **options).metrics() == run.metrics()
    train("digits", tmp_path / "pets", run="pets", image_size=10, overwrite=True, **options)
    assert shape("pets") == [10, 10]

    again = train("digits", "pets", run="again", **options)  # the prepared dataset, by its name
    assert again.classes == ["cat", "dog"] and not (tmp_path / "data/again").exists()
    own = tmp_path / "own.toml"
    own.write_text(find("digits").read_text().replace('"digits"', '"any"', 1) + "[augment]\nrandom_crop = true\n")
    cropped = train(own, tmp_path / "pets", run="cropped", set={"preprocess.crop": 14}, **options)
    assert shape("cropped") == [16, 16] and cropped.classes == ["cat", "dog"]

    (tmp_path / "runs/pets").rename(tmp_path / "runs/other")
    with pytest.raises(ConvlineError, match="data='pets' trains on it, overwrite=True prepares it again"):
        train("digits", tmp_path / "pets", run="pets", **options)
    with pytest.raises(ConvlineError, match="pets is a dataset"):
        train("digits", "pets", run="third", image_size=10, **options)


def test_ctrl_c_saves_and_raises_keyboard_interrupt(folders: Folders) -> None:
    metrics = folders["runs_dir"] / "interrupted/metrics.jsonl"

    def interrupt() -> None:
        until = time.monotonic() + 60
        while time.monotonic() < until and not (metrics.exists() and metrics.stat().st_size):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    constant = {"schedule.name": "constant"}  # with cosine's learning rates it could not go on to fewer steps
    options: dict[str, Any] = {"run": "interrupted", "tracking": "none", "set": constant, **folders}
    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        train("digits", steps=100_000, **options)
    thread.join()
    saved = (folders["runs_dir"] / "interrupted/checkpoints").glob("step-*.pt")
    step = max(int(path.stem.removeprefix("step-")) for path in saved)
    finished = train("digits", steps=step + 5, resume=True, **options)
    assert finished.metrics()[-1]["step"] == step + 5


@pytest.mark.usefixtures("run")
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda folders: train("digit", **folders), "did you mean digits"),
        (lambda folders: train("digits", set={"train.step": 5}, **folders), "train.step is not a known field"),
        (lambda folders: train("digits", run="few", **folders), "exists"),
        (lambda folders: train("digits", resume=True, overwrite=True, **folders), "give one of them"),
        (lambda folders: train("digits", tracking=False, **folders), "tracking=False: it is one of mlflow, none"),  # type: ignore[arg-type]
        (lambda folders: evaluate("fewer", **folders), "fewer"),
        (lambda folders: evaluate("few", "tset", **folders), "split='tset': it is one of train, validation, test"),  # type: ignore[arg-type]
        (lambda folders: export("few", precision="fp8", **folders), "precision='fp8': it is one of fp32, fp16, int8"),  # type: ignore[arg-type]
    ],
)
def test_what_the_commands_refuse_is_raised(folders: Folders, call: Any, message: str) -> None:
    with pytest.raises(ConvlineError, match=message):
        call(folders)


def test_a_run_without_an_exported_file_has_no_classifier(folders: Folders) -> None:
    run = train("digits", run="unexported", steps=1, tracking="none", **folders)
    with pytest.raises(ModelError, match="export the run first"):
        run.classifier()
