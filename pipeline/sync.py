"""metrics.jsonl -> MLflow: sends what the server lacks, as often as it is asked to."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from pipeline.engine.run import Run
from pipeline.recipe import flat
from serving.errors import ConvlineError
from serving.files import atomic_write, sha256

INTERVAL = 2.0  # seconds between two looks at the file
POINTS = 100  # in one request, which takes 1,000 values at most
EXPERIMENT = "convline"
ARTIFACTS = ("recipe.toml", "run.json", "evaluation.json", "parity.json", "model.onnx")

# a server that is down or frozen must fail a request soon, not after MLflow's own twelve minutes
PATIENCE = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "10", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}


@dataclass
class Cursor:
    """How far a run has been sent to the server at `uri`: everything before `step`, and `points` of it."""

    uri: str
    mlflow_run: str
    step: int = -1
    points: int = 0
    artifacts: dict[str, str] = field(default_factory=dict)

    def is_new(self, step: int, nth: int) -> bool:
        """Whether the `nth` point of `step` (from 0) has not been sent."""
        return step > self.step or (step == self.step and nth >= self.points)


@dataclass(frozen=True)
class Point:
    """A line of metrics.jsonl, the `nth` (from 0) of its step."""

    step: int
    nth: int
    milliseconds: int
    values: dict[str, float]


def tracking_uri() -> str:
    """MLFLOW_TRACKING_URI, or mlflow.db in this folder."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path('mlflow.db').resolve()}"


def sync(run: Run, follow: bool = False) -> str:
    """Send what MLflow lacks of a run; with `follow`, go on until its training has ended.

    Returns the MLflow run's id. Raises ConvlineError where MLflow is missing or the server does not answer.
    """
    try:
        import mlflow
    except ImportError as error:
        raise ConvlineError("tracking needs MLflow: pip install 'convline[mlflow]', or use --tracking none") from error
    for name, value in PATIENCE.items():
        os.environ.setdefault(name, value)
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    if follow:
        os.nice(19)  # 1.5% of a busy core: training comes first
    uri = tracking_uri()
    try:
        _create_database(uri)
        client = mlflow.MlflowClient(uri)
        cursor = _open_cursor(client, run, uri)
        with _system_metrics(cursor, follow):
            while follow and run.is_training():
                _send_points(client, run, cursor)
                time.sleep(INTERVAL)
        _send_points(client, run, cursor)
        _send_artifacts(client, run, cursor)
        client.set_terminated(cursor.mlflow_run)
    # MLflow's client raises its own, requests', urllib3's and SQLAlchemy's exceptions alike
    except Exception as error:
        raise ConvlineError(f"MLflow at {uri} did not take the run: {error}; `pipeline sync` sends the rest") from error
    return cursor.mlflow_run


def _create_database(uri: str) -> None:
    """A new SQLite store, made beside and linked into place: one that is torn while being made stays torn."""
    path = Path(uri.removeprefix("sqlite:///"))
    if not uri.startswith("sqlite:///") or path.exists():
        return
    import mlflow

    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        mlflow.MlflowClient(f"sqlite:///{beside}").search_experiments()
        with suppress(FileExistsError):  # another training was faster
            os.link(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def _open_cursor(client: Any, run: Run, uri: str) -> Cursor:
    """Where an earlier sync left off, or a new MLflow run with the recipe as its parameters."""
    try:
        cursor = Cursor(**json.loads((run.folder / "sync.json").read_text(encoding="utf-8")))
        if cursor.uri == uri:
            return cursor
    except (FileNotFoundError, ValueError, TypeError):
        pass  # never sent, or to be sent anew
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME", EXPERIMENT)
    created = client.create_run(_experiment(client, name, uri), run_name=run.name)
    parameters = flat(run.recipe.to_dict()) | {"dataset.fingerprint": run.info["dataset"]["fingerprint"]}
    tags = {"convline.run": run.name, "convline.run_id": run.info["id"]}
    client.log_batch(created.info.run_id, params=_entities("Param", parameters), tags=_entities("RunTag", tags))
    cursor = Cursor(uri, created.info.run_id)
    _keep(run, cursor)
    return cursor


def _experiment(client: Any, name: str, uri: str) -> str:
    """The experiment's id; in a store of our own its artifacts go to mlartifacts/ beside the database."""
    if (there := client.get_experiment_by_name(name)) is not None:
        return str(there.experiment_id)
    local = uri.startswith("sqlite:///")
    location = (Path(uri.removeprefix("sqlite:///")).parent / "mlartifacts").as_uri() if local else None
    return str(client.create_experiment(name, artifact_location=location))


def _entities(kind: str, values: dict[str, Any]) -> list[Any]:
    from mlflow import entities

    return [getattr(entities, kind)(key, str(value)) for key, value in values.items()]


@contextmanager
def _system_metrics(cursor: Cursor, enabled: bool) -> Iterator[None]:
    """CPU, memory, disk, network and GPU of the machine, sampled every ten seconds."""
    if not enabled:
        yield
        return
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    sampler = SystemMetricsMonitor(cursor.mlflow_run, resume_logging=True, tracking_uri=cursor.uri)
    sampler.start()
    try:
        yield
    finally:
        sampler.finish()


def _send_points(client: Any, run: Run, cursor: Cursor) -> None:
    """The points that are new, a request for every POINTS of them; the cursor moves after each."""
    from mlflow.entities import Metric

    new = (point for point in _points(run.metrics) if cursor.is_new(point.step, point.nth))
    while points := list(islice(new, POINTS)):
        metrics = [
            Metric(name, value, point.milliseconds, point.step)
            for point in points
            for name, value in point.values.items()
        ]
        client.log_batch(cursor.mlflow_run, metrics=metrics)
        cursor.step, cursor.points = points[-1].step, points[-1].nth + 1
        _keep(run, cursor)


def _points(metrics: Path) -> Iterator[Point]:
    """The whole lines of metrics.jsonl."""
    last, nth = -1, 0
    with metrics.open("rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                values = json.loads(line)
                step, seconds = values.pop("step"), values.pop("time")
                nth = nth + 1 if step == last else 0
                last = step
                yield Point(step, nth, round(seconds * 1000), values)


def _send_artifacts(client: Any, run: Run, cursor: Cursor) -> None:
    """Files of the run that are new or changed."""
    for name in ARTIFACTS:
        path = run.folder / name
        if path.exists() and cursor.artifacts.get(name) != (digest := sha256(path)):
            client.log_artifact(cursor.mlflow_run, str(path))
            cursor.artifacts[name] = digest
            _keep(run, cursor)


def _keep(run: Run, cursor: Cursor) -> None:
    with atomic_write(run.folder / "sync.json", "w") as file:
        json.dump(asdict(cursor), file, indent=2)
