import base64
import json
import os
import signal
import sqlite3
import subprocess
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import mlflow
import pytest

from pipeline.engine.points import append_point, read_points
from pipeline.engine.run import Run
from pipeline.sync import Cursor, Sender, sync
from serving.registry import public, tracking_uri
from tests.conftest import Cli, QuietHandler, command, run_command
from tests.pipeline.helpers import refused, write_files
from tests.tracking_server import Server


def tracked(folder: Path, run: str = "digits") -> tuple[mlflow.MlflowClient, mlflow.entities.Run]:
    client = mlflow.MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    (found,) = client.search_runs(
        [e.experiment_id for e in client.search_experiments()], f"attributes.run_name = '{run}'"
    )
    return client, found


def points(folder: Path) -> list[tuple[int, float]]:
    lines = (folder / "runs/digits/metrics.jsonl").read_text().splitlines()
    return [(p["step"], p["loss"]) for p in map(json.loads, lines) if "loss" in p]


def losses(folder: Path) -> list[tuple[int, float]]:
    client, run = tracked(folder)
    return [(metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, "loss")]


def is_sent(run: Run) -> bool:
    """Whether points of it were sent."""
    path = run.folder / "sync.json"
    return path.exists() and json.loads(path.read_text())["step"] >= 0


def test_a_training_arrives_whole_in_mlflow(cli: Cli, tmp_path: Path) -> None:
    cli("pipeline", "train", "digits", "--steps", 100)
    assert losses(tmp_path) == points(tmp_path)
    client, run = tracked(tmp_path)
    assert run.info.status == "FINISHED"
    assert run.data.params["train.steps"] == "100"
    assert run.data.params["optimizer.name"] == "adam"
    assert "precision_at_1" in run.data.metrics
    files = [artifact.path for artifact in client.list_artifacts(run.info.run_id)]
    assert files == ["images", "pictures", "recipe.toml", "run.json"]
    images = [artifact.path for artifact in client.list_artifacts(run.info.run_id, "images")]
    assert sum("batch+step+0+" in path and path.endswith(".png") for path in images) == 1
    pictures = {artifact.path for artifact in client.list_artifacts(run.info.run_id, "pictures")}
    assert {"pictures/sparsity.png", "pictures/layer-conv1.png"} <= pictures
    assert "sparsity/conv1" in run.data.metrics
    view = client.get_experiment(run.info.experiment_id).tags["mlflow.sharedViewState.convline"]
    columns = json.loads(zlib.decompress(base64.b64decode(view.removeprefix("deflate;"))))["selectedColumns"]
    metrics = {name.split("`")[1] for name in columns if name.startswith("metrics")} - {"train_precision_at_1"}
    assert metrics <= set(run.data.metrics)
    (used,) = run.inputs.dataset_inputs
    assert used.dataset.name == "digits" and run.data.tags["network"] == "digits_convnet"
    assert run.data.params["dataset.fingerprint"].startswith(used.dataset.digest)
    assert list(tmp_path.glob("mlartifacts/*"))


@pytest.fixture
def untracked(own_project: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(own_project)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return own_project


def test_sync_sends_what_is_missing_and_nothing_twice(untracked: Path) -> None:
    run = Run.open(untracked / "runs/digits")
    whole = run.metrics.read_bytes()
    cut = whole.index(b'"step": 150')
    run.metrics.write_bytes(whole[:cut])  # in the middle of a line, as while it is being written
    sync(run)
    assert losses(untracked)[-1][0] == 140
    client, sent = tracked(untracked)
    images = [artifact.path for artifact in client.list_artifacts(sent.info.run_id, "images")]
    run.metrics.write_bytes(whole)
    sync(run)
    sync(run)
    assert losses(untracked) == points(untracked)
    assert [artifact.path for artifact in client.list_artifacts(sent.info.run_id, "images")] == images != []


def test_points_logged_again_after_a_resumption_do_not_stand_twice(untracked: Path) -> None:
    run = Run.open(untracked / "runs/digits")
    sync(run)
    whole = run.metrics.read_bytes()
    run.metrics.write_bytes(whole[: whole.index(b"\n", len(whole) // 2) + 1])
    sync(run)
    run.metrics.write_bytes(whole)
    sync(run)
    assert losses(untracked) == points(untracked)


def test_artifacts_follow_when_they_appear(untracked: Path) -> None:
    run = Run.open(untracked / "runs/digits")
    write_files(run.folder, dict.fromkeys(("evaluation.json", "report.html", "pictures/loss.png"), b"{}"))
    client = mlflow.MlflowClient(f"sqlite:///{untracked / 'mlflow.db'}")
    names = {artifact.path for artifact in client.list_artifacts(sync(run))}
    sent = {"evaluation.json", "model.onnx", "parity.json", "pictures", "recipe.toml", "report.html", "run.json"}
    assert names == sent | {"images"}


def test_a_cursor_counts_points_within_a_step() -> None:
    cursor = Cursor("uri", "id", "run", step=10, points=2)
    assert [cursor.is_new(step, nth) for step, nth in [(9, 5), (10, 1), (10, 2), (11, 0)]] == [False, False, True, True]


def test_a_server_that_is_down_costs_one_warning(cli: Cli, tmp_path: Path) -> None:
    closed = "http://127.0.0.1:9"
    result = cli("pipeline", "train", "digits", "--steps", 20, MLFLOW_TRACKING_URI=closed)
    assert result.stderr.count("warning: tracking is incomplete") == 1
    assert "`pipeline sync` sends the rest" in result.stderr
    cli("pipeline", "sync")
    assert losses(tmp_path) == points(tmp_path)


def test_a_database_torn_while_being_created_is_never_seen(own_project: Path) -> None:
    process = subprocess.Popen(command("pipeline", "sync"), cwd=own_project)
    while process.poll() is None:
        if list(own_project.glob(".mlflow.db.*")):
            process.send_signal(signal.SIGKILL)
            break
    process.wait()
    run_command(own_project, "pipeline", "sync")
    assert losses(own_project) == points(own_project)
    assert sqlite3.connect(own_project / "mlflow.db").execute("pragma integrity_check").fetchone() == ("ok",)


def test_a_server_that_comes_late_gets_everything(own_project: Path, server: Server) -> None:
    run = Run.open(own_project / "runs/digits")
    with run.lock():
        follower = subprocess.Popen(
            command("pipeline", "sync", "--follow"),
            cwd=own_project,
            env={**os.environ, "MLFLOW_TRACKING_URI": server.uri},
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            assert follower.stderr is not None
            assert any("trying again" in line for line in follower.stderr)
            server.start()
            while not is_sent(run):
                assert follower.poll() is None
                time.sleep(0.2)
        except BaseException:
            follower.kill()
            raise
    assert follower.wait(120) == 0
    follower.stderr.close()
    client = mlflow.MlflowClient(server.uri)
    cursor = json.loads((run.folder / "sync.json").read_text())
    history = client.get_metric_history(cursor["mlflow_run"], "loss")
    assert [(metric.step, metric.value) for metric in history] == points(own_project)
    assert client.get_run(cursor["mlflow_run"]).info.status == "FINISHED"


def test_a_run_that_the_server_has_lost_is_sent_anew(untracked: Path) -> None:
    first = run_command(untracked, "pipeline", "sync").stdout
    (untracked / "mlflow.db").unlink()
    assert run_command(untracked, "pipeline", "sync").stdout != first
    assert losses(untracked) == points(untracked)


def test_a_run_that_the_server_loses_meanwhile_is_sent_anew_from_its_first_point(untracked: Path) -> None:
    sender = Sender(Run.open(untracked / "runs/digits"), tracking_uri())
    sender.send_points()
    client, first = tracked(untracked)
    client.delete_run(first.info.run_id)
    (untracked / "runs/digits/sync.json").unlink()
    sender.send_points()
    assert losses(untracked) == points(untracked)


def test_a_run_that_was_stopped_is_not_called_finished(untracked: Path) -> None:
    run = Run.open(untracked / "runs/digits")
    whole = run.metrics.read_bytes()
    run.metrics.write_bytes(whole[: whole.index(b'"step": 200')])
    sync(run)
    assert tracked(untracked)[1].info.status == "KILLED"
    run.metrics.write_bytes(whole)
    sync(run)
    assert tracked(untracked)[1].info.status == "FINISHED"


def test_a_run_lasted_as_long_as_it_was_trained_whenever_it_is_sent(untracked: Path) -> None:
    run = Run.open(untracked / "runs/digits")
    sync(run)
    sync(run)
    told = tracked(untracked)[1].info
    first, *_, last = read_points(run.metrics)
    assert (told.start_time, told.end_time) == (first.milliseconds, last.milliseconds)


def test_credentials_are_not_kept() -> None:
    assert public("https://me:secret@mlflow.example/path") == "https://mlflow.example/path"
    assert public("sqlite:////data/a@b.db") == "sqlite:////data/a@b.db"


def test_the_answers_of_several_watchers_are_all_sent(untracked: Path) -> None:
    """They are of other weights or splits, and their steps do not rise from one to the next."""
    run = Run.open(untracked / "runs/digits")
    answers = [("watched_precision_at_1", 200), ("watched_precision_at_1", 300)]
    answers += [("watched_raw_precision_at_1", 200), ("watched_raw_precision_at_1", 300)]
    for metric, step in answers:
        append_point(run.watched, {"step": step, "time": 1e9 + step, metric: step / 1000})
        sync(run)
    client, tracked_run = tracked(untracked)
    for metric in {metric for metric, _ in answers}:
        history = client.get_metric_history(tracked_run.info.run_id, metric)
        assert [(point.step, point.value) for point in history] == [(200, 0.2), (300, 0.3)]


def test_a_torn_line_is_cut_before_the_next(tmp_path: Path) -> None:
    path = tmp_path / "watched.jsonl"
    append_point(path, {"step": 1, "time": 1.0, "a": 0.5})
    path.write_bytes(path.read_bytes() + b'{"step": 2, "ti')
    assert [point.step for point in read_points(path)] == [1]
    append_point(path, {"step": 2, "time": 2.0, "a": 0.6})
    assert [point.values for point in read_points(path)] == [{"a": 0.5}, {"a": 0.6}]


def test_points_are_read_on_from_one_that_still_stands_there(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [f'{{"step": {step}, "time": 1.0, "a": {step / 7}}}\n' for step in (1, 10, 10, 20)]
    path.write_text("".join(lines[:2]))
    *_, last = read_points(path)
    assert list(read_points(path, last)) == []
    path.write_text("".join(lines))
    assert list(read_points(path, last)) == list(read_points(path))[2:]
    assert [(point.step, point.nth) for point in read_points(path, last)] == [(10, 1), (20, 0)]
    for cut_back in (lines[:1], [lines[0], lines[3], lines[2]], ['{"step": 5, "time": 2.0}\n', *lines]):
        path.write_text("".join(cut_back))
        assert list(read_points(path, last)) == list(read_points(path)) != []


def test_what_belongs_to_a_run_that_was_replaced_is_not_sent(untracked: Path) -> None:
    """A follower that still waits for a server must not move the cursor of the run that took the folder."""
    old = Run.open(untracked / "runs/digits")
    sync(old)
    run_command(untracked, "pipeline", "train", "digits", "--steps", 5, "--overwrite", "--tracking", "none")
    with refused("was replaced by another run"):
        sync(old)
    assert not (old.folder / "sync.json").exists()
    sync(Run.open(old.folder))
    client = mlflow.MlflowClient(f"sqlite:///{untracked / 'mlflow.db'}")
    runs = client.search_runs([e.experiment_id for e in client.search_experiments()])
    assert len(runs) == 2


def test_a_run_whose_cursor_was_lost_is_not_sent_twice(untracked: Path) -> None:
    run = Run.open(untracked / "runs/digits")
    first = sync(run)
    (run.folder / "sync.json").unlink()
    assert sync(run) == first
    assert losses(untracked) == points(untracked)


class Broken(QuietHandler):
    """Answers everything by an error of its own."""

    def do_GET(self) -> None:
        self.send_error(500)

    do_POST = do_GET


class Slow(QuietHandler):
    """Answers after longer than anybody waits."""

    def do_GET(self) -> None:
        time.sleep(10)
        self.send_error(500)

    do_POST = do_GET


@pytest.mark.parametrize("handler", [Broken, Slow])
def test_a_server_that_answers_wrongly_or_late_costs_one_warning(
    cli: Cli, tmp_path: Path, serve: Callable[..., str], handler: type[QuietHandler]
) -> None:
    env = {"MLFLOW_TRACKING_URI": serve(tmp_path, handler), "MLFLOW_HTTP_REQUEST_TIMEOUT": "2"}
    result = cli("pipeline", "train", "digits", "--steps", 20, **env)
    assert result.stderr.count("warning: tracking is incomplete") == 1
    cli("pipeline", "sync")
    assert losses(tmp_path) == points(tmp_path)
