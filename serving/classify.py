"""The bounded pipeline: find -> decode -> infer -> write.

Files stream through in batches of the listing, a few of them ahead of the journal; memory does not grow with
the number of files. `predict` says how the work is divided, `results` how it survives a kill.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any, Literal

from serving.archives import is_archive
from serving.classifier import Classifier, Entry, Prediction, Reject
from serving.console import log, progress
from serving.errors import ConvlineError
from serving.foreign import Foreign
from serving.found import Found, OnDisk
from serving.knee import knee
from serving.listing import STDIN, find, is_url
from serving.machine import usable_cpus
from serving.model import Provider
from serving.predict import Predict, predictor
from serving.rescan import Kept
from serving.results import (
    Journal,
    Record,
    Tally,
    before_path,
    compare_finished,
    partial_path,
    read_header,
    reject_line,
    rejects_path,
    render,
    shards_path,
)
from serving.shards import Survey, survey
from serving.sorting import Sorter, folder_with
from serving.tables import Format, open_table, table_format

if TYPE_CHECKING:
    from rich.progress import Progress

BATCH_SIZE = 64
KEPT_AT_ONCE = 64  # batches


@dataclass(frozen=True)
class Job:
    """What to classify, with what, to where. `output` None is stdout, in `stdout_format`."""

    inputs: Sequence[str]
    model: Path | str
    output: Path | None = None
    stdout_format: Format = "csv"
    top_k: int = 1
    batch_size: int | Literal["auto"] = BATCH_SIZE
    provider: Provider = "auto"
    threads: int | None = None
    resume: bool = False
    overwrite: bool = False
    rescan: bool = False
    sort_into: Path | None = None
    shard: tuple[int, int] | None = None
    foreign: Foreign | None = None

    @property
    def continues(self) -> bool:
        return self.resume or self.rescan


@dataclass
class Summary:
    """How a job ended."""

    provider: str
    seconds: float = 0.0
    resumed: int = 0
    tally: Tally = field(default_factory=Tally)
    sorter: Sorter | None = None

    def add(self, file: Found, entry: Entry) -> None:
        """Count an entry, and sort its file."""
        self.tally.add(entry)
        if self.sorter is not None and isinstance(entry, Prediction):
            self.sorter.place(file, entry)

    @property
    def images_per_second(self) -> float:
        return (self.tally.found - self.resumed) / self.seconds if self.seconds else 0.0

    def to_dict(self) -> dict[str, Any]:
        return {
            "found": self.tally.found,
            "classified": self.tally.classified,
            "rejected": self.tally.rejected,
            "rejects_by_reason": dict(sorted(self.tally.reasons.items())),
            "labels": dict(sorted(self.tally.labels.items())),
            "resumed": self.resumed,
            "seconds": round(self.seconds, 3),
            "images_per_second": round(self.images_per_second, 1),
            "provider": self.provider,
        }

    def sentence(self) -> str:
        tally = self.tally
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(tally.reasons.items()))
        return (
            f"classified {tally.classified} + rejected {tally.rejected} == found {tally.found}"
            f"{f' ({reasons})' if reasons else ''}; {self.images_per_second:.0f} images/s on {self.provider}"
        )


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
    sorter = open_sorter(job)
    files, whole = part(job)
    with opened(job, files) as (classifier, predict, files):
        summary = Summary(classifier.provider, sorter=sorter)
        began = time.perf_counter()
        if job.output is None:
            _to_stdout(job, classified(predict, files, classifier.batch_size), summary)
        else:
            header = describe(job, classifier, whole)
            with Journal(partial_path(job.output), header, resume=job.continues, overwrite=job.overwrite) as journal:
                fill(journal, job, predict, files, summary)
                render((record.entry for record in journal.records()), job.output, job.top_k)
                journal.drop()
        summary.seconds = time.perf_counter() - began
    return summary


def complete(job: Job, output: Path) -> Summary | None:
    """The summary of a job that is to be resumed and whose output is there already; None for any other.

    Raises ConvlineError where the output is of other files.
    """
    if not (job.continues and output.exists()):
        return None
    tally = compare_finished(output, (file.path for file in part(job)[0]))
    log(f"{output} is complete; there is nothing to resume")
    return Summary("nothing", resumed=tally.found, tally=tally)


def open_sorter(job: Job) -> Sorter | None:
    """Raises ConvlineError for a folder that will not do."""
    if job.sort_into is None:
        return None
    partial = partial_path(job.output) if job.output else None
    is_rescan = job.rescan or (partial is not None and before_path(partial).exists())
    return Sorter(job.sort_into, tuple(job.inputs), resume=job.resume and not is_rescan)


def check(job: Job) -> None:
    """Raises ConvlineError for a job that contradicts itself, or would overwrite something."""
    if job.top_k < 1:
        raise ConvlineError(f"--top-k {job.top_k} is not a number of classes; use 1 or more")
    if STDIN in job.inputs and (job.continues or job.shard):
        raise ConvlineError("standard input comes but once, so it can neither be resumed nor divided; use @FILE")
    if job.shard and job.batch_size == "auto":
        raise ConvlineError("--shard needs a --batch-size, as every part must use the same")
    if job.output is None:
        if job.continues:
            raise ConvlineError("--resume needs an --output file: what went to stdout cannot be continued")
        return
    table_format(job.output)
    if job.shard and (holds := folder_with(job.inputs, job.output)):
        raise ConvlineError(f"with --shard the output must lie outside of the input {holds}: other parts would find it")
    if job.output.is_dir():
        raise ConvlineError(f"{job.output} is a folder; name a file")
    if job.output.exists() and not (job.overwrite or job.continues):
        raise ConvlineError(f"{job.output} exists: choose another name, or replace it with --overwrite")


def listing(job: Job) -> Iterator[Found]:
    """The files of the inputs, without this job's own output."""
    files = find(job.inputs)
    if job.output is None:
        return files
    partial, shards = partial_path(job.output), shards_path(job.output)
    own = {path.name: path.resolve() for path in (job.output, partial, before_path(partial), rejects_path(job.output))}

    def is_own(name: str) -> bool:
        base = name.rpartition("/")[2]
        if f"/{shards.name}/" in name:
            return Path(name).resolve().is_relative_to(shards.resolve())
        return base in own and Path(name).resolve() == own[base]

    return (file for file in files if not (isinstance(file.content, OnDisk) and is_own(file.content.file)))


def part(job: Job) -> tuple[Iterator[Found], Survey | None]:
    """The files of the job's shard, and what the whole listing is; without a shard all of them."""
    if job.shard is None:
        return listing(job), None
    assert job.batch_size != "auto"
    whole = survey(listing(job))
    return whole.checked_part(listing(job), *job.shard, job.batch_size), whole


@contextmanager
def opened(job: Job, files: Iterator[Found]) -> Iterator[tuple[Classifier, Predict, Iterator[Found]]]:
    """The model, what predicts with it, and the files, of which the first ones were looked at.

    What fits into one batch is done here, on all threads; processes would take longer to start.
    """
    size = BATCH_SIZE if job.batch_size == "auto" else job.batch_size
    first = list(islice(files, size + 1))
    processes = 0 if len(first) <= size else job.threads or usable_cpus()
    threads = 1 if processes else job.threads
    with Classifier(job.model, job.provider, threads, size, job.foreign) as classifier:
        classifier.check_top_k(job.top_k)
        if job.batch_size == "auto":
            classifier.batch_size = _pinned(job) or knee(classifier.model)
        with predictor(classifier, job.top_k, processes) as predict:
            yield classifier, predict, chain(_emptied(first), files)


def _emptied(files: list[Found]) -> Iterator[Found]:
    """Files out of an archive hold its bytes: nobody should hold them any longer."""
    files.reverse()
    while files:
        yield files.pop()


def _pinned(job: Job) -> int | None:
    """The batch size that an interrupted job had settled on."""
    header = read_header(partial_path(job.output)) if job.output and job.continues else None
    return header["batch_size"] if header else None


def describe(job: Job, classifier: Classifier, whole: Survey | None = None) -> dict[str, Any]:
    """What a journal's header says: another job may not continue it."""
    return {
        "format": 2,
        "model": classifier.model.sha256,
        **({"foreign": job.foreign.to_dict()} if job.foreign else {}),
        "inputs": list(job.inputs),
        "top_k": job.top_k,
        "batch_size": classifier.batch_size,
        "provider": classifier.provider,
        **({"shard": list(job.shard or ()), "listing": whole.sha256} if whole else {}),
    }


def _to_stdout(job: Job, batches: Iterator[list[Classified]], summary: Summary) -> None:
    with open_table(sys.stdout.buffer, job.stdout_format, job.top_k) as table:
        for batch in batches:
            for file, entry in batch:
                summary.add(file, entry)
                if isinstance(entry, Reject):
                    log(reject_line(entry))
                else:
                    table.write(entry)
            table.flush()


def fill(journal: Journal, job: Job, predict: Predict, files: Iterator[Found], summary: Summary) -> None:
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
                journal.append(Record(entry, file.stamp) for file, entry in batch)
                for file, entry in batch:
                    summary.add(file, entry)
                bar.update(bar.task_ids[0], completed=summary.tally.found)
        journal.sync()
    except BaseException:
        log(f"stopped; {journal.path} keeps {summary.tally.found} results: --resume continues from there")
        raise
    if kept is not None:
        summary.resumed = kept.found


def _skip(files: Iterator[Found], journal: Journal, summary: Summary) -> None:
    """Pass over what the journal already holds, making sure that it is the same listing of the same files."""
    for record in journal.records():
        file, path = next(files, None), record.entry.path
        changed = f"the input changed since {journal.path} was begun"
        advice = "keep what is still valid with --rescan, or start from the beginning with --overwrite"
        if file is None or file.path != path:
            raise ConvlineError(f"{changed} ({path} then, {file.path if file else 'nothing'} now); {advice}")
        file.look()
        if file.stamp != record.stamp:
            raise ConvlineError(f"{changed} ({path} is another file now); {advice}")
        summary.add(file, record.entry)


Classified = tuple[Found, Entry]


def classified(
    predict: Predict, files: Iterator[Found], batch_size: int, kept: Kept | None = None
) -> Iterator[list[Classified]]:
    """The files with their entries, batch by batch; what is kept is not classified again."""
    planned: deque[list[tuple[Found, Entry | None]]] = deque()

    def unknown() -> Iterator[list[Found]]:
        while batch := _next_batch(files, batch_size, kept):
            planned.append(batch)
            yield [file for file, known in batch if known is None]

    for entries in predict(unknown()):
        fresh = iter(entries)
        yield [(file, known or next(fresh)) for file, known in planned.popleft()]


def _next_batch(files: Iterator[Found], size: int, kept: Kept | None) -> list[tuple[Found, Entry | None]]:
    """As many files as bring `size` that have to be classified, or many that need not be."""
    batch: list[tuple[Found, Entry | None]] = []
    unknown = 0
    for file in files:
        file.look()
        known = kept.find(file) if kept else None
        batch.append((file, known))
        unknown += known is None
        if unknown == size or len(batch) == KEPT_AT_ONCE * size:
            break
    return batch


def _count_beside(job: Job, bar: Progress) -> None:
    """Tell the bar how many files there are, once that is known: it needs no more than their names."""
    if bar.disable or job.shard or STDIN in job.inputs or any(is_archive(name) or is_url(name) for name in job.inputs):
        return

    def count() -> None:
        bar.update(bar.task_ids[0], total=sum(1 for _ in listing(job)))

    Thread(target=count, daemon=True).start()
