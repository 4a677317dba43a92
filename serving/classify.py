"""The bounded pipeline: find -> decode -> infer -> write.

Files stream through in batches of the listing; a few batches are decoded ahead on threads while the
model runs. Memory does not grow with the number of files.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serving.classifier import Classifier, Reject, try_decode
from serving.console import log, progress
from serving.errors import ConvlineError, ImageError
from serving.foreign import Foreign
from serving.listing import Found, find
from serving.machine import usable_cpus
from serving.model import Provider
from serving.results import (
    Entry,
    Format,
    Journal,
    Tally,
    finished_tally,
    output_format,
    partial_path,
    reject_line,
    rejects_path,
    table_writer,
)

BATCHES_AHEAD = 2


@dataclass(frozen=True)
class Job:
    """What to classify, with what, to where. `output` None is stdout, in `stdout_format`."""

    inputs: Sequence[str]
    model: Path | str
    output: Path | None = None
    stdout_format: Format = "csv"
    top_k: int = 1
    batch_size: int = 64
    provider: Provider = "auto"
    threads: int | None = None
    resume: bool = False
    overwrite: bool = False
    foreign: Foreign | None = None


@dataclass
class Summary:
    """How a job ended."""

    provider: str
    seconds: float = 0.0
    resumed: int = 0
    tally: Tally = field(default_factory=Tally)

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
    _check(job)
    if job.resume and job.output is not None and job.output.exists() and not partial_path(job.output).exists():
        log(f"{job.output} is complete; there is nothing to resume")
        tally = finished_tally(job.output)
        return Summary("nothing", resumed=tally.found, tally=tally)
    files = find(job.inputs)
    classifier = Classifier(job.model, job.provider, job.threads, job.batch_size, job.foreign)
    if job.top_k > len(classifier.classes):
        raise ConvlineError(f"--top-k {job.top_k}: {job.model} knows {len(classifier.classes)} classes; ask for fewer")
    summary = Summary(classifier.provider)
    began = time.perf_counter()
    if job.output is None:
        _to_stdout(job, classifier, files, summary)
    else:
        _to_file(job, job.output, classifier, files, summary)
    summary.seconds = time.perf_counter() - began
    return summary


def _check(job: Job) -> None:
    if job.top_k < 1:
        raise ConvlineError(f"--top-k {job.top_k} is not a number of classes; use 1 or more")
    if job.output is None:
        if job.resume:
            raise ConvlineError("--resume needs an --output file: what went to stdout cannot be continued")
        return
    output_format(job.output)
    if job.output.is_dir():
        raise ConvlineError(f"{job.output} is a folder; name a file")
    if job.output.exists() and not (job.overwrite or job.resume):
        raise ConvlineError(f"{job.output} exists: choose another name, or replace it with --overwrite")


def _to_stdout(job: Job, classifier: Classifier, files: Iterator[Found], summary: Summary) -> None:
    sys.stdout.reconfigure(encoding="utf-8", errors="surrogateescape", newline="")  # type: ignore[union-attr]
    write_row = table_writer(sys.stdout, job.stdout_format, job.top_k)
    for entries in predict(files, classifier, job.top_k):
        for entry in entries:
            summary.tally.add(entry)
            if isinstance(entry, Reject):
                log(reject_line(entry))
            else:
                write_row(entry)


def _to_file(job: Job, output: Path, classifier: Classifier, files: Iterator[Found], summary: Summary) -> None:
    header = {
        "format": 1,
        "model": classifier.model.sha256,
        **({"foreign": job.foreign.to_dict()} if job.foreign else {}),
        "inputs": list(job.inputs),
        "top_k": job.top_k,
        "batch_size": classifier.batch_size,
        "provider": classifier.provider,
    }
    own = {path.name: path.resolve() for path in (output, partial_path(output), rejects_path(output))}
    files = (file for file in files if file.file is None or not _is_own(file.file, own))
    with Journal(partial_path(output), header, resume=job.resume, overwrite=job.overwrite) as journal:
        summary.resumed = journal.keep_whole_batches(classifier.batch_size)
        _skip(files, journal, summary.tally)
        try:
            with progress("classify", None, "files") as bar:
                for entries in predict(files, classifier, job.top_k):
                    journal.append(entries)
                    for entry in entries:
                        summary.tally.add(entry)
                    bar.update(bar.task_ids[0], completed=summary.tally.found)
            journal.render(output, job.top_k)
        except BaseException:
            log(f"stopped; {journal.path} keeps {summary.tally.found} results: --resume continues from there")
            raise


def _is_own(path: Path, own: dict[str, Path]) -> bool:
    """Whether a file that was found is this job's own output."""
    return path.name in own and path.resolve() == own[path.name]


def _skip(files: Iterator[Found], journal: Journal, tally: Tally) -> None:
    """Pass over what the journal already holds, making sure that it is the same listing."""
    for entry in journal.entries():
        file = next(files, None)
        if file is None or file.path != entry.path:
            now = "nothing" if file is None else file.path
            raise ConvlineError(
                f"the input changed since {journal.path} was begun ({entry.path} then, {now} now); "
                "start from the beginning with --overwrite"
            )
        tally.add(entry)


def predict(files: Iterator[Found], classifier: Classifier, top_k: int) -> Iterator[list[Entry]]:
    """Entries in listing order, a batch at a time, while the next batches are being decoded."""
    ahead: deque[_Decoding] = deque()
    with ThreadPoolExecutor(usable_cpus()) as pool:
        for batch in _batched(files, classifier.batch_size):
            ahead.append((batch, [pool.submit(try_decode, file, classifier.spec) for file in batch]))
            if len(ahead) > BATCHES_AHEAD:
                yield _finish(ahead.popleft(), classifier, top_k)
        while ahead:
            yield _finish(ahead.popleft(), classifier, top_k)


_Decoding = tuple[list[Found], list[Future[NDArray[np.uint8] | ImageError]]]


def _finish(decoding: _Decoding, classifier: Classifier, top_k: int) -> list[Entry]:
    files, futures = decoding
    return classifier.label(files, [future.result() for future in futures], top_k)


def _batched(files: Iterable[Found], size: int) -> Iterator[list[Found]]:
    files = iter(files)
    while batch := list(islice(files, size)):
        yield batch
