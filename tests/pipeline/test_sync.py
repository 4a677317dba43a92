import base64
import io
import json
import os
import signal
import sqlite3
import subprocess
import time
import zlib
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path

import mlflow
import pytest

from convline.errors import ConvlineError
from convline.mlflow_client import tracking_uri
from convline.secrets import redacted, redacting_stream, without_credentials
from pipeline.reporting.result_files import read_result_file
from pipeline.run import Run, lock_run
from pipeline.sync import sync
from pipeline.tracking import deadline
from pipeline.tracking.cursor import Cursor
from pipeline.tracking.points import append_point, read_points
from pipeline.tracking.sender import Sender
from tests.conftest import Cli, QuietHandler, command, run_command, run_process
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
    """Whether some of its points were sent."""
    path = run.folder / "sync.json"
    return path.exists() and json.loads(path.read_text())["step"] >= 0


@pytest.mark.all
def test_a_training_is_sent_completely_to_mlflow(cli: Cli, tmp_path: Path) -> None:
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


def test_points_logged_again_after_a_resume_are_sent_once(untracked: Path) -> None:
    run = Run.open(untracked / "runs/digits")
    sync(run)
    whole = run.metrics.read_bytes()
    run.metrics.write_bytes(whole[: whole.index(b"\n", len(whole) // 2) + 1])
    sync(run)
    run.metrics.write_bytes(whole)
    sync(run)
    assert losses(untracked) == points(untracked)


def test_new_artifacts_are_sent(untracked: Path) -> None:
    run = Run.open(untracked / "runs/digits")
    write_files(
        run.folder, dict.fromkeys(("evaluation.json", "mistakes.csv", "report.html", "pictures/loss.png"), b"{}")
    )
    client = mlflow.MlflowClient(f"sqlite:///{untracked / 'mlflow.db'}")
    names = {artifact.path for artifact in client.list_artifacts(sync(run))}
    of_training = {"recipe.toml", "run.json", "images"}
    of_export = {"model.onnx", "model-card.md", "parity.json"}
    assert names == of_training | of_export | {"evaluation.json", "mistakes.csv", "pictures", "report.html"}


def test_a_cursor_counts_points_within_a_step() -> None:
    cursor = Cursor("uri", "id", "run", step=10, points=2)
    assert [cursor.is_new(step, nth) for step, nth in [(9, 5), (10, 1), (10, 2), (11, 0)]] == [False, False, True, True]


@pytest.mark.all
def test_a_server_that_is_down_costs_one_warning(cli: Cli, tmp_path: Path) -> None:
    closed = "http://me:p@ss-w0rd@127.0.0.1:9/?token=t0ken"
    result = cli("pipeline", "train", "digits", "--steps", 20, MLFLOW_TRACKING_URI=closed)
    files = [path for path in (tmp_path / "runs").rglob("*") if path.is_file()]
    assert tmp_path / "runs/digits/sync.log" in files and tmp_path / "runs/digits/sync.json" in files
    for content in (result.stderr.encode(), *(path.read_bytes() for path in files)):
        assert b"w0rd" not in content and b"t0ken" not in content
    assert result.stderr.count("warning: tracking is incomplete") == 1
    assert "`pipeline sync` sends the rest" in result.stderr
    cli("pipeline", "sync")
    assert losses(tmp_path) == points(tmp_path)


@pytest.mark.all
def test_a_database_whose_creation_is_interrupted_is_not_used(own_project: Path) -> None:
    process = subprocess.Popen(command("pipeline", "sync"), cwd=own_project)
    while process.poll() is None:
        if list(own_project.glob(".mlflow.db.*")):
            process.send_signal(signal.SIGKILL)
            break
    process.wait()
    run_command(own_project, "pipeline", "sync")
    assert losses(own_project) == points(own_project)
    with closing(sqlite3.connect(own_project / "mlflow.db")) as database:
        assert database.execute("pragma integrity_check").fetchone() == ("ok",)


@pytest.mark.all
def test_a_server_that_starts_late_gets_everything(own_project: Path, server: Server) -> None:
    run = Run.open(own_project / "runs/digits")
    with lock_run(run.folder):
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


@pytest.mark.all
def test_a_run_that_the_server_has_lost_is_sent_again(untracked: Path) -> None:
    first = run_process(untracked, "pipeline", "sync").stdout  # MLflow keeps a database open as long as a process
    (untracked / "mlflow.db").unlink()
    assert run_process(untracked, "pipeline", "sync").stdout != first
    assert losses(untracked) == points(untracked)


def test_a_run_that_the_server_loses_while_it_is_sent_is_sent_again_from_its_start(untracked: Path) -> None:
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


def test_start_and_end_of_a_run_are_those_of_its_training(untracked: Path) -> None:
    run = Run.open(untracked / "runs/digits")
    sync(run)
    sync(run)
    info = tracked(untracked)[1].info
    first, *_, last = read_points(run.metrics)
    assert (info.start_time, info.end_time) == (first.milliseconds, last.milliseconds)


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("https://me:secret@mlflow.example/path", "https://mlflow.example/path"),
        ("http://me:p@ss@host:5000", "http://host:5000"),
        ("http://me:p/s:s@host:5000/path", "http://host:5000/path"),
        ("http://token@host/", "http://host/"),
        ("http://host/path?token=secret#secret", "http://host/path"),
        ("postgresql+psycopg2://me:p@ss@host:5432/mlflow?sslpassword=secret", "postgresql+psycopg2://host:5432/mlflow"),
        ("mysql://me:s?cret@host/mlflow", "mysql://…"),  # a query that begins in the password?
        ("http://host/?user=me@home&token=secret", "http://…"),
        ("me:secret@host:5000", "host:5000"),
        ("databricks://profile", "databricks://profile"),
        ("databricks", "databricks"),
        ("sqlite:////data/a@b.db", "sqlite:////data/a@b.db"),
        ("sqlite:////data/a@b.db?key=secret", "sqlite:////data/a@b.db"),
        ("/data/me@home/mlruns", "/data/me@home/mlruns"),
    ],
)
def test_secrets_in_a_uri_are_not_shown(uri: str, shown: str) -> None:
    assert without_credentials(uri) == shown


@pytest.mark.parametrize(
    "written",
    [
        "http://me:p@ss/w0rd@host:5000/?token=t0ken",  # whole
        "me:p@ss/w0rd",
        "'p@ss/w0rd'",
        "p%40ss%2Fw0rd and p%40ss%2fw0rd and p%40ss/w0rd",
        "host 'ss/w0rd@host'",  # as printed by a parser that splits at the first @
        "http://host:5000/?token=t0ken/api/2.0 and token%3Dt0ken",
        base64.b64encode(b"me:p@ss/w0rd").decode(),  # as HTTP sends it
        "Bearer t0ken-of-the-environment",
    ],
)
def test_a_secret_is_hidden_however_it_is_written(monkeypatch: pytest.MonkeyPatch, written: str) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "t0ken-of-the-environment")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:p@ss/w0rd@host:5000/?token=t0ken")
    stream = io.StringIO()
    print(f"before {written} after", file=redacting_stream(stream))
    for text in (redacted(f"before {written} after"), stream.getvalue()):
        assert text.startswith("before ") and text.rstrip().endswith(" after")
        assert not any(secret in text for secret in ("w0rd", "t0ken", "cEBz"))


def test_a_short_secret_is_hidden_only_where_it_is_a_word() -> None:
    text = redacted("a password: a, of a banana", "http://me:a@host")
    assert text == "*** password: ***, of *** banana"


class Echo(QuietHandler):
    """Answers with the request it received."""

    def do_GET(self) -> None:
        self.send_response(400)
        self.end_headers()
        self.wfile.write(f"{self.path} {dict(self.headers)}".encode())

    do_POST = do_GET


def test_secrets_that_a_server_repeats_are_not_stored(
    own_project: Path, monkeypatch: pytest.MonkeyPatch, serve: Callable[..., str]
) -> None:
    run = Run.open(own_project / "runs/digits")
    with_password = serve(own_project, Echo).replace("http://", "http://me:p@ss-w0rd@")
    for uri, token in ((with_password, ""), (with_password + "?token=t0ken", ""), (serve(own_project, Echo), "t0ken")):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", token)
        with pytest.raises(ConvlineError) as caught:
            sync(run)
        for text in (str(caught.value), (run.folder / "sync.json").read_text()):
            assert "User-Agent" in text and "***" in text  # the request was repeated
            assert not any(secret in text for secret in ("w0rd", "t0ken", base64.b64encode(b"me:p@ss-w0rd").decode()))


def test_a_damaged_cursor_starts_again(own_project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run.open(own_project / "runs/digits")
    path, start = run.folder / "sync.json", Cursor("http://host", run.info["id"])
    written = Cursor("http://host", run.info["id"], "abc", step=140, points=1, artifacts={"run.json": "0" * 64})
    written.write(run)
    whole = path.read_bytes()
    assert Cursor.read(run, "http://host") == written
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        # damage outside of keys and values (a space that became a line feed) is harmless
        assert Cursor.read(run, "http://host") == (written if is_same_json(bytes(damaged), whole) else start)
    assert "sync.json is damaged" in capsys.readouterr().err
    for content in (b"", b"[]", b"null", b'{"digest": "x"}'):
        path.write_bytes(content)
        assert Cursor.read(run, "http://host") == start


def test_a_cursor_without_a_digest_of_an_older_version_is_used(own_project: Path) -> None:
    run = Run.open(own_project / "runs/digits")
    path, written = run.folder / "sync.json", Cursor("http://host", run.info["id"], "abc", step=140, points=1)
    written.write(run)
    fields = json.loads(path.read_bytes())
    del fields["digest"]
    path.write_text(json.dumps(fields))
    assert Cursor.read(run, "http://host") == written


def is_same_json(one: bytes, other: bytes) -> bool:
    try:
        return bool(json.loads(one) == json.loads(other))
    except ValueError:
        return False


@pytest.mark.parametrize("content", [b"", b"[1]", b'{"a": ', b"\xff\xfe"])
def test_damaged_result_files_are_ignored_with_a_warning(
    tmp_path: Path, content: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "parity.json"
    assert read_result_file(path) == {} and capsys.readouterr().err == ""
    path.write_bytes(content)
    assert read_result_file(path) == {}
    assert f"warning: {path} is damaged" in capsys.readouterr().err


def test_a_run_continued_to_more_steps_has_a_tag_with_their_number(untracked: Path) -> None:
    """MLflow does not allow to change a parameter. The rest is sent although parity.json is damaged."""
    run = Run.open(untracked / "runs/digits")
    sync(run)
    recipe = (run.folder / "recipe.toml").read_text()
    (run.folder / "recipe.toml").write_text(recipe.replace("steps = 300", "steps = 400"))
    (run.folder / "parity.json").write_bytes(b'{"passed": tru')
    sync(Run.open(run.folder))
    sent = tracked(untracked)[1]
    assert (sent.data.params["train.steps"], sent.data.tags["train.steps"]) == ("300", "400")
    assert sent.info.status == "KILLED"  # it has not reached 400 steps


def test_the_results_of_several_watchers_are_all_sent(untracked: Path) -> None:
    """They are for different weights or splits, so steps do not increase from line to line."""
    run = Run.open(untracked / "runs/digits")
    results = [("watched_precision_at_1", 200), ("watched_precision_at_1", 300)]
    results += [("watched_raw_precision_at_1", 200), ("watched_raw_precision_at_1", 300)]
    for metric, step in results:
        append_point(run.watched, {"step": step, "time": 1e9 + step, metric: step / 1000})
        sync(run)
    client, tracked_run = tracked(untracked)
    for metric in {metric for metric, _ in results}:
        history = client.get_metric_history(tracked_run.info.run_id, metric)
        assert [(point.step, point.value) for point in history] == [(200, 0.2), (300, 0.3)]


def test_an_incomplete_line_is_removed_before_the_next(tmp_path: Path) -> None:
    path = tmp_path / "watched.jsonl"
    append_point(path, {"step": 1, "time": 1.0, "a": 0.5})
    path.write_bytes(path.read_bytes() + b'{"step": 2, "ti')
    assert [point.step for point in read_points(path)] == [1]
    append_point(path, {"step": 2, "time": 2.0, "a": 0.6})
    assert [point.values for point in read_points(path)] == [{"a": 0.5}, {"a": 0.6}]


def test_reading_continues_after_a_point_that_is_still_at_its_place(tmp_path: Path) -> None:
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


def test_a_run_that_was_replaced_is_not_sent(untracked: Path) -> None:
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
    """Answers every request with an internal error."""

    def do_GET(self) -> None:
        self.send_error(500)

    do_POST = do_GET


class Slow(QuietHandler):
    """Answers too late for every client."""

    def do_GET(self) -> None:
        time.sleep(10)
        self.send_error(500)

    do_POST = do_GET


class Dripping(QuietHandler):
    """Sends a byte at a time, so that no timeout between two bytes is reached."""

    def do_GET(self) -> None:
        with suppress(OSError):  # the client has given up
            for byte in b"HTTP/1.1 200 OK\r\nX: " + 1000 * b"x":
                self.wfile.write(bytes([byte]))
                time.sleep(0.1)

    do_POST = do_GET


def test_a_server_that_sends_a_byte_at_a_time_is_given_up_within_seconds(
    own_project: Path, monkeypatch: pytest.MonkeyPatch, serve: Callable[..., str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", serve(own_project, Dripping))
    monkeypatch.setattr(deadline, "EXTRA_SECONDS", 0.5)
    run = Run.open(own_project / "runs/digits")
    sender, began = Sender(run, tracking_uri()), time.monotonic()
    with refused("did not take the run", "`pipeline sync` sends the rest"):
        sender.send_points()
    assert time.monotonic() - began < 10  # the whole answer would take 100 s
    assert "did not take the run" in (Cursor.read(run, without_credentials(tracking_uri())).problem or "")


class Sluggish:
    """A client each of whose calls takes 0.15 s."""

    def ask(self) -> str:
        time.sleep(0.15)
        return "answer"


def test_calls_share_their_extra_seconds_only_in_a_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deadline, "CALL_SECONDS", 0.1)
    monkeypatch.setattr(deadline, "EXTRA_SECONDS", 0.2)
    unhurried = deadline.TimeLimitedClient(Sluggish(), in_hurry=lambda: False)
    assert [unhurried.ask() for _ in range(8)] == 8 * ["answer"]
    hurried = deadline.TimeLimitedClient(Sluggish(), in_hurry=lambda: True)
    with pytest.raises(TimeoutError):
        print([hurried.ask() for _ in range(8)])


@pytest.mark.all
@pytest.mark.parametrize("handler", [Broken, Slow])
def test_a_server_that_answers_with_errors_or_too_late_costs_one_warning(
    cli: Cli, tmp_path: Path, serve: Callable[..., str], handler: type[QuietHandler]
) -> None:
    env = {"MLFLOW_TRACKING_URI": serve(tmp_path, handler), "MLFLOW_HTTP_REQUEST_TIMEOUT": "2"}
    result = cli("pipeline", "train", "digits", "--steps", 20, **env)
    assert result.stderr.count("warning: tracking is incomplete") == 1
    cli("pipeline", "sync")
    assert losses(tmp_path) == points(tmp_path)
