"""The cursor in sync.json: how far a run has been sent to MLflow, and whether the last attempt failed."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from convline.console import log
from convline.files import atomic_write
from convline.mlflow_client import tracking_uri
from convline.secrets import without_credentials
from pipeline.run import Run


@dataclass
class Cursor:
    """How far the run `run_id` has been sent to the server at `uri` (without its password).

    Of metrics.jsonl: all points before `step`, and the first `points` of that step (the file may be cut back and
    written again). Of summaries.jsonl: all up to step `summarized`, their images up to step `imaged`. Of watched.jsonl:
    the first `watched` points. `artifacts` are SHA-256 hashes by file name.

    `mlflow_run` is empty until there is one. `problem` is the error of the last attempt, None if it succeeded.
    """

    uri: str
    run_id: str
    mlflow_run: str = ""
    step: int = -1
    points: int = 0
    watched: int = 0
    summarized: int = -1
    imaged: int = -1
    artifacts: dict[str, str] = field(default_factory=dict)
    problem: str | None = None

    @classmethod
    def read(cls, run: Run, uri: str) -> Cursor:
        """The run's cursor; one at the start if there is none, or if it is for another server or damaged."""
        start = cls(uri, run.info["id"])
        try:
            content = _path(run).read_bytes()
        except FileNotFoundError:
            return start
        try:
            fields = json.loads(content)
            digest = fields.pop("digest", None)  # older versions of convline did not write it
            if digest is not None and digest != _digest(fields):
                raise ValueError("the digest is wrong")
            cursor = cls(**fields)
        except (ValueError, TypeError, KeyError, AttributeError):
            log(f"warning: {_path(run)} is damaged; the run is sent to MLflow again from its start")
            return start
        # whether the server has the MLflow run, it is asked itself (`Sender._open_run`): the uri does not keep the user
        return cursor if (cursor.uri, cursor.run_id) == (uri, run.info["id"]) else start

    def write(self, run: Run) -> None:
        fields = asdict(self)
        with atomic_write(_path(run), "w") as file:
            json.dump({**fields, "digest": _digest(fields)}, file, indent=2)

    def is_new(self, step: int, nth: int) -> bool:
        """Whether the `nth` point of `step` (from 0) in metrics.jsonl has not been sent."""
        return step > self.step or (step == self.step and nth >= self.points)


def has_failed(run: Run, since: float) -> bool:
    """Whether the last attempt to send the run failed, if it was made after `since` (seconds since the epoch)."""
    try:
        is_recent = _path(run).stat().st_mtime >= since
    except FileNotFoundError:
        return False
    return is_recent and Cursor.read(run, without_credentials(tracking_uri())).problem is not None


def _path(run: Run) -> Path:
    return run.folder / "sync.json"


def _digest(fields: dict[str, Any]) -> str:
    """Detects a damaged file: points would be lost with a cursor that is too far ahead."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]
