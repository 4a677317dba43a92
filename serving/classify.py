"""The bounded pipeline: find -> decode -> infer -> write.

Files stream through in batches of the listing, a few of them ahead of the journal; memory does not grow with
the number of files. `predict` says how the work is divided, `results` how it survives a kill.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING

from convline.console import log, progress
from convline.cpus import usable_cpus
from convline.errors import ConvlineError
from convline.inputs.archives import is_archive
from convline.inputs.input_file import InputFile
from convline.inputs.listing import STDIN, is_url
from serving.batch_size import fastest_batch_size
from serving.classifier import Classifier
from serving.job import BATCH_SIZE, Job, check, describe, listing, open_observers, part
from serving.journal import (
    Journal,
    Record,
    before_path,
    partial_path,
    read_finished,
    read_header,
    reject_line,
    render,
    shards_path,
)
from serving.predict import Predict, predictor
from serving.records import Entry, Reject
from serving.rescan import Kept
from serving.summary import Summary
from serving.tables import open_table

if TYPE_CHECKING:
    from convline.console import ProgressBar

KEPT_AT_ONCE = 64  # batches


def classify(job: Job) -> Summary:
    """Classify every file of the inputs into the job's output.

    Raises ConvlineError for inputs, a model or an output that will not do; nothing is written then.
    """
    check(job)
    if job.output is not None and shards_path(job.output).exists():
        raise ConvlineError(
            f"{shards_path(job.output)} is left of a job on Ray; continue that with --engine ray --resume"
        )
    if job.output is not None and not partial_path(job.output).exists() and (summary := complete(job, job.output)):
        return summary
    observers = open_observers(job)
    files, whole = part(job)
    with opened(job, files) as (classifier, predict, files):
        summary = Summary(classifier.provider, observers=observers)
        began = time.perf_counter()
        if job.output is None:
            _to_stdout(job, classified(predict, files, classifier.batch_size), summary)
        else:
            header = describe(job, classifier, whole)
            with Journal(partial_path(job.output), header, resume=job.continues, overwrite=job.overwrite) as journal:
                fill(journal, job, predict, files, summary)
                render((record.entry for record in journal.records()), job.output, job.top_k, job.csv_safe)
                journal.drop()
        summary.finish(time.perf_counter() - began)
    return summary


def complete(job: Job, output: Path, name: str | None = None) -> Summary | None:
    """The summary of a job that is to be resumed and whose output (called `name`) is there already; else None.

    Raises ConvlineError where the output is of other files.
    """
    if not (job.continues and output.exists()):
        return None
    summary = Summary("nothing", observers=open_observers(replace(job, sort_into=None)))
    for file, entry in read_finished(output, part(job)[0], job.csv_safe):
        summary.add(file, entry)
    made = f", but to make {job.report} again" if job.report else ""
    log(f"{name or output} is complete; there is nothing to resume{made}")
    summary.resumed = summary.tally.found
    summary.finish(0)
    return summary


@contextmanager
def opened(job: Job, files: Iterator[InputFile]) -> Iterator[tuple[Classifier, Predict, Iterator[InputFile]]]:
    """The model, what predicts with it, and the files, of which the first ones were looked at.

    The model runs on what fits into one batch here, on all threads; the processes that decode it share it.
    """
    size = BATCH_SIZE if job.batch_size == "auto" else job.batch_size
    first = list(islice(files, size + 1))
    is_small = len(first) <= size
    processes = min(job.threads or usable_cpus(), len(first))
    threads = job.threads if is_small else 1
    with Classifier(job.model, job.provider, threads, size, job.external) as classifier:
        classifier.check_top_k(job.top_k)
        if job.batch_size == "auto":
            classifier.batch_size = _pinned(job) or fastest_batch_size(classifier.model)
        with predictor(classifier, job.top_k, processes, shares_batches=is_small) as predict:
            yield classifier, predict, chain(_emptied(first), files)


def _emptied(files: list[InputFile]) -> Iterator[InputFile]:
    """Files out of an archive hold its bytes: nobody should hold them any longer."""
    files.reverse()
    while files:
        yield files.pop()


def _pinned(job: Job) -> int | None:
    """The batch size that an interrupted job had settled on."""
    header = read_header(partial_path(job.output)) if job.output and job.continues else None
    return header["batch_size"] if header else None


def _to_stdout(job: Job, batches: Iterator[list[Classified]], summary: Summary) -> None:
    with open_table(sys.stdout.buffer, job.stdout_format, job.top_k, job.csv_safe) as table:
        for batch in batches:
            for file, entry in batch:
                summary.add(file, entry)
                if isinstance(entry, Reject):
                    log(reject_line(entry))
                else:
                    table.write(entry)
            table.flush()


def fill(journal: Journal, job: Job, predict: Predict, files: Iterator[InputFile], summary: Summary) -> None:
    """Write an entry for each file, after those that an interrupted job has left."""
    kept = None
    if job.rescan or before_path(journal.path).exists():
        kept = Kept(journal.set_aside())
    else:
        summary.resumed = journal.keep_whole_batches(journal.batch_size)
        _skip(files, journal, summary)
    try:
        with progress("classify", None, "files") as bar:
            _count_beside(job, bar)
            for batch in classified(predict, files, journal.batch_size, kept):
                journal.append(Record(entry, file.version) for file, entry in batch)
                for file, entry in batch:
                    summary.add(file, entry)
                bar.update(bar.task_ids[0], completed=summary.tally.found)
        journal.sync()
    except BaseException:
        log(f"stopped; {journal.path} keeps {summary.tally.found} results: --resume continues from there")
        raise
    if kept is not None:
        summary.resumed = kept.found


def _skip(files: Iterator[InputFile], journal: Journal, summary: Summary) -> None:
    """Pass over what the journal already holds, making sure that it is the same listing of the same files."""
    advice = "keep what is still valid with --rescan, or start from the beginning with --overwrite"
    for record in journal.records():
        summary.add(unchanged(next(files, None), record, journal.path, advice), record.entry)


def unchanged(file: InputFile | None, record: Record, name: Path | str, advice: str) -> InputFile:
    """The file of a record that was begun at `name`. Raises ConvlineError where it is another one now."""
    changed, path = f"the input changed since {name} was begun", record.entry.path
    if file is None or file.path != path:
        now = file.path if file else "nothing"
        raise ConvlineError(f"{changed} ({path} then, {now} now); {advice}")
    file.record_version()
    if file.version != record.stamp:
        raise ConvlineError(f"{changed} ({path} is another file now); {advice}")
    return file


Classified = tuple[InputFile, Entry]


def classified(
    predict: Predict, files: Iterator[InputFile], batch_size: int, kept: Kept | None = None
) -> Iterator[list[Classified]]:
    """The files with their entries, batch by batch; what is kept is not classified again."""
    planned: deque[list[tuple[InputFile, Entry | None]]] = deque()

    def unknown() -> Iterator[list[InputFile]]:
        while batch := _next_batch(files, batch_size, kept):
            planned.append(batch)
            yield [file for file, known in batch if known is None]

    for entries in predict(unknown()):
        fresh = iter(entries)
        yield [(file, known or next(fresh)) for file, known in planned.popleft()]


def _next_batch(files: Iterator[InputFile], size: int, kept: Kept | None) -> list[tuple[InputFile, Entry | None]]:
    """As many files as bring `size` that have to be classified, or many that need not be."""
    batch: list[tuple[InputFile, Entry | None]] = []
    unknown = 0
    for file in files:
        file.record_version()
        known = kept.find(file) if kept else None
        batch.append((file, known))
        unknown += known is None
        if unknown == size or len(batch) == KEPT_AT_ONCE * size:
            break
    return batch


def _count_beside(job: Job, bar: ProgressBar) -> None:
    """Tell the bar how many files there are, once that is known: it needs no more than their names."""
    if bar.disable or job.shard or STDIN in job.inputs or any(is_archive(name) or is_url(name) for name in job.inputs):
        return

    def count() -> None:
        bar.update(bar.task_ids[0], total=sum(1 for _ in listing(job)))

    Thread(target=count, daemon=True).start()
