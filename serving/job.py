"""`Job`: the options of `serving classify`, their checks, the files to classify, and the journal's header."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from convline.errors import ConvlineError
from convline.inputs.input_file import InputFile, OnDisk
from convline.inputs.listing import STDIN, find
from serving.batch_size import SERVING_BATCH
from serving.classifier import Classifier
from serving.external_model import ExternalModel
from serving.journal import is_rescan
from serving.journal_footer import Footer
from serving.journal_format import earlier_records
from serving.output_files import partial_path, shards_path, written_paths
from serving.records import Entry
from serving.session import Provider
from serving.shards import ListingFingerprint, fingerprint_listing
from serving.sort_into import Sorter, containing_folder
from serving.summary import Observer
from serving.tables import Format, table_format


@dataclass(frozen=True)
class Job:
    """What to classify, with which model, and where the results go. `output` None is stdout, in `stdout_format`."""

    inputs: Sequence[str]
    model: Path | str
    output: Path | None = None
    stdout_format: Format = "csv"
    top_k: int = 1
    threshold: float | None = None
    unfamiliar: bool = False
    batch_size: int | Literal["auto"] = SERVING_BATCH
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


def check_job(job: Job) -> None:
    """Raises ConvlineError for options that contradict each other, and for a file that would be overwritten."""
    if STDIN in job.inputs and (job.continues or job.shard):
        raise ConvlineError("standard input can be read only once, so no --resume, --rescan or --shard; use @FILE")
    if job.shard and job.batch_size == "auto":
        raise ConvlineError("--shard needs a --batch-size, as all shards must use the same one")
    if job.report is not None and job.shard and (folder := containing_folder(job.inputs, job.report)):
        raise ConvlineError(f"with --shard the report must lie outside the input {folder}: other shards would find it")
    if job.report is not None:
        _check_report(job.report, may_replace=job.overwrite or job.continues)
    if job.csv_safe and (table_format(job.output) if job.output else job.stdout_format) != "csv":
        raise ConvlineError("--csv-safe is only for CSV; leave it out for other formats")
    if job.output is None:
        if job.continues:
            raise ConvlineError("--resume needs an --output file: a job that writes to stdout cannot be continued")
        return
    table_format(job.output)
    if job.shard and (folder := containing_folder(job.inputs, job.output)):
        raise ConvlineError(f"with --shard the output must lie outside the input {folder}: other shards would find it")
    if job.output.is_dir():
        raise ConvlineError(f"{job.output} is a folder; name a file")
    if job.output.exists() and not (job.overwrite or job.continues):
        raise ConvlineError(f"{job.output} exists: choose another name, or replace it with --overwrite")


def _check_report(report: Path, may_replace: bool) -> None:
    if report.suffix.lower() not in (".html", ".htm") or report.is_dir():
        raise ConvlineError(f"--report {report}: name a file that ends in .html")
    if not report.parent.is_dir():
        raise ConvlineError(f"--report {report}: there is no folder {report.parent}; make it first")
    if report.exists() and not may_replace:
        raise ConvlineError(f"{report} exists: choose another name, or replace it with --overwrite")


def listing(job: Job) -> Iterator[InputFile]:
    """The files of the inputs, without the files that this job writes."""
    files = find(job.inputs)
    written = [job.report] if job.report else []
    shards = shards_path(job.output) if job.output else None
    if job.output is not None:
        written += written_paths(job.output)
    if not written:
        return files
    written_by_name = {path.name: path.resolve() for path in written}

    def is_written_here(path: str) -> bool:
        name = path.rpartition("/")[2]
        if shards and f"/{shards.name}/" in path:
            return Path(path).resolve().is_relative_to(shards.resolve())
        return name in written_by_name and Path(path).resolve() == written_by_name[name]

    return (file for file in files if not (isinstance(file.location, OnDisk) and is_written_here(file.location.file)))


def shard_files(job: Job) -> tuple[Iterator[InputFile], ListingFingerprint | None]:
    """The files of the job's shard and the fingerprint of the whole listing; all files and None without --shard."""
    if job.shard is None:
        return listing(job), None
    assert job.batch_size != "auto"
    fingerprint = fingerprint_listing(listing(job))
    return fingerprint.checked_shard(listing(job), *job.shard, job.batch_size), fingerprint


def open_observers(job: Job) -> list[Observer]:
    """The observers for --sort-into and --report. Raises ConvlineError for a folder that cannot be used."""
    observers: list[Observer] = []
    if job.report is not None:
        from serving.html_report import HtmlReport

        observers.append(HtmlReport(job.report, job.inputs, str(job.model)))
    if job.sort_into is not None:
        observers.append(_open_sorter(job, job.sort_into))
    return observers


def _open_sorter(job: Job, folder: Path) -> Sorter:
    output = job.output
    if output is None or not job.continues or not is_rescan(partial_path(output), job.rescan):
        return Sorter(folder, job.inputs, resume=job.resume)

    def earlier_entries() -> Iterator[Entry]:
        return (record.entry for record in earlier_records(partial_path(output)))

    footer = Footer.read(output)
    earlier = footer.sorted_folder if footer else None
    return Sorter(folder, job.inputs, resume=False, earlier=earlier, entries=earlier_entries)


def journal_header(job: Job, classifier: Classifier, fingerprint: ListingFingerprint | None = None) -> dict[str, Any]:
    """The settings that a job stores in its journal; a job with different settings may not continue it."""
    return {
        "format": 2,
        "model": classifier.model.sha256,
        **({"foreign": job.external.to_dict()} if job.external else {}),  # the key of journals of all versions
        "inputs": list(job.inputs),
        "top_k": job.top_k,
        **({"threshold": classifier.threshold} if classifier.threshold is not None else {}),
        **({"unfamiliar": True} if job.unfamiliar else {}),
        "batch_size": classifier.batch_size,
        "provider": classifier.provider,
        **({"csv_safe": True} if job.csv_safe else {}),
        **({"shard": list(job.shard or ()), "listing": fingerprint.sha256} if fingerprint else {}),
    }
