"""metrics.jsonl -> MLflow: sends what the server lacks, as often as it is asked to."""

from __future__ import annotations

import json
import logging
import os
import re
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from pipeline.engine.run import Run
from pipeline.recipe import flat
from serving.console import log
from serving.errors import ConvlineError
from serving.files import atomic_write, sha256

INTERVAL = 2.0  # seconds between two looks at the file
POINTS = 100  # in one request, which takes 1,000 values at most
EXPERIMENT = "convline"
ARTIFACTS = ("recipe.toml", "run.json", "evaluation.json", "parity.json", "model.onnx")

# a server that is down or frozen must fail a request soon, not after MLflow's own twelve minutes
ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "1",
}


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
    """Send what MLflow lacks of a run; with `follow`, again and again until its training has ended.

    A server that does not answer is tried again while the training goes on. Returns the MLflow run's id.
    Raises ConvlineError where MLflow is missing, or the last attempt fails.
    """
    try:
        import mlflow  # noqa: F401
    except ImportError as error:
        raise ConvlineError("tracking needs MLflow: pip install 'convline[mlflow]', or use --tracking none") from error
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    if follow:
        os.nice(19)  # 1.5% of a busy core: training comes first
    sender = Sender(run, tracking_uri())
    with ExitStack() as stack:
        while follow and run.is_training():
            try:
                sender.send_points()
                sender.sample_system(stack)
            except ConvlineError as error:
                log(f"{error}; trying again")
            time.sleep(INTERVAL)
        sender.send_points()
        return sender.finish()


class Sender:
    """A run on its way to the server at `uri`. Its methods raise ConvlineError where the server fails."""

    def __init__(self, run: Run, uri: str) -> None:
        self._run = run
        self._uri = uri
        self._client: Any = None
        self._cursor: Cursor | None = None
        self._is_sampling = False

    def send_points(self) -> None:
        """The points that are new."""
        with self._server() as (client, cursor):
            _send_points(client, self._run, cursor)

    def sample_system(self, stack: ExitStack) -> None:
        """From the first call on, until the stack unwinds: CPU, memory, disk, network and GPU of the machine."""
        with self._server() as (_, cursor):
            if not self._is_sampling:
                stack.enter_context(_system_metrics(cursor.mlflow_run, self._uri))
                self._is_sampling = True

    def finish(self) -> str:
        """Files that are new, and how the run ended; returns its id."""
        with self._server() as (client, cursor):
            _send_artifacts(client, self._run, cursor)
            if self._run.is_training():
                client.update_run(cursor.mlflow_run, status="RUNNING")
            else:
                client.set_terminated(cursor.mlflow_run, "FINISHED" if _is_complete(self._run) else "KILLED")
            return cursor.mlflow_run

    @contextmanager
    def _server(self) -> Iterator[tuple[Any, Cursor]]:
        """The client and the cursor, made on first use."""
        import mlflow

        try:
            if self._cursor is None:
                _create_database(self._uri)
                self._client = mlflow.MlflowClient(self._uri)
                self._cursor = _open_cursor(self._client, self._run, _public(self._uri))
            yield self._client, self._cursor
        # MLflow's client raises its own, requests', urllib3's and SQLAlchemy's exceptions alike
        except Exception as error:
            told = str(error).replace(self._uri, _public(self._uri))
            raise ConvlineError(
                f"MLflow at {_public(self._uri)} did not take the run: {told}; `pipeline sync` sends the rest"
            ) from error


def _public(uri: str) -> str:
    """Without user name and password."""
    return re.sub(r"//[^/@]*@", "//", uri)


def _is_complete(run: Run) -> bool:
    *_, last = (-1, *(point.step for point in _points(run.metrics)))
    return last >= run.recipe.train.steps


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
    except (FileNotFoundError, ValueError, TypeError):
        cursor = None  # never sent, or to be sent anew
    if cursor is not None and cursor.uri == uri and _exists(client, cursor.mlflow_run):
        client.update_run(cursor.mlflow_run, status="RUNNING")
        return cursor
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME", EXPERIMENT)
    created = client.create_run(_experiment(client, name, uri), run_name=run.name)
    parameters = flat(run.recipe.to_dict()) | {"dataset.fingerprint": run.info["dataset"]["fingerprint"]}
    tags = {"convline.run": run.name, "convline.run_id": run.info["id"]}
    client.log_batch(created.info.run_id, params=_entities("Param", parameters), tags=_entities("RunTag", tags))
    cursor = Cursor(uri, created.info.run_id)
    _keep(run, cursor)
    return cursor


def _exists(client: Any, mlflow_run: str) -> bool:
    from mlflow.exceptions import MlflowException

    try:
        return bool(client.get_run(mlflow_run).info.lifecycle_stage == "active")
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return False
        raise


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
def _system_metrics(mlflow_run: str, uri: str) -> Iterator[None]:
    """Sampled every ten seconds."""
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    sampler = SystemMetricsMonitor(mlflow_run, resume_logging=True, tracking_uri=uri)
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
    if not metrics.exists():
        return
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
