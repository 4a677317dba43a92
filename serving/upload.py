"""`--output` behind a URL: worked on here, uploaded when it is whole."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from convline.errors import ConvlineError
from convline.inputs.remote_files import open_file_system
from serving.classify import complete
from serving.job import Job, check
from serving.journal import rejects_path
from serving.summary import Summary


def deliver(url: str, job: Job, run: Callable[[Job], Summary]) -> Summary:
    """Run the job with its journal and table in the current folder, then move the table to `url`.

    Raises ConvlineError where something is at `url` that was not to be replaced, and where it cannot be written.
    """
    system, path = open_file_system(url)
    name = PurePosixPath(path)
    here = Path(f"{name.stem}.{hashlib.sha256(url.encode()).hexdigest()[:8]}.upload{name.suffix}")
    job = replace(job, output=here)
    check(job)
    try:
        exists = system.exists(path)
    # every file system has exceptions of its own
    except Exception as error:
        raise ConvlineError(f"cannot reach {url}: {str(error) or type(error).__name__}") from error
    if exists and job.continues and (summary := _complete(system, path, job, url)):
        return summary
    if exists and not job.overwrite:
        raise ConvlineError(f"{url} exists: choose another name, or replace it with --overwrite")
    summary = run(job)
    try:
        for local, remote in ((rejects_path(here), f"{path}.rejects.jsonl"), (here, path)):  # the table says "done"
            system.put_file(str(local), remote)
    except Exception as error:
        raise ConvlineError(
            f"{here} is whole, but cannot be written to {url}: {error}; --resume tries again"
        ) from error
    for local in (rejects_path(here), here):
        local.unlink()
    return summary


def _complete(system: Any, path: str, job: Job, url: str) -> Summary | None:
    """As `complete`, of a table that is there."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, PurePosixPath(path).name)
        for remote, local in ((path, copy), (f"{path}.rejects.jsonl", rejects_path(copy))):
            system.get_file(remote, str(local))
        return complete(job, copy, url)
