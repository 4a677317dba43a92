"""Runs in MLflow's store: made once, with their parameters and dataset, in an experiment that lists them with what they
are compared by."""

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
from pipeline.tracking.deadline import SLOW, time_limit
from pipeline.tracking.points import read_points

EXPERIMENT = "convline"
DIGEST = 8  # characters, as of those that MLflow makes itself
VIEW = "convline"  # how the runs are listed at first, in the address that `make ui` names
COLUMNS = (
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
    """A new SQLite store, made beside and linked into place: one that is torn while being made stays torn."""
    path = database_file(uri)
    if path is None or path.exists():
        return
    import mlflow

    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent) as folder:
        beside = Path(folder, path.name)
        mlflow.MlflowClient(f"sqlite:///{beside}").search_experiments()
        with suppress(FileExistsError):  # another training was faster
            move_to_new_name(beside, path)


def find(client: Any, mlflow_run: str) -> Any:
    """The MLflow run of this id; None where there is none."""
    from mlflow.exceptions import MlflowException

    try:
        found = client.get_run(mlflow_run)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise
    return found if found.info.lifecycle_stage == "active" else None


def open_run(client: Any, run: Run, uri: str) -> str:
    """The id of the run's MLflow run: of a new one, with the recipe as its parameters, if there is none at `uri`."""
    experiment = _experiment(client, os.environ.get("MLFLOW_EXPERIMENT_NAME", EXPERIMENT), uri)
    # an answer that was lost on its way must not make a second run
    made = client.search_runs([experiment], f"tags.`convline.run_id` = '{run.info['id']}'", max_results=1)
    tags = {
        "convline.run": run.name,
        "convline.run_id": run.info["id"],
        "network": run.recipe.model.name,
        "mlflow.note.content": f"`pipeline report {run.name}` makes report.html, which stands below Artifacts.",
    }
    first = next(read_points(run.metrics), None)
    began = None if first is None else first.milliseconds
    found = made[0] if made else client.create_run(experiment, began, tags, run.name)
    describe(client, run, found)
    client.log_inputs(found.info.run_id, datasets=[_dataset(run)])
    return str(found.info.run_id)


def describe(client: Any, run: Run, found: Any) -> None:
    """Give the MLflow run `found` the recipe as its parameters. Those can't be changed once they are there: where they
    are others by now (more steps, say) tags of the same names tell."""
    known = found.data.params
    told = flat(run.recipe.to_dict()) | {"dataset.fingerprint": run.info["dataset"]["fingerprint"]}
    if fresh := [_param(key, value) for key, value in told.items() if key not in known]:
        client.log_batch(found.info.run_id, params=fresh)
    for key, value in told.items():
        if key in known and known[key] != str(value) and found.data.tags.get(key) != str(value):
            client.set_tag(found.info.run_id, key, str(value))


def _experiment(client: Any, name: str, uri: str) -> str:
    """The experiment's id; in a store of our own its artifacts go to mlartifacts/ beside the database."""
    if (there := client.get_experiment_by_name(name)) is not None:
        for key, value in _experiment_tags().items():
            if key not in there.tags:
                client.set_experiment_tag(there.experiment_id, key, value)
        return str(there.experiment_id)
    database = database_file(uri)
    location = None if database is None else (database.parent / "mlartifacts").as_uri()
    return str(client.create_experiment(name, artifact_location=location, tags=_experiment_tags()))


def _experiment_tags() -> dict[str, str]:
    """Tags of an experiment by which MLflow's pages know that it trains models, and find the view `VIEW` (as they keep
    the ones that users share: compressed JSON)."""
    view = {"selectedColumns": COLUMNS, "orderByKey": "metrics.`precision_at_1`", "orderByAsc": False}
    packed = b64encode(zlib.compress(json.dumps(view).encode())).decode()
    return {"mlflow.experimentKind": "custom_model_development", f"mlflow.sharedViewState.{VIEW}": f"deflate;{packed}"}


def _dataset(run: Run) -> Any:
    """What MLflow shows in its column of datasets."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    name, digest = (run.info["dataset"][key] for key in ("name", "fingerprint"))
    dataset = Dataset(name, digest[:DIGEST], source_type="local", source=json.dumps({"uri": name}))
    return DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])


def _param(key: str, value: object) -> Any:
    from mlflow.entities import Param

    return Param(key, str(value))


@contextmanager
def system_metrics(mlflow_run: str, uri: str) -> Iterator[None]:
    """Sampled every ten seconds."""
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    sampler = SystemMetricsMonitor(mlflow_run, resume_logging=True, tracking_uri=uri)
    sampler.start()
    try:
        yield
    finally:
        with suppress(TimeoutError), time_limit(SLOW):
            sampler.finish()
