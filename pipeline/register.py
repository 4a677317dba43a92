"""`export --register`: add an exported file to MLflow's model registry; the alias `champion` marks the best version."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx

from convline.errors import ConvlineError
from convline.mlflow_client import explain_mlflow_errors, read_registered, tracking_uri
from pipeline.export import labels_path
from pipeline.run import Run
from pipeline.tracking.sender import Sender
from serving.model import OnnxModel, open_model, probe_images
from serving.model_file import PREFIX
from serving.session import OUTPUTS, UNFAMILIAR

CHAMPION = "champion"
SERVING_LIBRARIES = ("mlflow", "onnx", "onnxruntime", "numpy")


def register(path: Path, run: Run, name: str) -> str:
    """Log a published file, with signature and example, as a new version of `name`; returns a message about the result.

    The alias `champion` moves to the new version unless the champion's precision @ 1 is better, or was measured on
    another test split. Raises ConvlineError if MLflow is not installed or refuses the file, which stays published.
    """
    uri = tracking_uri()
    sender = Sender(run, uri)
    mlflow_run = sender.finish()
    model = open_model(path, "cpu")
    with explain_mlflow_errors(uri, f"did not register {path}, which is published, as {name}"):
        version = _log_version(model, path, labels_path(path, run), mlflow_run, name, uri)
        if read_registered(f"models:/{name}/{version}") != path.read_bytes():
            raise ConvlineError(f"version {version} of {name} differs from the file {path}: MLflow changed it")
        message = _update_champion(model, name, version, uri)
    sender.finish()  # logging set the status of the run to RUNNING
    return message


def _log_version(model: OnnxModel, path: Path, labels: Path, mlflow_run: str, name: str, uri: str) -> str:
    """Log the model; returns the new version's number. MLflow's server responds with scores alone, so class names are
    logged beside the model."""
    import mlflow
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    spec, classes = model.spec, list(model.classes)
    # without this signature, MLflow's server passes JSON as int64, which the model does not accept
    size = (-1, -1) if model.any_size else (spec.height, spec.width)
    images = TensorSpec(np.dtype("uint8"), (-1, *size, spec.channels), "image")
    scores = [TensorSpec(np.dtype("float32"), (-1, len(classes)), output) for output in OUTPUTS]
    scores += [TensorSpec(np.dtype("float32"), (-1,), UNFAMILIAR)] if model.tells_unfamiliar else []
    mlflow.set_tracking_uri(uri)
    mlflow.set_registry_uri(uri)
    with mlflow.start_run(run_id=mlflow_run):
        logged = mlflow.onnx.log_model(
            onnx.load(path),
            name=name,
            signature=ModelSignature(Schema([images]), Schema(scores)),
            input_example={"image": probe_images(spec)[:1]},
            pip_requirements=[f"{library}=={_version(library)}" for library in SERVING_LIBRARIES],
            onnx_execution_providers=["CPUExecutionProvider"],  # the provider that parity was proven on
            save_as_external_data=False,
            metadata={"classes": classes},
            extra_files=[str(labels.resolve())],
        )
    return str(mlflow.register_model(logged.model_uri, name, tags=_tags(model)).version)


def _tags(model: OnnxModel) -> dict[str, str]:
    """Tags of a version: the figures by which versions are compared, and the run it was exported from."""
    evaluation, parity = model.metadata["evaluation"], model.metadata["parity"]
    tags = {
        "precision_at_1": repr(evaluation["precision_at_1"]),
        "test_fingerprint": evaluation["fingerprint"],
        "precision": parity["precision"],
        "run": model.metadata["run"]["name"],
        "step": str(model.metadata["run"]["step"]),
        "sha256": model.sha256,
    }
    return {PREFIX + key: value for key, value in tags.items()}


def _update_champion(model: OnnxModel, name: str, version: str, uri: str) -> str:
    """Move the alias `champion` to the new version, unless the champion stays; returns the message for the user."""
    from mlflow import MlflowClient

    client = MlflowClient(uri, uri)
    evaluation = model.metadata["evaluation"]
    message = f"registered {name} version {version} (precision @ 1 {evaluation['precision_at_1']:.4f})"
    champion = client.get_registered_model(name).aliases.get(CHAMPION)
    if champion is not None:
        tags = client.get_model_version(name, champion).tags
        champion_precision = tags.get(PREFIX + "precision_at_1")
        if champion_precision is None or tags.get(PREFIX + "test_fingerprint") != evaluation["fingerprint"]:
            return f"{message}; {CHAMPION} stays version {champion}, which was not measured on this test split"
        if evaluation["precision_at_1"] < float(champion_precision):
            return f"{message}; {CHAMPION} stays version {champion} ({float(champion_precision):.4f})"
        message = f"{message}; {CHAMPION} was version {champion} ({float(champion_precision):.4f})"
    client.set_registered_model_alias(name, CHAMPION, version)
    return f"{message}; {CHAMPION} is version {version} now"


def _version(library: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(library)
    except PackageNotFoundError:
        return version(f"{library}-gpu")
