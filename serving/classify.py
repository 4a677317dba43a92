"""`serving classify`: find files, decode them, run the model, and write each result; with resume and rescan.

Files stream through in batches, in the order of the listing, and only a few batches are in work at once: memory does
not grow with the number of files. `serving.predict` divides the work among processes, `serving.journal` makes it
survive a kill.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
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
from serving.auto_batch_size import fastest_batch_size
from serving.batch_size import SERVING_BATCH
from serving.classifier import Classifier
from serving.finished import check_rescan, finish_output, finished_summary
from serving.job import Job, check_job, journal_header, listing, open_observers, shard_files
from serving.journal import Journal, is_rescan
from serving.journal_format import JournalRecord, read_header, reject_line
from serving.output_files import finished_journal_path, partial_path, shards_path
from serving.predict import PredictBatches, batch_predictor
from serving.records import Entry, Reject
from serving.rescan import EarlierResults
from serving.sort_into import sorted_folder
from serving.summary import Summary
from serving.tables import open_table

if TYPE_CHECKING:
    from convline.console import ProgressBar

MAX_BATCH_LENGTH = 64  # times the batch size: all files of a batch, those with an earlier result included

FileEntry = tuple[InputFile, Entry]


def classify(job: Job) -> Summary:
    """Classify every file of the inputs into the job's output.

    Raises ConvlineError for inputs, a model or an output that cannot be used; nothing is written then.
    """
    check_job(job)
    if job.output is not None and shards_path(job.output).exists():
        raise ConvlineError(
            f"{shards_path(job.output)} holds an unfinished job on Ray; continue it with --engine ray --resume"
        )
    if job.output is not None and (summary := _summary_if_finished(job, job.output)):
        return summary
    observers = open_observers(job)
    files, fingerprint = shard_files(job)
    with open_predictor(job, files) as (classifier, predict, files):
        summary = Summary(classifier.provider, observers=observers)
        start = time.perf_counter()
        if job.output is None:
            batches = classify_in_batches(predict, files, classifier.batch_size)
            _classify_to_stdout(job, batches, summary, classifier.optional_columns)
            summary.finish(time.perf_counter() - start)
        else:
            header = journal_header(job, classifier, fingerprint)
            options = {"resume": job.continues, "overwrite": job.overwrite, "rescan": job.rescan}
            with Journal(partial_path(job.output), header, **options) as journal:
                classify_into_journal(journal, job, predict, files, summary)
                # before the earlier journal is replaced, which says what to remove from the folder of --sort-into
                summary.finish(time.perf_counter() - start)
                finish_output(job, journal, classifier.optional_columns, sorted_folder(observers))
    return summary


def _summary_if_finished(job: Job, output: Path) -> Summary | None:
    """The summary of a finished job that is resumed; None for a job that has work to do.

    Raises ConvlineError for a finished job that cannot be rescanned.
    """
    is_unfinished = partial_path(output).exists() and (
        not finished_journal_path(output).exists() or is_rescan(partial_path(output), rescan=False)
    )
    if is_unfinished or not output.exists():
        return None
    if job.rescan:
        check_rescan(output)
        return None
    return finished_summary(job, output)


@contextmanager
def open_predictor(
    job: Job, files: Iterator[InputFile]
) -> Iterator[tuple[Classifier, PredictBatches, Iterator[InputFile]]]:
    """The opened model, the function that predicts with it, and all files again.

    Reads a batch of files ahead. If these are all files, the model runs in this process on all threads, and the other
    processes only decode.
    """
    size = SERVING_BATCH if job.batch_size == "auto" else job.batch_size
    first_files = list(islice(files, size + 1))
    is_single_batch = len(first_files) <= size
    processes = min(job.threads or usable_cpus(), len(first_files))
    threads = job.threads if is_single_batch else 1
    with Classifier(job.model, job.provider, threads, size, job.external, job.threshold, job.unfamiliar) as classifier:
        classifier.check_top_k(job.top_k)
        if job.batch_size == "auto":
            classifier.batch_size = _journal_batch_size(job) or fastest_batch_size(classifier.model)
        with batch_predictor(classifier, job.top_k, processes, shares_batches=is_single_batch) as predict:
            yield classifier, predict, chain(_release_each(first_files), files)


def _release_each(files: list[InputFile]) -> Iterator[InputFile]:
    """Yield the files and drop them from the list: a member of an archive holds its bytes in memory."""
    files.reverse()
    while files:
        yield files.pop()


def _journal_batch_size(job: Job) -> int | None:
    """The batch size that the job has chosen which is continued or rescanned; None without such a job."""
    if job.output is None or not job.continues:
        return None
    header = read_header(partial_path(job.output))
    if header is None and job.output.exists():
        header = read_header(finished_journal_path(job.output))
    return header["batch_size"] if header else None


def _classify_to_stdout(
    job: Job, batches: Iterator[list[FileEntry]], summary: Summary, optional: Sequence[str]
) -> None:
    with open_table(sys.stdout.buffer, job.stdout_format, job.top_k, job.csv_safe, optional) as table:
        for batch in batches:
            for file, entry in batch:
                summary.add(file, entry)
                if isinstance(entry, Reject):
                    log(reject_line(entry))
                else:
                    table.write(entry)
            table.flush()


def classify_into_journal(
    journal: Journal, job: Job, predict: PredictBatches, files: Iterator[InputFile], summary: Summary
) -> None:
    """Write a record for each file, continuing after the records of an interrupted job."""
    earlier = None
    if journal.is_rescan:
        earlier = EarlierResults(journal.set_aside())
    else:
        summary.resumed = journal.keep_whole_batches(journal.batch_size)
        _skip_recorded(files, journal, summary)
    try:
        with progress("classify", None, "files") as bar:
            _count_in_background(job, bar)
            for batch in classify_in_batches(predict, files, journal.batch_size, earlier):
                journal.append(JournalRecord(entry, file.version) for file, entry in batch)
                for file, entry in batch:
                    summary.add(file, entry)
                bar.update(bar.task_ids[0], completed=summary.tally.found)
        journal.sync()
        if earlier is not None:
            summary.rescan = earlier.counts()
            summary.resumed = summary.rescan.kept
    except BaseException:
        log(f"stopped; {journal.path} keeps {summary.tally.found} results: --resume continues from there")
        raise
    finally:
        if earlier is not None:
            earlier.close()


def _skip_recorded(files: Iterator[InputFile], journal: Journal, summary: Summary) -> None:
    """Skip the files that the journal already holds. Raises ConvlineError where the listing or a file has changed."""
    advice = "keep what is still valid with --rescan, or start from the beginning with --overwrite"
    for record in journal.records():
        summary.add(check_unchanged(next(files, None), record, journal.path, advice), record.entry)


def check_unchanged(file: InputFile | None, record: JournalRecord, name: Path | str, advice: str) -> InputFile:
    """Return `file`, the next one of the listing. Raises ConvlineError if it is not the file of the next record of the
    job `name`.
    """
    changed, path = f"the input changed since {name} was started", record.entry.path
    if file is None or file.path != path:
        now = file.path if file else "nothing"
        raise ConvlineError(f"{changed} ({path} then, {now} now); {advice}")
    file.record_version()
    if file.version != record.stamp:
        raise ConvlineError(f"{changed} ({path} was written again); {advice}")
    return file


class _Batch(list[InputFile]):
    """The files of a batch that the model must classify. `planned` has all its files, in order, with earlier results.

    A batch carries its earlier results until the new ones arrive, so that both are merged in the order of the listing.
    """

    def __init__(self, planned: list[tuple[InputFile, Entry | None]]) -> None:
        super().__init__(file for file, earlier in planned if earlier is None)
        self.planned = planned

    def __reduce__(self) -> tuple[type[list[InputFile]], tuple[list[InputFile]]]:
        return list, (list(self),)  # a worker process needs the files alone

    def merged(self, entries: Iterable[Entry]) -> list[FileEntry]:
        """All files of the batch with their results; `entries` are those of the files that were classified."""
        new = iter(entries)
        return [(file, earlier or next(new)) for file, earlier in self.planned]


def classify_in_batches(
    predict: PredictBatches, files: Iterator[InputFile], batch_size: int, earlier: EarlierResults | None = None
) -> Iterator[list[FileEntry]]:
    """The files with their entries, batch by batch; a file with a valid earlier result is not classified again."""
    for batch, entries in predict(_batches(files, batch_size, earlier)):
        yield batch.merged(entries)


def _batches(files: Iterator[InputFile], size: int, earlier: EarlierResults | None) -> Iterator[_Batch]:
    """Batches of `size` files to classify, together with the files between them that have a result.

    A batch ends early where it holds very many of these.
    """
    while planned := _plan_batch(files, size, earlier):
        yield _Batch(planned)


def _plan_batch(
    files: Iterator[InputFile], size: int, earlier: EarlierResults | None
) -> list[tuple[InputFile, Entry | None]]:
    planned: list[tuple[InputFile, Entry | None]] = []
    to_classify = 0
    for file in files:
        file.record_version()
        entry = earlier.find(file) if earlier else None
        planned.append((file, entry))
        to_classify += entry is None
        if to_classify == size or len(planned) == MAX_BATCH_LENGTH * size:
            break
    return planned


def _count_in_background(job: Job, bar: ProgressBar) -> None:
    """Give the progress bar the total number of files, where the names alone tell it, from another thread."""
    if bar.disable or job.shard or STDIN in job.inputs or any(is_archive(name) or is_url(name) for name in job.inputs):
        return

    def count() -> None:
        bar.update(bar.task_ids[0], total=sum(1 for _ in listing(job)))

    Thread(target=count, daemon=True).start()
