"""sync.json: how far a run has been sent to MLflow."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from convline.console import log
from convline.files import atomic_write
from pipeline.run import Run


@dataclass
class Cursor:
    """How far the run `run_id` has been sent to the server at `uri`, which has no password in it: of metrics.jsonl
    everything before `step`, and `points` of it (it may be cut back and written again); of summaries.jsonl everything
    up to `summarized`, its images up to `imaged`; of watched.jsonl the first `watched` points.

    `mlflow_run` is empty until there is one; `problem` is what the last attempt met, None where it went well."""

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
        """Where the last sync left off; at the start where there was none, or to another server."""
        try:
            content = _path(run).read_bytes()
        except FileNotFoundError:
            return cls(uri, run.info["id"])
        try:
            fields = json.loads(content)
            told = fields.pop("digest", None)  # none of an older convline's
            if told is not None and told != _digest(fields):
                raise ValueError("it is not what was written")
            cursor = cls(**fields)
        except (ValueError, TypeError, KeyError, AttributeError):
            log(f"warning: {_path(run)} is damaged; MLflow is asked anew for the run, which is sent from its start")
            return cls(uri, run.info["id"])
        # whether a server has the run it says itself: another user's, say, who is not kept
        return cursor if (cursor.uri, cursor.run_id) == (uri, run.info["id"]) else cls(uri, run.info["id"])

    def keep(self, run: Run) -> None:
        """Write it to the run."""
        fields = asdict(self)
        with atomic_write(_path(run), "w") as file:
            json.dump({**fields, "digest": _digest(fields)}, file, indent=2)

    def is_new(self, step: int, nth: int) -> bool:
        """Whether the `nth` point of `step` (from 0) in metrics.jsonl has not been sent."""
        return step > self.step or (step == self.step and nth >= self.points)


def _path(run: Run) -> Path:
    return run.folder / "sync.json"


def _digest(fields: dict[str, Any]) -> str:
    """By which a damaged file is known: a cursor that is too far would lose points."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]
