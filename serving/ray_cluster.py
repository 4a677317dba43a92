"""The same job on a Ray cluster: many more shards than workers, each run by the engine of `serving.classify`.

A store (`<output>.shards`) holds what the job is, and each shard that is whole. A worker that dies leaves its journal
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

from convline.console import log, progress
from convline.cpus import usable_cpus
from convline.errors import ConvlineError
from convline.inputs.listing import STDIN
from serving.batch_size import fastest_batch_size
from serving.classifier import Classifier
from serving.classify import complete, fill, opened, unchanged
from serving.job import BATCH_SIZE, Job, check, describe, listing, open_observers
from serving.journal import check_same_job, partial_path, render, shards_path
from serving.records import Entry
from serving.shard_store import ShardStore, open_shard_store
from serving.shards import Names, Survey, survey
from serving.summary import Summary

SHARDS_PER_WORKER = 8  # so that the last ones to finish do not keep the others waiting for long
RETRIES = 5  # of a shard whose worker died


def classify_on_ray(job: Job, address: str | None, shelf_name: str | None = None) -> Summary:
    """As `classify`, on the cluster at `address`, or on one that is started here for the job.

    Inputs, model and output must be where every worker sees them under the same names; shards are kept beside the
    output, or on the store that is named. Raises ConvlineError as `classify` does, where Ray is missing, and where a
    shard's worker died again and again.
    """
    check(job)
    if job.output is None or job.shard is not None or job.rescan or STDIN in job.inputs:
        raise ConvlineError("--engine ray needs an --output file, takes no -, and knows neither --shard nor --rescan")
    if partial_path(job.output).exists():
        raise ConvlineError(f"{partial_path(job.output)} is left of a job on one machine; continue that without Ray")
    store = open_shard_store(shelf_name or str(shards_path(job.output)))
    if not store.exists() and (summary := complete(job, job.output)):
        return summary
    open_observers(job)
    with redirect_stdout(sys.stderr):  # Ray tells of dead workers on stdout
        ray = _started(address)
        try:
            job = _on(job, ray.cluster_resources())
            _check_resources(ray, job)
            with _plan(job, store, int(ray.cluster_resources().get("CPU", 1))) as (job, whole, parts):
                return _run(ray, job, store, whole, parts)
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
def _plan(job: Job, store: ShardStore, workers: int) -> Iterator[tuple[Job, Survey, int]]:
    """The job with its batch size, what the listing is, and how many parts it has.

    They are settled once, and kept for whoever resumes the job; only one driver at a time has them.
    """
    if store.exists() and not (job.resume or job.overwrite):
        raise ConvlineError(f"{store.name} is left of an earlier job: --resume continues it, --overwrite starts again")
    with store.lock():
        if job.overwrite:
            store.clear()
        whole = survey(listing(job))
        earlier = store.plan() or {}
        job, header = _described(job, earlier)
        batches = -(-whole.found // header["batch_size"])
        parts = earlier.get("parts") or max(1, min(batches, SHARDS_PER_WORKER * workers))
        plan = {**header, "listing": whole.sha256, "parts": parts}
        if earlier:
            check_same_job(store.name, earlier, plan)
        else:
            store.write_plan(plan)
        yield job, whole, parts


def _described(job: Job, earlier: dict[str, Any]) -> tuple[Job, dict[str, Any]]:
    """The job with its batch size settled, and what it is; the model is opened, on the CPU, and closed again."""
    size = BATCH_SIZE if job.batch_size == "auto" else job.batch_size
    with Classifier(job.model, "cpu", job.threads, size, job.external) as classifier:
        classifier.check_top_k(job.top_k)
        if job.batch_size == "auto":
            classifier.batch_size = earlier.get("batch_size") or fastest_batch_size(classifier.model)
        job = replace(job, batch_size=classifier.batch_size)
        return job, {**describe(job, classifier), "provider": job.provider}


def _run(ray: Any, job: Job, store: ShardStore, whole: Survey, parts: int) -> Summary:
    summary = Summary(job.provider)
    began = time.perf_counter()
    missing = []
    for shard in range(1, parts + 1):
        if store.has(shard):
            summary.resumed += sum(1 for _ in store.records(shard))
        else:
            missing.append(shard)
    try:
        with progress("classify", parts, "shards") as bar:
            bar.update(bar.task_ids[0], completed=parts - len(missing))
            for _ in _finished(ray, job, store, whole, parts, missing):
                bar.advance(bar.task_ids[0])
    except BaseException:
        log(f"stopped; {store.name} keeps what is finished: --resume continues from there")
        raise
    _join(job, store, whole, parts, summary)
    summary.finish(time.perf_counter() - began)
    return summary


def _finished(ray: Any, job: Job, store: ShardStore, whole: Survey, parts: int, missing: list[int]) -> Iterator[int]:
    """The shards, as they are done."""
    needed = _needed(job)
    limits = {"max_retries": RETRIES, "num_cpus": needed["CPU"], "num_gpus": needed.get("GPU", 0)}
    task = ray.remote(**limits)(classify_shard)
    alone = replace(job, threads=job.threads or 1, resume=True, overwrite=False)
    running = {task.remote(alone, shard, parts, whole, store.name, os.getcwd()): shard for shard in missing}
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
    store = open_shard_store(shelf_name)
    if store.has(shard):
        return
    assert job.batch_size != "auto"
    files = whole.part(listing(job), shard, parts, job.batch_size)
    with opened(job, files) as (classifier, predict, files):
        header = {**describe(job, classifier), "shard": [shard, parts]}
        with store.journal(shard, header) as journal:
            fill(journal, job, predict, files, Summary(classifier.provider))
            store.finish(shard, journal)


def _join(job: Job, store: ShardStore, whole: Survey, parts: int, summary: Summary) -> None:
    """Render the table from all shards, and remove them."""
    assert job.output is not None
    summary.observers = open_observers(job)
    names = Names()

    def entries() -> Iterator[Entry]:
        files = listing(job)
        for shard in range(1, parts + 1):
            for record in store.records(shard):
                names.add(record.entry.path)
                if not summary.observers:
                    summary.tally.add(record.entry)
                else:
                    file = unchanged(next(files, None), record, store.name, "start from the beginning with --overwrite")
                    summary.add(file, record.entry)
                yield record.entry
        whole.check(names)

    render(entries(), job.output, job.top_k, job.csv_safe)
    store.remove()
