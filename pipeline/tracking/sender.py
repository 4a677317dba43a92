"""Send a run to MLflow: the metrics, files, layer plots and images that the server does not have yet."""

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
from convline.mlflow_client import database_file, explain_mlflow_errors, import_mlflow
from convline.secrets import without_credentials
from pipeline.recipe import flat
from pipeline.reporting.image_grid import grid, to_pil
from pipeline.reporting.result_files import read_result_file
from pipeline.run import Run
from pipeline.tracking import mlflow_runs
from pipeline.tracking.cursor import Cursor
from pipeline.tracking.deadline import TimeLimitedClient
from pipeline.tracking.points import Point, read_points, unpacked

POINTS_PER_REQUEST = 100  # MLflow accepts 1,000 values in a request
ARTIFACTS = (
    "recipe.toml",
    "run.json",
    "evaluation.json",
    "mistakes.csv",
    "parity.json",
    "model.onnx",
    "model-card.md",
    "report.html",
    "pictures/*.png",
)


class Sender:
    """Sends a run to the MLflow server at `uri`.

    Several processes may send the same run: they take turns, and each continues where the last one stopped. Raises
    ConvlineError if MLflow is not installed; the methods raise it if the server fails or is slow (TimeLimitedClient).
    """

    def __init__(self, run: Run, uri: str, in_hurry: Callable[[], bool] = lambda: False) -> None:
        import_mlflow("tracking (--tracking none turns it off)")
        self._run = run
        self._uri = uri
        self._in_hurry = in_hurry
        self._client: Any = None
        self._verified_run = ""  # the id of the MLflow run that is known to exist
        self._is_sampling = False
        self._last_sent: dict[Path, Point] = {}  # the last point of each file that the server has

    def send_points(self, wait: bool = True) -> None:
        """Send new points. Without `wait`, BlockingIOError is raised if another process is sending."""
        with self._server(wait) as cursor:
            self._send_points(cursor)

    def sample_system(self, stack: ExitStack) -> None:
        """Log CPU, memory, disk, network and GPU of the machine, from the first call until `stack` is closed."""
        if not self._is_sampling:
            with self._server() as cursor:
                stack.enter_context(mlflow_runs.system_metrics(cursor.mlflow_run, self._uri))
                self._is_sampling = True

    def send_layer_plots(self) -> None:
        """Draw the layers from the summaries written so far and send the plots, with other new files and images."""
        draw_layer_plots(self._run)
        with self._server() as cursor:
            _send_artifacts(self._client, self._run, cursor)
            _send_images(self._client, self._run, cursor)

    def finish(self) -> str:
        """Send new files and images, and the status of the run; returns the id of the MLflow run."""
        with self._server() as cursor:
            _send_artifacts(self._client, self._run, cursor)
            _send_images(self._client, self._run, cursor)
            if self._run.is_training():
                self._client.update_run(cursor.mlflow_run, status="RUNNING")
            else:
                last = next(iter(deque(read_points(self._run.metrics), maxlen=1)), None)
                is_complete = last is not None and self._is_end(last)
                ended = None if last is None else last.milliseconds  # when training ended, not when this was sent
                self._client.set_terminated(cursor.mlflow_run, "FINISHED" if is_complete else "KILLED", ended)
            return cursor.mlflow_run

    def _is_end(self, point: Point) -> bool:
        """Whether it is the last point of a training: at its last step, or where it ran out of patience."""
        settings = self._run.recipe.train
        return "training_seconds" in point.values and (point.step >= settings.steps or settings.patience > 0)

    @contextmanager
    def _server(self, wait: bool = True) -> Iterator[Cursor]:
        """The cursor, locked against other processes, with the client and the MLflow run created if necessary.

        An error in the block is recorded in the cursor as its `problem`.
        """
        import mlflow

        with self._run.sending(wait):
            if not self._run.is_current():
                raise ConvlineError(f"{self._run.folder} was replaced by another run in the meantime")
            cursor = Cursor.read(self._run, without_credentials(self._uri))
            problem = cursor.problem
            try:
                with explain_mlflow_errors(
                    self._uri, f"did not take the run {self._run.folder}, `pipeline sync` sends the rest"
                ):
                    if self._client is None:
                        mlflow_runs.create_database(self._uri)
                        client = mlflow.MlflowClient(self._uri)
                        is_local = database_file(self._uri) is not None
                        self._client = client if is_local else TimeLimitedClient(client, self._in_hurry)
                    if cursor.mlflow_run != self._verified_run or not self._verified_run:
                        cursor = self._open_run(cursor)
                        self._verified_run = cursor.mlflow_run
                    yield cursor
                problem = None
            except ConvlineError as error:
                problem = str(error)
                raise
            finally:
                if (problem is not None or cursor.problem is not None) and self._run.is_current():
                    cursor.problem = problem
                    cursor.write(self._run)

    def _open_run(self, cursor: Cursor) -> Cursor:
        """The cursor, if its MLflow run exists; otherwise a cursor at the start of a new MLflow run."""
        if cursor.mlflow_run and (existing := mlflow_runs.find_run(self._client, cursor.mlflow_run)) is not None:
            mlflow_runs.log_params(self._client, self._run, existing)
            self._client.update_run(cursor.mlflow_run, status="RUNNING")
            return cursor
        self._last_sent.clear()
        new_cursor = Cursor(cursor.uri, cursor.run_id, mlflow_runs.open_run(self._client, self._run, self._uri))
        new_cursor.write(self._run)
        return new_cursor

    def _send_points(self, cursor: Cursor) -> None:
        """Send new points of all files; the cursor moves after each request."""
        for points in self._new_points(self._run.metrics, lambda point: cursor.is_new(point.step, point.nth)):
            self._log_points(cursor, points)
            cursor.step, cursor.points = points[-1].step, points[-1].nth + 1
            cursor.write(self._run)
        for points in self._new_points(self._run.summaries, lambda point: point.step > cursor.summarized):
            self._log_points(cursor, [_sparsities(point) for point in points])
            cursor.summarized = points[-1].step
            cursor.write(self._run)
        watched = islice(read_points(self._run.watched), cursor.watched, None)
        while points := list(islice(watched, POINTS_PER_REQUEST)):
            self._log_points(cursor, points)
            cursor.watched += len(points)
            cursor.write(self._run)

    def _new_points(self, path: Path, is_new: Callable[[Point], bool]) -> Iterator[list[Point]]:
        """The new points of a file, a list for each request. What was sent is not read again: files can be large."""
        new = filter(is_new, read_points(path, self._last_sent.get(path)))
        while points := list(islice(new, POINTS_PER_REQUEST)):
            yield points
            self._last_sent[path] = points[-1]

    def _log_points(self, cursor: Cursor, points: Sequence[Point]) -> None:
        from mlflow.entities import Metric

        metrics = [
            Metric(name, value, point.milliseconds, point.step)
            for point in points
            for name, value in point.values.items()
        ]
        self._client.log_batch(cursor.mlflow_run, metrics=metrics)


def _sparsities(summary: Point) -> Point:
    """The point to send for a summary: the share of activations that are 0, for each layer."""
    layers = summary.values["layers"].items()
    return replace(summary, values={f"sparsity/{name}": kinds["activations"]["zeros"] for name, kinds in layers})


def draw_layer_plots(run: Run) -> None:
    """Write the layer plots of the run's summaries; if that fails, log a warning, so that points are sent anyway."""
    from pipeline.reporting.layer_plots import layer_plots
    from pipeline.reporting.plots import save_pngs

    try:
        plots = layer_plots(list(read_points(run.summaries))).plots
        save_pngs(run.pictures, {plot.name: plot.png() for plot in plots})
    # a full disk, or any error of matplotlib
    except Exception as error:
        log(f"warning: the layers of {run.folder} could not be drawn: {error}")


def _send_artifacts(client: Any, run: Run, cursor: Cursor) -> None:
    """Send the run's files that are new or have changed."""
    for path in (path for pattern in ARTIFACTS for path in sorted(run.folder.glob(pattern))):
        name = path.relative_to(run.folder).as_posix()
        if cursor.artifacts.get(name) != (digest := sha256(path)):
            client.log_artifact(cursor.mlflow_run, str(path), None if path.parent == run.folder else path.parent.name)
            if name == "parity.json":
                _send_parity_metrics(client, cursor, path)
            cursor.artifacts[name] = digest
            cursor.write(run)


def _send_images(client: Any, run: Run, cursor: Cursor) -> None:
    """Send the images of batches in the summaries that are new."""
    for point in read_points(run.summaries):
        if point.step > cursor.imaged and "images" in point.values:
            row = grid([("", list(map(to_pil, unpacked(point.values["images"]))))])
            client.log_image(
                cursor.mlflow_run,
                row,
                key="batch",
                step=point.step,
                timestamp=point.milliseconds,
                synchronous=True,
            )
            cursor.imaged = point.step
            cursor.write(run)


def _send_parity_metrics(client: Any, cursor: Cursor, path: Path) -> None:
    """Send the figures of parity.json as metrics such as `parity.probability_difference.largest`."""
    from mlflow.entities import Metric

    now = round(1000 * time.time())
    figures = {key: value for key, value in flat(read_result_file(path)).items() if isinstance(value, (int, float))}
    metrics = [Metric(f"parity.{name}", float(value), now, 0) for name, value in figures.items()]
    if metrics:
        client.log_batch(cursor.mlflow_run, metrics=metrics)
