"""Create runs in MLflow: parameters, tags, dataset, the experiment and the columns of its run list, system metrics."""

from __future__ import annotations

import json
import os
import tempfile
import zlib
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from convline.files import move_to_new_name
from convline.mlflow_client import database_file
from pipeline.recipe import flat
from pipeline.run import Run
from pipeline.tracking.deadline import EXTRA_SECONDS, time_limit
from pipeline.tracking.points import read_points

EXPERIMENT = "convline"
DIGEST_LENGTH = 8  # characters, as in the digests that MLflow computes itself
VIEW = "convline"  # name of the saved view of the run list, in the address that `make ui` prints
VIEW_COLUMNS = (
    "attributes.`Dataset`",
    "attributes.`Duration`",
    "params.`model.name`",
    "params.`train.steps`",
    "metrics.`precision_at_1`",
    "metrics.`train_precision_at_1`",
    "metrics.`training_seconds`",
    "metrics.`images_per_second`",
)


def create_database(uri: str) -> None:
    """Create the SQLite store at `uri`, if there is none, under a temporary name, and then link it into place.

    MLflow cannot use or repair a store whose creation was interrupted.
    """
    path = database_file(uri)
    if path is None or path.exists():
        return
    import mlflow

    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent) as folder:
        temporary_path = Path(folder, path.name)
        mlflow.MlflowClient(f"sqlite:///{temporary_path}").search_experiments()
        with suppress(FileExistsError):  # another training was faster
            move_to_new_name(temporary_path, path)


def find_run(client: Any, mlflow_run: str) -> Any:
    """The MLflow run with this id; None if there is none or it was deleted."""
    from mlflow.exceptions import MlflowException

    try:
        found = client.get_run(mlflow_run)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise
    return found if found.info.lifecycle_stage == "active" else None


def open_run(client: Any, run: Run, uri: str) -> str:
    """The id of the run's MLflow run at `uri`; it is created, with the recipe as its parameters, if there is none."""
    experiment = _experiment(client, os.environ.get("MLFLOW_EXPERIMENT_NAME", EXPERIMENT), uri)
    # searched first: the run may have been created by a request whose response was lost
    existing = client.search_runs([experiment], f"tags.`convline.run_id` = '{run.info['id']}'", max_results=1)
    tags = {
        "convline.run": run.name,
        "convline.run_id": run.info["id"],
        "network": run.recipe.model.name,
        "mlflow.note.content": f"`pipeline report {run.name}` writes report.html, which is listed under Artifacts.",
    }
    first = next(read_points(run.metrics), None)
    began = None if first is None else first.milliseconds
    mlflow_run = existing[0] if existing else client.create_run(experiment, began, tags, run.name)
    log_params(client, run, mlflow_run)
    client.log_inputs(mlflow_run.info.run_id, datasets=[_dataset(run)])
    return str(mlflow_run.info.run_id)


def log_params(client: Any, run: Run, mlflow_run: Any) -> None:
    """Log the recipe as parameters. MLflow does not allow to change a parameter: where a value differs from one logged
    before (more steps, for example), it is set as a tag with the parameter's name."""
    logged = mlflow_run.data.params
    params = flat(run.recipe.to_dict()) | {"dataset.fingerprint": run.info["dataset"]["fingerprint"]}
    if new := [_param(key, value) for key, value in params.items() if key not in logged]:
        client.log_batch(mlflow_run.info.run_id, params=new)
    for key, value in params.items():
        if key in logged and logged[key] != str(value) and mlflow_run.data.tags.get(key) != str(value):
            client.set_tag(mlflow_run.info.run_id, key, str(value))


def _experiment(client: Any, name: str, uri: str) -> str:
    """The experiment's id; it is created if it does not exist. For an SQLite store, artifacts are saved in mlartifacts/
    beside the database."""
    if (experiment := client.get_experiment_by_name(name)) is not None:
        for key, value in _experiment_tags().items():
            if key not in experiment.tags:
                client.set_experiment_tag(experiment.experiment_id, key, value)
        return str(experiment.experiment_id)
    database = database_file(uri)
    location = None if database is None else (database.parent / "mlartifacts").as_uri()
    return str(client.create_experiment(name, artifact_location=location, tags=_experiment_tags()))


def _experiment_tags() -> dict[str, str]:
    """Tags that make MLflow's pages show an experiment as one that trains models, and add the saved view VIEW (in
    MLflow's format of views that users share: compressed JSON)."""
    view = {"selectedColumns": VIEW_COLUMNS, "orderByKey": "metrics.`precision_at_1`", "orderByAsc": False}
    packed = b64encode(zlib.compress(json.dumps(view).encode())).decode()
    return {"mlflow.experimentKind": "custom_model_development", f"mlflow.sharedViewState.{VIEW}": f"deflate;{packed}"}


def _dataset(run: Run) -> Any:
    """What MLflow shows in its Dataset column."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    name, digest = (run.info["dataset"][key] for key in ("name", "fingerprint"))
    dataset = Dataset(name, digest[:DIGEST_LENGTH], source_type="local", source=json.dumps({"uri": name}))
    return DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])


def _param(key: str, value: object) -> Any:
    from mlflow.entities import Param

    return Param(key, str(value))


@contextmanager
def system_metrics(mlflow_run: str, uri: str) -> Iterator[None]:
    """Log CPU, memory, disk, network and GPU of this machine while in the block, every ten seconds."""
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    sampler = SystemMetricsMonitor(mlflow_run, resume_logging=True, tracking_uri=uri)
    sampler.start()
    try:
        yield
    finally:
        with suppress(TimeoutError), time_limit(EXTRA_SECONDS):
            sampler.finish()
