"""Versions in a real MLflow registry: the alias `champion`, serving from the registry, and MLflow's own server."""

import json
from collections.abc import Callable
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch

from convline.errors import ModelError
from convline.mlflow_client import read_registered
from serving.model import open_model
from tests.conftest import run_command
from tests.serving.helpers import csv_rows
from tests.tracking_server import Server, free_port, scoring_server

Register = Callable[..., str]


@pytest.fixture
def register(own_project: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> Register:
    """`register(bias)` adds `bias` to the averaged weights and returns the output of `export --register digits`."""
    server.start()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)

    def call(bias: float = 0.0, *options: str) -> str:
        path = own_project / "runs/digits/checkpoints/step-300.pt"
        state = torch.load(path, weights_only=True)
        state["averaged"]["fc2.bias"][3] += bias
        torch.save(state, path)
        return run_command(own_project, "pipeline", "export", "digits", "--register", "digits", *options).stdout

    return call


def champion(uri: str) -> str:
    return mlflow.MlflowClient(uri, uri).get_model_version_by_alias("digits", "champion").version


@pytest.mark.all
def test_the_champion_is_the_best_and_serves(
    own_project: Path, server: Server, samples: Path, register: Register
) -> None:
    first = register()
    published = (own_project / "runs/digits/model.onnx").read_bytes()
    assert "registered digits version 1" in first and "champion is version 1 now" in first
    worse = register(bias=20.0)  # nearly all are predicted as 3
    assert "registered digits version 2" in worse and "champion stays version 1" in worse
    assert champion(server.uri) == "1"
    assert read_registered("models:/digits@champion") == published
    equal = register(bias=-20.0)
    assert "champion was version 1" in equal and "champion is version 3 now" in equal
    client = mlflow.MlflowClient(server.uri, server.uri)
    version = client.get_model_version("digits", "3")
    assert (
        float(version.tags["convline.precision_at_1"])
        == open_model("models:/digits/3").metadata["evaluation"]["precision_at_1"]
    )
    run = client.get_run(version.run_id)
    assert run.info.status == "FINISHED" and run.data.tags["convline.run"] == "digits"
    assert run.data.metrics["parity.probability_difference.largest"] <= 1e-5

    for name, other in (("models:/digits@champion", "1"), ("models:/digits/2", "2")):
        run_command(own_project, "serving", "classify", samples, "--model", name, "--output", f"{other}.csv")
    run_command(
        own_project, "serving", "classify", samples, "--model", "runs/digits/model.onnx", "--output", "file.csv"
    )
    from_file, from_champion, from_worse = (csv_rows(own_project / f"{name}.csv") for name in ("file", "1", "2"))
    assert from_champion == from_file
    assert sum(row["label"] == "3" for row in from_worse) > 50

    with pytest.raises(ModelError, match=r"did not give models:/digits/9"):
        open_model("models:/digits/9")
    with pytest.raises(ModelError, match=r"did not give models:/digits@challenger"):
        open_model("models:/digits@challenger")
    # models are registered where they are tracked, whatever registry other programs use
    elsewhere = f"sqlite:///{own_project}/elsewhere.db"
    command = ("serving", "inspect", "models:/digits@champion")
    assert "digits" in run_command(own_project, *command, MLFLOW_REGISTRY_URI=elsewhere).stdout
    names = [str(digit) for digit in range(10)]
    assert mlflow.models.get_model_info("models:/digits@champion").metadata["classes"] == names
    folder = Path(mlflow.artifacts.download_artifacts("models:/digits@champion", dst_path=str(own_project / "served")))
    assert [json.loads(path.read_text()) for path in folder.rglob("labels.json")] == [names]
    check_mlflows_own_server(own_project, server.uri)


def check_mlflows_own_server(project: Path, uri: str) -> None:
    images = np.load(project / "data/digits/test.images.npy")[:37]
    with scoring_server(project, "models:/digits@champion", uri) as score:
        answer = score(images)
    probability, logit = open_model(project / "runs/digits/model.onnx").run(images)
    np.testing.assert_allclose(answer["probability"], probability, atol=1e-6)
    np.testing.assert_allclose(answer["logit"], logit, atol=1e-6)


@pytest.mark.all
def test_a_champion_measured_on_another_test_split_stays(server: Server, register: Register) -> None:
    register()
    client = mlflow.MlflowClient(server.uri, server.uri)
    client.set_model_version_tag("digits", "1", "convline.test_fingerprint", "another")
    assert "champion stays version 1, which was not measured on this test split" in register()
    client.delete_registered_model_alias("digits", "champion")
    assert "champion is version 3 now" in register(0.0, "--precision", "int8")
    assert client.get_model_version("digits", "3").tags["convline.precision"] == "int8"


def test_a_registry_that_does_not_answer_leaves_the_file_published(own_project: Path) -> None:
    (own_project / "runs/digits/model.onnx").unlink()
    uri = f"http://127.0.0.1:{free_port()}"
    result = run_command(own_project, "pipeline", "export", "--register", "digits", status=1, MLFLOW_TRACKING_URI=uri)
    assert f"MLflow at {uri} did not take the run" in result.stderr
    assert open_model(own_project / "runs/digits/model.onnx")


def test_an_invalid_name_is_refused_before_the_export(own_project: Path) -> None:
    before = (own_project / "runs/digits/model.onnx").stat().st_mtime_ns
    error = run_command(own_project, "pipeline", "export", "--register", "a/b@c", status=1).stderr
    assert "invalid model name" in error
    assert (own_project / "runs/digits/model.onnx").stat().st_mtime_ns == before


def test_without_a_store_the_error_names_where_it_was_expected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(ModelError, match=r"no MLflow store at .*mlflow\.db, so models:.* cannot be found; set"):
        open_model("models:/digits@champion")
    assert not list(tmp_path.iterdir())


@pytest.mark.all
def test_a_file_for_any_size_is_registered_as_such(
    server: Server, register: Register, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "registered digits version 1" in register(0.0, "--any-size")
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", server.uri)
    signature = mlflow.models.get_model_info("models:/digits/1").signature
    assert signature is not None and signature.inputs.inputs[0].shape == (-1, -1, -1, 1)
    loaded = mlflow.onnx.load_model("models:/digits/1")
    assert loaded.graph.input[0].type.tensor_type.shape.dim[1].dim_param == "height"
