"""What a classification is asked to do, to which files, and how it ended."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from convline.errors import ConvlineError
from convline.inputs.input_file import InputFile, OnDisk
from convline.inputs.listing import STDIN, find
from serving.classifier import Classifier
from serving.external_model import ExternalModel
from serving.journal import before_path, partial_path, rejects_path, shards_path
from serving.session import Provider
from serving.shards import Survey, survey
from serving.sort_into import Sorter, folder_with
from serving.summary import Observer
from serving.tables import Format, table_format

BATCH_SIZE = 64


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
    report: Path | None = None
    shard: tuple[int, int] | None = None
    external: ExternalModel | None = None
    csv_safe: bool = False

    @property
    def continues(self) -> bool:
        return self.resume or self.rescan


def check(job: Job) -> None:
    """Raises ConvlineError for a job that contradicts itself, or would overwrite something."""
    if STDIN in job.inputs and (job.continues or job.shard):
        raise ConvlineError("standard input comes but once, so it can neither be resumed nor divided; use @FILE")
    if job.shard and job.batch_size == "auto":
        raise ConvlineError("--shard needs a --batch-size, as every part must use the same")
    if job.report is not None and job.shard and (holds := folder_with(job.inputs, job.report)):
        raise ConvlineError(f"with --shard the report must lie outside of the input {holds}: other parts would find it")
    if job.report is not None:
        _check_report(job.report, is_ours=job.overwrite or job.continues)
    if job.csv_safe and (table_format(job.output) if job.output else job.stdout_format) != "csv":
        raise ConvlineError("--csv-safe is for CSV, which spreadsheets open; other tables need none")
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


def _check_report(report: Path, is_ours: bool) -> None:
    if report.suffix.lower() not in (".html", ".htm") or report.is_dir():
        raise ConvlineError(f"--report {report}: name a file that ends in .html")
    if not report.parent.is_dir():
        raise ConvlineError(f"--report {report}: there is no folder {report.parent}; make it first")
    if report.exists() and not is_ours:
        raise ConvlineError(f"{report} exists: choose another name, or replace it with --overwrite")


def listing(job: Job) -> Iterator[InputFile]:
    """The files of the inputs, without what this job writes itself."""
    files = find(job.inputs)
    written = [job.report] if job.report else []
    shards = shards_path(job.output) if job.output else None
    if job.output is not None:
        partial = partial_path(job.output)
        written += [job.output, partial, before_path(partial), rejects_path(job.output)]
    if not written:
        return files
    own = {path.name: path.resolve() for path in written}

    def is_own(name: str) -> bool:
        base = name.rpartition("/")[2]
        if shards and f"/{shards.name}/" in name:
            return Path(name).resolve().is_relative_to(shards.resolve())
        return base in own and Path(name).resolve() == own[base]

    return (file for file in files if not (isinstance(file.location, OnDisk) and is_own(file.location.file)))


def part(job: Job) -> tuple[Iterator[InputFile], Survey | None]:
    """The files of the job's shard, and what the whole listing is; without a shard all of them."""
    if job.shard is None:
        return listing(job), None
    assert job.batch_size != "auto"
    whole = survey(listing(job))
    return whole.checked_part(listing(job), *job.shard, job.batch_size), whole


def open_observers(job: Job) -> list[Observer]:
    """What --sort-into and --report ask for. Raises ConvlineError for a folder that will not do."""
    observers: list[Observer] = []
    if job.report is not None:
        from serving.html_report import HtmlReport

        observers.append(HtmlReport(job.report, job.inputs, str(job.model)))
    if job.sort_into is not None:
        partial = partial_path(job.output) if job.output else None
        is_rescan = job.rescan or (partial is not None and before_path(partial).exists())
        observers.append(Sorter(job.sort_into, tuple(job.inputs), resume=job.resume and not is_rescan))
    return observers


def describe(job: Job, classifier: Classifier, whole: Survey | None = None) -> dict[str, Any]:
    """What a journal's header says: another job may not continue it."""
    return {
        "format": 2,
        "model": classifier.model.sha256,
        **({"foreign": job.external.to_dict()} if job.external else {}),
        "inputs": list(job.inputs),
        "top_k": job.top_k,
        "batch_size": classifier.batch_size,
        "provider": classifier.provider,
        **({"csv_safe": True} if job.csv_safe else {}),
        **({"shard": list(job.shard or ()), "listing": whole.sha256} if whole else {}),
    }
