"""`--engine ray`: a classification on a Ray cluster, in many more shards than there are workers.

Each worker runs `serving.classify` on its shard. A store (`<output>.shards`) holds the plan of the job and the finished
shards. If a worker dies, the next worker continues the shard's journal; if the driver dies, the user starts it again
with `--resume`. At the end the table is written from the records of all shards, as a local job writes it from its
journal.
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
from dataclasses import asdict, replace
from typing import IO, Any

from convline.console import log, progress
from convline.cpus import usable_cpus
from convline.errors import ConvlineError
from convline.files import atomic_write, remove_leftovers
from convline.inputs.listing import STDIN
from serving.auto_batch_size import fastest_batch_size
from serving.batch_size import SERVING_BATCH
from serving.classifier import Classifier
from serving.classify import check_unchanged, classify_into_journal, open_predictor
from serving.finished import finished_summary
from serving.job import Job, check_job, journal_header, listing, open_observers
from serving.journal import check_same_job, render
from serving.journal_footer import Footer
from serving.journal_format import JournalRecord, footer_line, json_line
from serving.output_files import finished_journal_path, partial_path, shards_path
from serving.records import Entry
from serving.shard_store import ShardStore, open_shard_store
from serving.shards import ListingFingerprint, NameHasher, fingerprint_listing
from serving.sort_into import sorted_folder
from serving.summary import Summary
from serving.tables import optional_columns

SHARDS_PER_WORKER = 8  # many, so that workers wait only briefly for the last shard
PLAN_KEYS = ("listing", "parts")  # that a plan has beside the settings of the job
RETRIES = 5  # for a shard whose worker died


def classify_on_ray(job: Job, address: str | None, store_name: str | None = None) -> Summary:
    """As `classify`, on the cluster at `address`, or on one that is started here for the job.

    Every worker must see inputs, model and output under the same names. Shards are kept in `store_name` (a folder or
    URL), by default beside the output. Raises ConvlineError as `classify` does, if Ray is missing, and if the worker of
    a shard died too often.
    """
    check_job(job)
    if job.output is None or job.shard is not None or STDIN in job.inputs:
        raise ConvlineError("--engine ray needs an --output file, and cannot be combined with - or --shard")
    if job.rescan:
        raise ConvlineError("--rescan is not for --engine ray; bring the finished table up to date without Ray")
    if partial_path(job.output).exists():
        raise ConvlineError(f"{partial_path(job.output)} holds an unfinished job without Ray; continue it without Ray")
    store = open_shard_store(store_name or str(shards_path(job.output)))
    if not store.exists() and (summary := finished_summary(job, job.output)):
        return summary
    open_observers(job)  # checks their options before the work begins
    with redirect_stdout(sys.stderr):  # Ray reports dead workers on stdout
        ray = _connect(address)
        try:
            job = _choose_provider(job, ray.cluster_resources())
            _check_resources(ray, job)
            with _plan(job, store, int(ray.cluster_resources().get("CPU", 1))) as (job, fingerprint, shards):
                return _run(ray, job, store, fingerprint, shards)
        finally:
            ray.shutdown()


def _connect(address: str | None) -> Any:
    """The module `ray`, connected to a cluster. Raises ConvlineError if that fails."""
    try:
        import ray
    except ImportError as error:
        raise ConvlineError("--engine ray needs Ray: pip install 'convline[cluster]'") from error
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    quiet: dict[str, Any] = {"log_to_driver": False, "configure_logging": False}
    address = address or os.environ.get("RAY_ADDRESS")
    try:
        if address:
            _check_reachable(address)
            ray.init(address=address, **quiet)
        else:
            ray.init(address="local", num_cpus=usable_cpus(), include_dashboard=False, **quiet)
    # Ray has many exceptions of its own for an unreachable cluster
    except Exception as error:
        raise ConvlineError(f"no Ray cluster at {address or 'this machine'}: {error}") from error
    if threading.current_thread() is threading.main_thread():
        for number, handler in handlers.items():
            signal.signal(number, handler)  # Ray has installed its own, which abort
    return ray


def _check_reachable(address: str) -> None:
    """Raises OSError if nothing answers at HOST:PORT; Ray would keep trying for minutes."""
    host, colon, port = address.rpartition("//")[2].rpartition(":")
    if colon:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


def _choose_provider(job: Job, resources: dict[str, float]) -> Job:
    """The job with the same provider for all workers."""
    if job.provider != "auto":
        return job
    return replace(job, provider="cuda" if resources.get("GPU") else "cpu")


def _resources_per_shard(job: Job) -> dict[str, float]:
    return {"CPU": job.threads or 1, **({"GPU": 1} if job.provider in ("cuda", "tensorrt") else {})}


def _check_resources(ray: Any, job: Job) -> None:
    """Raises ConvlineError if no machine of the cluster can run a shard: Ray would wait for one for ever."""
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    for name, amount in _resources_per_shard(job).items():
        most = max((machine.get(name, 0) for machine in machines), default=0)
        if most < amount:
            raise ConvlineError(f"a shard takes {amount:g} {name}; no machine of the cluster has more than {most:g}")


@contextmanager
def _plan(job: Job, store: ShardStore, workers: int) -> Iterator[tuple[Job, ListingFingerprint, int]]:
    """The job with its batch size, the fingerprint of its listing, and the number of shards; locks the store.

    The plan is made once and stored, so that a resumed job has the same.
    """
    if store.exists() and not (job.resume or job.overwrite):
        raise ConvlineError(f"{store.name} holds an unfinished job: --resume continues it, --overwrite starts again")
    with store.lock():
        if job.overwrite:
            store.clear()
        fingerprint = fingerprint_listing(listing(job))
        earlier = store.plan() or {}
        job, header = _settings(job, earlier)
        batches = -(-fingerprint.count // header["batch_size"])
        shards = earlier.get("parts") or max(1, min(batches, SHARDS_PER_WORKER * workers))
        plan = {**header, **dict(zip(PLAN_KEYS, (fingerprint.sha256, shards), strict=True))}
        if earlier:
            check_same_job(store.name, earlier, plan)
        else:
            store.write_plan(plan)
        yield job, fingerprint, shards


def _settings(job: Job, earlier: dict[str, Any]) -> tuple[Job, dict[str, Any]]:
    """The job with its batch size and threshold, and its journal header.

    Opens the model on the CPU for that, and closes it.
    """
    size = SERVING_BATCH if job.batch_size == "auto" else job.batch_size
    with Classifier(job.model, "cpu", job.threads, size, job.external, job.threshold, job.unfamiliar) as classifier:
        classifier.check_top_k(job.top_k)
        if job.batch_size == "auto":
            classifier.batch_size = earlier.get("batch_size") or fastest_batch_size(classifier.model)
        job = replace(job, batch_size=classifier.batch_size, threshold=classifier.threshold)
        return job, {**journal_header(job, classifier), "provider": job.provider}


def _run(ray: Any, job: Job, store: ShardStore, fingerprint: ListingFingerprint, shards: int) -> Summary:
    summary = Summary(job.provider)
    start = time.perf_counter()
    missing = []
    for shard in range(1, shards + 1):
        if store.has(shard):
            summary.resumed += sum(1 for _ in store.records(shard))
        else:
            missing.append(shard)
    try:
        with progress("classify", shards, "shards") as bar:
            bar.update(bar.task_ids[0], completed=shards - len(missing))
            for _ in _run_shards(ray, job, store, fingerprint, shards, missing):
                bar.advance(bar.task_ids[0])
    except BaseException:
        log(f"stopped; {store.name} keeps what is finished: --resume continues from there")
        raise
    _join(job, store, fingerprint, shards, summary)
    summary.finish(time.perf_counter() - start)
    return summary


def _run_shards(
    ray: Any, job: Job, store: ShardStore, fingerprint: ListingFingerprint, shards: int, missing: list[int]
) -> Iterator[int]:
    """Run the missing shards; yields the number of each one when it is done."""
    resources = _resources_per_shard(job)
    limits = {"max_retries": RETRIES, "num_cpus": resources["CPU"], "num_gpus": resources.get("GPU", 0)}
    task = ray.remote(**limits)(classify_shard)
    shard_job = replace(job, threads=job.threads or 1, resume=True, overwrite=False)
    running = {task.remote(shard_job, shard, shards, fingerprint, store.name, os.getcwd()): shard for shard in missing}
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
                f"shard {shard} of {shards} lost its worker {RETRIES + 1} times; check whether its memory suffices"
            ) from error
        yield shard


def classify_shard(
    job: Job, shard: int, shards: int, fingerprint: ListingFingerprint, store_name: str, directory: str
) -> None:
    """Classify one shard into its journal, and publish it in the store when it is complete. Runs on a worker."""
    os.chdir(directory)
    store = open_shard_store(store_name)
    if store.has(shard):
        return
    assert job.batch_size != "auto"
    files = fingerprint.shard(listing(job), shard, shards, job.batch_size)
    with open_predictor(job, files) as (classifier, predict, files):
        header = {**journal_header(job, classifier), "shard": [shard, shards]}
        with store.journal(shard, header) as journal:
            classify_into_journal(journal, job, predict, files, Summary(classifier.provider))
            store.finish(shard, journal)


def _join(job: Job, store: ShardStore, fingerprint: ListingFingerprint, shards: int, summary: Summary) -> None:
    """Write the table and the journal of the finished job from all shards, and delete the shards."""
    assert job.output is not None
    summary.observers = open_observers(job)
    header = {key: value for key, value in (store.plan() or {}).items() if key not in PLAN_KEYS}
    path = finished_journal_path(job.output)
    remove_leftovers(path)
    with atomic_write(path) as journal:
        journal.write(json_line(header))
        records = _joined_records(job, store, fingerprint, shards, summary)
        entries = _written_to(journal, records)
        render(entries, job.output, job.top_k, job.csv_safe, optional_columns(job.threshold, job.unfamiliar))
        footer = Footer.of_output(job.output, sorted_folder(summary.observers))
        journal.write(footer_line(asdict(footer)))
    store.remove()


def _written_to(journal: IO[bytes], records: Iterator[JournalRecord]) -> Iterator[Entry]:
    for record in records:
        journal.write(record.line())
        yield record.entry


def _joined_records(
    job: Job, store: ShardStore, fingerprint: ListingFingerprint, shards: int, summary: Summary
) -> Iterator[JournalRecord]:
    """The records of all shards, which are counted and passed to the observers.

    Raises ConvlineError if the listing has changed.
    """
    names = NameHasher()
    advice = "start from the beginning with --overwrite"
    files = listing(job)
    for shard in range(1, shards + 1):
        for record in store.records(shard):
            names.add(record.entry.path)
            if not summary.observers:
                summary.tally.add(record.entry)
            else:
                summary.add(check_unchanged(next(files, None), record, store.name, advice), record.entry)
            yield record
    fingerprint.check(names)
