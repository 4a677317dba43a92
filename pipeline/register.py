"""A published file -> a version in MLflow's registry; the alias `champion` goes to the best."""

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

CHAMPION = "champion"
SERVING_LIBRARIES = ("mlflow", "onnx", "onnxruntime", "numpy")


def register(path: Path, run: Run, name: str) -> str:
    """Log a published file, with signature and example, as a new version of `name`; says what it did.

    The alias `champion` moves to it unless the champion's precision@1 on the same test split is better, or was measured
    on another one. Raises ConvlineError where MLflow is missing or does not take it; the file stays published.
    """
    uri = tracking_uri()
    sender = Sender(run, uri)
    mlflow_run = sender.finish()
    model = open_model(path, "cpu")
    with explain_mlflow_errors(uri, f"did not register {path}, which is published, as {name}"):
        version = _log(model, path, labels_path(path, run), mlflow_run, name, uri)
        if read_registered(f"models:/{name}/{version}") != path.read_bytes():
            raise ConvlineError(f"version {version} of {name} is not the file {path}: MLflow changed it")
        said = _crown(model, name, version, uri)
    sender.finish()  # logging took the run up again
    return said


def _log(model: OnnxModel, path: Path, labels: Path, mlflow_run: str, name: str, uri: str) -> str:
    """The new version's number. MLflow's server answers with scores alone: class names go beside the model."""
    import mlflow
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    spec, classes = model.spec, list(model.classes)
    # without it MLflow's server feeds JSON as int64, which the file refuses
    images = TensorSpec(np.dtype("uint8"), (-1, spec.height, spec.width, spec.channels), "image")
    scores = [TensorSpec(np.dtype("float32"), (-1, len(classes)), output) for output in ("probability", "logit")]
    mlflow.set_tracking_uri(uri)
    mlflow.set_registry_uri(uri)
    with mlflow.start_run(run_id=mlflow_run):
        logged = mlflow.onnx.log_model(
            onnx.load(path),
            name=name,
            signature=ModelSignature(Schema([images]), Schema(scores)),
            input_example={"image": probe_images(spec)[:1]},
            pip_requirements=[f"{library}=={_version(library)}" for library in SERVING_LIBRARIES],
            onnx_execution_providers=["CPUExecutionProvider"],  # what it was proven on
            save_as_external_data=False,
            metadata={"classes": classes},
            extra_files=[str(labels.resolve())],
        )
    return str(mlflow.register_model(logged.model_uri, name, tags=_tags(model)).version)


def _tags(model: OnnxModel) -> dict[str, str]:
    """What versions are compared by, and where they came from."""
    evaluation, parity = model.metadata["evaluation"], model.metadata["parity"]
    told = {
        "precision_at_1": repr(evaluation["precision_at_1"]),
        "test_fingerprint": evaluation["fingerprint"],
        "precision": parity["precision"],
        "run": model.metadata["run"]["name"],
        "step": str(model.metadata["run"]["step"]),
        "sha256": model.sha256,
    }
    return {PREFIX + key: value for key, value in told.items()}


def _crown(model: OnnxModel, name: str, version: str, uri: str) -> str:
    """Move the alias, or not."""
    from mlflow import MlflowClient

    client = MlflowClient(uri, uri)
    mine = model.metadata["evaluation"]
    done = f"registered {name} version {version} (precision @ 1 {mine['precision_at_1']:.4f})"
    holder = client.get_registered_model(name).aliases.get(CHAMPION)
    if holder is not None:
        tags = client.get_model_version(name, holder).tags
        theirs = tags.get(PREFIX + "precision_at_1")
        if theirs is None or tags.get(PREFIX + "test_fingerprint") != mine["fingerprint"]:
            return f"{done}; {CHAMPION} stays version {holder}, which was not measured on this test split"
        if mine["precision_at_1"] < float(theirs):
            return f"{done}; {CHAMPION} stays version {holder} ({float(theirs):.4f})"
        done = f"{done}; {CHAMPION} was version {holder} ({float(theirs):.4f})"
    client.set_registered_model_alias(name, CHAMPION, version)
    return f"{done}; {CHAMPION} is version {version} now"


def _version(library: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(library)
    except PackageNotFoundError:
        return version(f"{library}-gpu")
