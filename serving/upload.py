"""`--output URL`: write the table in the current folder, and upload it to S3 and the like when it is complete."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from convline.errors import ConvlineError
from convline.inputs.remote_files import open_file_system
from serving.finished import finished_summary
from serving.job import Job, check_job
from serving.output_files import finished_journal_path, rejects_path
from serving.summary import Summary


def classify_and_upload(url: str, job: Job, run: Callable[[Job], Summary]) -> Summary:
    """Run the job with its journal and table in the current folder, then move the table to `url`.

    Raises ConvlineError if `url` exists and may not be replaced or cannot be rescanned, and if it cannot be written.
    """
    system, path = open_file_system(url)
    name = PurePosixPath(path)
    local_table = Path(f"{name.stem}.{hashlib.sha256(url.encode()).hexdigest()[:8]}.upload{name.suffix}")
    job = replace(job, output=local_table)
    check_job(job)
    try:
        exists = system.exists(path)
    # each file system of fsspec raises exceptions of its own
    except Exception as error:
        raise ConvlineError(f"cannot reach {url}: {str(error) or type(error).__name__}") from error
    if exists and job.rescan:
        raise ConvlineError(
            f"{url} exists, and --rescan can bring only local tables up to date; replace it with --overwrite"
        )
    if exists and job.resume and (summary := _finished_summary(system, path, job, url)):
        return summary
    if exists and not job.overwrite:
        raise ConvlineError(f"{url} exists: choose another name, or replace it with --overwrite")
    summary = run(job)
    local_rejects = rejects_path(local_table)
    try:
        # the table last: where it exists, the job is done
        for local, remote in ((local_rejects, f"{path}.rejects.jsonl"), (local_table, path)):
            system.put_file(str(local), remote)
    except Exception as error:
        raise ConvlineError(
            f"{local_table} is complete, but cannot be uploaded to {url}: {error}; --resume tries again"
        ) from error
    finished_journal_path(local_table).unlink(missing_ok=True)
    for local in (local_rejects, local_table):
        local.unlink()
    return summary


def _finished_summary(system: Any, path: str, job: Job, url: str) -> Summary | None:
    """As `finished_summary`, for a table at a URL, which is downloaded."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, PurePosixPath(path).name)
        for remote, local in ((path, copy), (f"{path}.rejects.jsonl", rejects_path(copy))):
            system.get_file(remote, str(local))
        return finished_summary(job, copy, url)
