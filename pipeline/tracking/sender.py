"""A run on its way to MLflow: points, files and pictures that the server lacks."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from convline.console import log
from convline.errors import ConvlineError
from convline.files import sha256
from convline.mlflow_client import database_file, explain_mlflow_errors, import_mlflow, tracking_uri
from convline.secrets import without_credentials
from pipeline.recipe import flat
from pipeline.reporting.findings import read_findings
from pipeline.reporting.image_grid import grid, pixels
from pipeline.run import Run
from pipeline.tracking import mlflow_runs
from pipeline.tracking.cursor import Cursor
from pipeline.tracking.deadline import PatientClient
from pipeline.tracking.points import Point, read_points, unpacked

INTERVAL = 2.0  # seconds between two looks at the file
LONGEST = 30.0  # between two attempts, where the server does not answer
POINTS = 100  # in one request, which takes 1,000 values at most
ARTIFACTS = ("recipe.toml", "run.json", "evaluation.json", "parity.json", "model.onnx", "report.html", "pictures/*.png")
REDRAWN = 60.0  # seconds between two looks at the summaries, at least
DRAWING_SHARE = 0.01  # of the time, at most


def has_failed(run: Run, since: float) -> bool:
    """Whether the last attempt to send the run, if it was after `since` (seconds since the epoch), failed."""
    try:
        is_recent = (run.folder / "sync.json").stat().st_mtime >= since
    except FileNotFoundError:
        return False
    return is_recent and Cursor.read(run, without_credentials(tracking_uri())).problem is not None


class Sender:
    """A run on its way to the server at `uri`. Its methods raise ConvlineError where the server fails, or is slow
    (see `PatientClient`).

    Several processes may send one run: they take turns, and each goes on where the last one stopped.
    Raises ConvlineError where MLflow is missing.
    """

    def __init__(self, run: Run, uri: str, in_hurry: Callable[[], bool] = lambda: False) -> None:
        import_mlflow("tracking (unless by --tracking none)")
        self._run = run
        self._uri = uri
        self._in_hurry = in_hurry
        self._client: Any = None
        self._known = ""  # the MLflow run that is certainly there
        self._is_sampling = False
        self._sent: dict[Path, Point] = {}  # of each file the last point that is certainly there

    def send_points(self, wait: bool = True) -> None:
        """The points that are new. Without `wait` BlockingIOError is raised where another process is sending."""
        with self._server(wait) as cursor:
            self._send_points(cursor)

    def sample_system(self, stack: ExitStack) -> None:
        """From the first call on, until the stack unwinds: CPU, memory, disk, network and GPU of the machine."""
        if not self._is_sampling:
            with self._server() as cursor:
                stack.enter_context(mlflow_runs.system_metrics(cursor.mlflow_run, self._uri))
                self._is_sampling = True

    def send_pictures(self) -> None:
        """The layers as they are by now."""
        draw_layers(self._run)
        with self._server() as cursor:
            _send_artifacts(self._client, self._run, cursor)
            _send_images(self._client, self._run, cursor)

    def finish(self) -> str:
        """Files that are new, and how the run ended; returns its id."""
        with self._server() as cursor:
            _send_artifacts(self._client, self._run, cursor)
            _send_images(self._client, self._run, cursor)
            if self._run.is_training():
                self._client.update_run(cursor.mlflow_run, status="RUNNING")
            else:
                last = next(iter(deque(read_points(self._run.metrics), maxlen=1)), None)
                is_complete = last is not None and last.step >= self._run.recipe.train.steps
                ended = None if last is None else last.milliseconds  # not when it was exported, say
                self._client.set_terminated(cursor.mlflow_run, "FINISHED" if is_complete else "KILLED", ended)
            return cursor.mlflow_run

    @contextmanager
    def _server(self, wait: bool = True) -> Iterator[Cursor]:
        """The cursor, for as long as no other process may move it, and the client, made on first use."""
        import mlflow

        with self._run.sending(wait):
            if not self._run.is_current():
                raise ConvlineError(f"{self._run.folder} was replaced by another run meanwhile")
            cursor = Cursor.read(self._run, without_credentials(self._uri))
            met = cursor.problem
            try:
                with explain_mlflow_errors(
                    self._uri, f"did not take the run {self._run.folder}, `pipeline sync` sends the rest"
                ):
                    if self._client is None:
                        mlflow_runs.create_database(self._uri)
                        client = mlflow.MlflowClient(self._uri)
                        is_local = database_file(self._uri) is not None
                        self._client = client if is_local else PatientClient(client, self._in_hurry)
                    if cursor.mlflow_run != self._known or not self._known:
                        cursor = self._open_run(cursor)
                        self._known = cursor.mlflow_run
                    yield cursor
                met = None
            except ConvlineError as error:
                met = str(error)
                raise
            finally:
                if (met is not None or cursor.problem is not None) and self._run.is_current():
                    cursor.problem = met
                    cursor.keep(self._run)

    def _open_run(self, cursor: Cursor) -> Cursor:
        """The cursor, if its MLflow run is there; else one at the start of a new run."""
        if cursor.mlflow_run and (found := mlflow_runs.find(self._client, cursor.mlflow_run)) is not None:
            mlflow_runs.describe(self._client, self._run, found)
            self._client.update_run(cursor.mlflow_run, status="RUNNING")
            return cursor
        self._sent.clear()
        fresh = Cursor(cursor.uri, cursor.run_id, mlflow_runs.open_run(self._client, self._run, self._uri))
        fresh.keep(self._run)
        return fresh

    def _send_points(self, cursor: Cursor) -> None:
        """The points that are new; the cursor moves after each request."""
        for points in self._new(self._run.metrics, lambda point: cursor.is_new(point.step, point.nth)):
            self._log(cursor, points)
            cursor.step, cursor.points = points[-1].step, points[-1].nth + 1
            cursor.keep(self._run)
        for points in self._new(self._run.summaries, lambda point: point.step > cursor.summarized):
            self._log(cursor, [_sparsities(point) for point in points])
            cursor.summarized = points[-1].step
            cursor.keep(self._run)
        watched = islice(read_points(self._run.watched), cursor.watched, None)
        while points := list(islice(watched, POINTS)):
            self._log(cursor, points)
            cursor.watched += len(points)
            cursor.keep(self._run)

    def _new(self, path: Path, is_new: Callable[[Point], bool]) -> Iterator[list[Point]]:
        """The points that are new, POINTS at a time. What was sent is not read again: a file may be megabytes."""
        new = filter(is_new, read_points(path, self._sent.get(path)))
        while points := list(islice(new, POINTS)):
            yield points
            self._sent[path] = points[-1]

    def _log(self, cursor: Cursor, points: Sequence[Point]) -> None:
        from mlflow.entities import Metric

        metrics = [
            Metric(name, value, point.milliseconds, point.step)
            for point in points
            for name, value in point.values.items()
        ]
        self._client.log_batch(cursor.mlflow_run, metrics=metrics)


def _sparsities(summary: Point) -> Point:
    """By layer the share of activations that are 0."""
    layers = summary.values["layers"].items()
    return replace(summary, values={f"sparsity/{name}": kinds["activations"]["zeros"] for name, kinds in layers})


def draw_layers(run: Run) -> None:
    """The run's summaries as pictures; where that fails, it is told, and the points are sent all the same."""
    from pipeline.reporting.layer_plots import layer_pictures
    from pipeline.reporting.plots import save

    try:
        pictures = layer_pictures(list(read_points(run.summaries)))
        save(run.pictures, {picture.name: picture.png() for picture in pictures})
    # a full disk, or whatever matplotlib meets
    except Exception as error:
        log(f"warning: the layers of {run.folder} could not be drawn: {error}")


def _send_artifacts(client: Any, run: Run, cursor: Cursor) -> None:
    """Files of the run that are new or changed."""
    for path in (path for pattern in ARTIFACTS for path in sorted(run.folder.glob(pattern))):
        name = path.relative_to(run.folder).as_posix()
        if cursor.artifacts.get(name) != (digest := sha256(path)):
            client.log_artifact(cursor.mlflow_run, str(path), None if path.parent == run.folder else path.parent.name)
            if name == "parity.json":
                _send_proof(client, cursor, path)
            cursor.artifacts[name] = digest
            cursor.keep(run)


def _send_images(client: Any, run: Run, cursor: Cursor) -> None:
    """Those of the batches that the summaries have."""
    for point in read_points(run.summaries):
        if point.step > cursor.imaged and "images" in point.values:
            row = grid([("", list(map(pixels, unpacked(point.values["images"]))))])
            at = {"step": point.step, "timestamp": point.milliseconds}
            client.log_image(cursor.mlflow_run, row, key="batch", **at, synchronous=True)
            cursor.imaged = point.step
            cursor.keep(run)


def _send_proof(client: Any, cursor: Cursor, path: Path) -> None:
    """Figures of parity.json as metrics: `parity.probability_difference.largest` and the like."""
    from mlflow.entities import Metric

    now = round(1000 * time.time())
    figures = {key: value for key, value in flat(read_findings(path)).items() if isinstance(value, (int, float))}
    metrics = [Metric(f"parity.{name}", float(value), now, 0) for name, value in figures.items()]
    if metrics:
        client.log_batch(cursor.mlflow_run, metrics=metrics)
