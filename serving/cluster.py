"""The same job on a Ray cluster: many more shards than workers, each run by the engine of `serving.classify`.

A shelf (`<output>.shards`) holds what the job is, and each shard that is whole. A worker that dies leaves its journal
to whoever takes its shard next; a driver that dies is started again with `--resume`. At the end the shards' entries,
one after the other, are rendered as the one journal of a local job is.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from typing import Any

from serving.classifier import Classifier, Entry
from serving.classify import complete, fill, opened, unchanged
from serving.console import log, progress
from serving.errors import ConvlineError
from serving.job import BATCH_SIZE, Job, Summary, check, describe, listing, open_onlookers
from serving.knee import knee
from serving.listing import STDIN
from serving.machine import usable_cpus
from serving.results import check_same_job, partial_path, render, shards_path
from serving.shards import Names, Survey, survey
from serving.shelf import Shelf, open_shelf

SHARDS_PER_WORKER = 8  # so that the last ones to finish do not keep the others waiting for long
RETRIES = 5  # of a shard whose worker died


def classify_on_ray(job: Job, address: str | None, shelf_name: str | None = None) -> Summary:
    """As `classify`, on the cluster at `address`, or on one that is started here for the job.

    Inputs, model and output must be where every worker sees them under the same names; shards are kept beside the
    output, or on the shelf that is named. Raises ConvlineError as `classify` does, where Ray is missing, and where a
    shard's worker died again and again.
    """
    check(job)
    if job.output is None or job.shard is not None or job.rescan or STDIN in job.inputs:
        raise ConvlineError("--engine ray needs an --output file, takes no -, and knows neither --shard nor --rescan")
    if partial_path(job.output).exists():
        raise ConvlineError(f"{partial_path(job.output)} is left of a job on one machine; continue that without Ray")
    shelf = open_shelf(shelf_name or str(shards_path(job.output)))
    if not shelf.exists() and (summary := complete(job, job.output)):
        return summary
    open_onlookers(job)
    with redirect_stdout(sys.stderr):  # Ray tells of dead workers on stdout
        ray = _started(address)
        try:
            job = _on(job, ray.cluster_resources())
            _check_resources(ray, job)
            with _plan(job, shelf, int(ray.cluster_resources().get("CPU", 1))) as (job, whole, parts):
                return _run(ray, job, shelf, whole, parts)
        finally:
            ray.shutdown()


def _started(address: str | None) -> Any:
    """Ray, connected."""
    try:
        import ray
    except ImportError as error:
        raise ConvlineError("--engine ray needs Ray: pip install 'convline[cluster]'") from error
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
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
    if threading.current_thread() is threading.main_thread():
        for number, handler in handlers.items():
            signal.signal(number, handler)  # Ray puts its own there, which abort
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


def _needed(job: Job) -> dict[str, float]:
    """What a shard takes of a machine."""
    return {"CPU": job.threads or 1, **({"GPU": 1} if job.provider in ("cuda", "tensorrt") else {})}


def _check_resources(ray: Any, job: Job) -> None:
    """Raises ConvlineError where no machine of the cluster has what a shard takes: Ray would wait for one."""
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    for name, amount in _needed(job).items():
        most = max((machine.get(name, 0) for machine in machines), default=0)
        if most < amount:
            raise ConvlineError(f"a shard takes {amount:g} {name}; no machine of the cluster has more than {most:g}")


@contextmanager
def _plan(job: Job, shelf: Shelf, workers: int) -> Iterator[tuple[Job, Survey, int]]:
    """The job with its batch size, what the listing is, and how many parts it has.

    They are settled once, and kept for whoever resumes the job; only one driver at a time has them.
    """
    if shelf.exists() and not (job.resume or job.overwrite):
        raise ConvlineError(f"{shelf.name} is left of an earlier job: --resume continues it, --overwrite starts again")
    with shelf.lock():
        if job.overwrite:
            shelf.clear()
        whole = survey(listing(job))
        earlier = shelf.plan() or {}
        job, header = _described(job, earlier)
        batches = -(-whole.found // header["batch_size"])
        parts = earlier.get("parts") or max(1, min(batches, SHARDS_PER_WORKER * workers))
        plan = {**header, "listing": whole.sha256, "parts": parts}
        if earlier:
            check_same_job(shelf.name, earlier, plan)
        else:
            shelf.write_plan(plan)
        yield job, whole, parts


def _described(job: Job, earlier: dict[str, Any]) -> tuple[Job, dict[str, Any]]:
    """The job with its batch size settled, and what it is; the model is opened, on the CPU, and closed again."""
    size = BATCH_SIZE if job.batch_size == "auto" else job.batch_size
    with Classifier(job.model, "cpu", job.threads, size, job.foreign) as classifier:
        classifier.check_top_k(job.top_k)
        if job.batch_size == "auto":
            classifier.batch_size = earlier.get("batch_size") or knee(classifier.model)
        job = replace(job, batch_size=classifier.batch_size)
        return job, {**describe(job, classifier), "provider": job.provider}


def _run(ray: Any, job: Job, shelf: Shelf, whole: Survey, parts: int) -> Summary:
    summary = Summary(job.provider)
    began = time.perf_counter()
    missing = []
    for shard in range(1, parts + 1):
        if shelf.has(shard):
            summary.resumed += sum(1 for _ in shelf.records(shard))
        else:
            missing.append(shard)
    try:
        with progress("classify", parts, "shards") as bar:
            bar.update(bar.task_ids[0], completed=parts - len(missing))
            for _ in _finished(ray, job, shelf, whole, parts, missing):
                bar.advance(bar.task_ids[0])
    except BaseException:
        log(f"stopped; {shelf.name} keeps what is finished: --resume continues from there")
        raise
    _join(job, shelf, whole, parts, summary)
    summary.finish(time.perf_counter() - began)
    return summary


def _finished(ray: Any, job: Job, shelf: Shelf, whole: Survey, parts: int, missing: list[int]) -> Iterator[int]:
    """The shards, as they are done."""
    needed = _needed(job)
    limits = {"max_retries": RETRIES, "num_cpus": needed["CPU"], "num_gpus": needed.get("GPU", 0)}
    task = ray.remote(**limits)(classify_shard)
    alone = replace(job, threads=job.threads or 1, resume=True, overwrite=False)
    running = {task.remote(alone, shard, parts, whole, shelf.name, os.getcwd()): shard for shard in missing}
    while running:
        (done,), _ = ray.wait(list(running), num_returns=1)
        shard = running.pop(done)
        try:
            ray.get(done)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, ConvlineError):
                raise error.cause from error
            raise
        except ray.exceptions.RayError as error:
            raise ConvlineError(
                f"shard {shard} of {parts} lost its worker {RETRIES + 1} times; is there memory enough?"
            ) from error
        yield shard


def classify_shard(job: Job, shard: int, parts: int, whole: Survey, shelf_name: str, directory: str) -> None:
    """Run by a worker: one shard into its journal, which gets its name when it is whole."""
    os.chdir(directory)
    shelf = open_shelf(shelf_name)
    if shelf.has(shard):
        return
    assert job.batch_size != "auto"
    files = whole.part(listing(job), shard, parts, job.batch_size)
    with opened(job, files) as (classifier, predict, files):
        header = {**describe(job, classifier), "shard": [shard, parts]}
        with shelf.journal(shard, header) as journal:
            fill(journal, job, predict, files, Summary(classifier.provider))
            shelf.finish(shard, journal)


def _join(job: Job, shelf: Shelf, whole: Survey, parts: int, summary: Summary) -> None:
    """Render the table from all shards, and remove them."""
    assert job.output is not None
    summary.onlookers = open_onlookers(job)
    names = Names()

    def entries() -> Iterator[Entry]:
        files = listing(job)
        for shard in range(1, parts + 1):
            for record in shelf.records(shard):
                names.add(record.entry.path)
                if not summary.onlookers:
                    summary.tally.add(record.entry)
                else:
                    file = unchanged(next(files, None), record, shelf.name, "start from the beginning with --overwrite")
                    summary.add(file, record.entry)
                yield record.entry
        whole.check(names)

    render(entries(), job.output, job.top_k, job.csv_safe)
    shelf.remove()
