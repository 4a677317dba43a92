"""The same job on a Ray cluster: many more shards than workers, each run by the engine of `serving.classify`.

`<output>.shards` holds what the job is, and each shard's journal, which becomes `<shard>.jsonl` when it is whole. A
worker that dies leaves its journal to whoever takes its shard next; a driver that dies is started again with
`--resume`. At the end the shards' entries, one after the other, are rendered as the one journal of a local job is.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

from serving.classifier import Classifier, Entry, Prediction
from serving.classify import BATCH_SIZE, Job, Summary, check, describe, fill, listing, opened
from serving.console import log, progress
from serving.errors import ConvlineError
from serving.files import atomic_write
from serving.knee import knee
from serving.machine import usable_cpus
from serving.results import Journal, read_records, render
from serving.shards import Survey, survey
from serving.sorting import Sorter

SHARDS_PER_WORKER = 8  # so that the last ones to finish do not keep the others waiting for long
RETRIES = 5  # of a shard whose worker died


def classify_on_ray(job: Job, address: str | None) -> Summary:
    """As `classify`, on the cluster at `address`, or on one that is started here for the job.

    Inputs, model and output must be where every worker sees them under the same names. Raises ConvlineError as
    `classify` does, where Ray is missing, and where a shard's worker died again and again.
    """
    check(job)
    if job.output is None or job.shard is not None:
        raise ConvlineError("--engine ray needs an --output file, and makes the shards itself")
    with redirect_stdout(sys.stderr):  # Ray tells of dead workers on stdout
        ray = _started(address)
        try:
            job = _on(job, ray.cluster_resources())
            with _plan(job, int(ray.cluster_resources().get("CPU", 1))) as (job, folder, whole, parts):
                return _run(ray, job, folder, whole, parts)
        finally:
            ray.shutdown()


def shards_path(output: Path) -> Path:
    return output.with_name(output.name + ".shards")


def _started(address: str | None) -> Any:
    """Ray, connected."""
    try:
        import ray
    except ImportError as error:
        raise ConvlineError("--engine ray needs Ray: pip install 'convline[cluster]'") from error
    quiet: dict[str, Any] = {"log_to_driver": False, "configure_logging": False}
    address = address or os.environ.get("RAY_ADDRESS")
    try:
        if address:
            _reach(address)
            ray.init(address=address, **quiet)
        else:
            ray.init(address="local", num_cpus=usable_cpus(), include_dashboard=False, **quiet)
    # Ray has many exceptions of its own for a cluster that is not there
    except Exception as error:
        raise ConvlineError(f"no Ray cluster at {address or 'this machine'}: {error}") from error
    return ray


def _reach(address: str) -> None:
    """Raises OSError where nobody answers at HOST:PORT; Ray would go on trying for minutes."""
    host, colon, port = address.rpartition("//")[2].rpartition(":")
    if colon:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


def _on(job: Job, resources: dict[str, float]) -> Job:
    """The job with its provider settled for all workers."""
    if job.provider != "auto":
        return job
    return replace(job, provider="cuda" if resources.get("GPU") else "cpu")


@contextmanager
def _plan(job: Job, workers: int) -> Iterator[tuple[Job, Path, Survey, int]]:
    """The job with its batch size, where its shards are, what the listing is, and how many parts it has.

    They are settled once, and kept for whoever resumes the job; only one driver at a time has them.
    """
    assert job.output is not None
    folder = shards_path(job.output)
    if folder.exists() and not (job.resume or job.overwrite):
        raise ConvlineError(f"{folder} is left of an earlier job: --resume continues it, --overwrite starts again")
    if job.overwrite:
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("wb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConvlineError(f"another job is writing {folder}; wait for it or choose another output") from error
        whole = survey(listing(job))
        plan = folder / "job.json"
        earlier = json.loads(plan.read_bytes()) if plan.exists() else {}
        job, header = _described(job, earlier)
        told = {**header, "listing": whole.sha256}
        if changed := [key for key in told if earlier and earlier.get(key) != told[key]]:
            raise ConvlineError(
                f"{folder} belongs to a job with another {', '.join(changed)}; "
                "repeat that job's command, or start from the beginning with --overwrite"
            )
        batches = -(-whole.found // header["batch_size"])
        parts = earlier.get("parts") or max(1, min(batches, SHARDS_PER_WORKER * workers))
        if not earlier:
            with atomic_write(plan) as file:
                file.write(json.dumps({**told, "parts": parts}).encode())
        yield job, folder, whole, parts


def _described(job: Job, earlier: dict[str, Any]) -> tuple[Job, dict[str, Any]]:
    """The job with its batch size settled, and what it is; the model is opened, on the CPU, and closed again."""
    size = BATCH_SIZE if job.batch_size == "auto" else job.batch_size
    with Classifier(job.model, "cpu", job.threads, size, job.foreign) as classifier:
        classifier.check_top_k(job.top_k)
        if job.batch_size == "auto":
            classifier.batch_size = earlier.get("batch_size") or knee(classifier.model)
        job = replace(job, batch_size=classifier.batch_size)
        return job, {**describe(job, classifier), "provider": job.provider}


def _run(ray: Any, job: Job, folder: Path, whole: Survey, parts: int) -> Summary:
    assert job.output is not None
    summary = Summary(job.provider)
    began = time.perf_counter()
    missing = [index for index in range(1, parts + 1) if not _shard(folder, index).exists()]
    summary.resumed = sum(_length(_shard(folder, index)) for index in range(1, parts + 1) if index not in missing)
    try:
        with progress("classify", parts, "shards") as bar:
            bar.update(bar.task_ids[0], completed=parts - len(missing))
            for _ in _finished(ray, job, folder, whole, parts, missing):
                bar.advance(bar.task_ids[0])
    except BaseException:
        log(f"stopped; {folder} keeps what is finished: --resume continues from there")
        raise
    _join(job, folder, whole, parts, summary)
    summary.seconds = time.perf_counter() - began
    return summary


def _finished(ray: Any, job: Job, folder: Path, whole: Survey, parts: int, missing: list[int]) -> Iterator[int]:
    """The shards, as they are done."""
    on_gpu = job.provider in ("cuda", "tensorrt")
    cpus = job.threads or 1
    task = ray.remote(max_retries=RETRIES, num_cpus=cpus, num_gpus=int(on_gpu))(classify_shard)
    alone = replace(job, threads=cpus, resume=True, overwrite=False)
    running = {task.remote(alone, (index, parts), whole, str(folder), os.getcwd()): index for index in missing}
    while running:
        (done,), _ = ray.wait(list(running), num_returns=1)
        index = running.pop(done)
        try:
            ray.get(done)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, ConvlineError):
                raise error.cause from error
            raise
        except ray.exceptions.RayError as error:
            raise ConvlineError(
                f"shard {index} of {parts} lost its worker {RETRIES + 1} times; is there memory enough?"
            ) from error
        yield index


def classify_shard(job: Job, shard: tuple[int, int], whole: Survey, folder: str, directory: str) -> None:
    """Run by a worker: one shard into its journal, which gets its name when it is whole."""
    os.chdir(directory)
    target = _shard(Path(folder), shard[0])
    if target.exists():
        return
    assert job.batch_size != "auto"
    files = whole.part(listing(job), *shard, job.batch_size)
    with opened(job, files) as (classifier, predict, files):
        header = {**describe(job, classifier), "shard": list(shard)}
        with Journal(target.with_suffix(".partial"), header, resume=True, overwrite=False) as journal:
            fill(journal, job, predict, files, Summary(classifier.provider))
            journal.path.rename(target)


def _join(job: Job, folder: Path, whole: Survey, parts: int, summary: Summary) -> None:
    """Render the table from all shards, and remove them."""
    assert job.output is not None
    sorter = Sorter(job.sort_into, tuple(job.inputs), resume=job.resume) if job.sort_into else None
    digest = hashlib.sha256()

    def entries() -> Iterator[Entry]:
        files = listing(job)
        for index in range(1, parts + 1):
            for record in read_records(_shard(folder, index)):
                digest.update(os.fsencode(record.entry.path) + b"\0")
                summary.tally.add(record.entry)
                if sorter and (file := next(files)) and isinstance(record.entry, Prediction):
                    sorter.place(file, record.entry)
                yield record.entry
        if digest.hexdigest() != whole.sha256:
            raise ConvlineError(
                f"the input changed while {folder} was filled; start from the beginning with --overwrite"
            )

    render(entries(), job.output, job.top_k)
    shutil.rmtree(folder)


def _shard(folder: Path, index: int) -> Path:
    return folder / f"{index:05}.jsonl"


def _length(path: Path) -> int:
    return sum(1 for _ in read_records(path))
