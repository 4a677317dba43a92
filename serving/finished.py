"""Finished jobs: what `--resume` and `--rescan` do where the table is complete, and how a job becomes finished."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from convline.console import log
from convline.errors import ConvlineError
from convline.inputs.input_file import InputFile
from serving.job import Job, open_observers, shard_files
from serving.journal import Journal, render
from serving.journal_footer import Footer
from serving.output_files import finished_journal_path, rejects_path
from serving.records import Entry, Prediction, Reject, decide
from serving.sort_into import SortedFolder
from serving.summary import Summary
from serving.tables import path_in_table, read_rows


def check_rescan(output: Path) -> None:
    """Raises ConvlineError if it is not known which files of a finished table have changed since."""
    path = finished_journal_path(output)
    advice = "replace the table once with --overwrite; after that --rescan can bring it up to date"
    if not path.exists():
        raise ConvlineError(f"{output} has no journal {path}, without which changed files cannot be found; {advice}")
    footer = Footer.read(output)
    if footer is None or not footer.describes(output):
        raise ConvlineError(f"{output} or its rejects are not those that {path} was written with; {advice}")


def finish_output(
    job: Job, journal: Journal, optional_columns: Sequence[str], sorted_folder: SortedFolder | None
) -> None:
    """Write the table and the rejects from a complete journal, and keep the journal for a rescan.

    Where a rescan found no change, the table and the rejects stay as they are.
    """
    assert job.output is not None
    earlier = Footer.read(job.output) if journal.is_rescan else None
    if earlier is not None and journal.has_records_of_finished() and earlier.describes(job.output):
        log(f"{job.output} is up to date; it was not written again")
        footer = replace(earlier, sorted_folder=sorted_folder or earlier.sorted_folder)
    else:
        entries = (record.entry for record in journal.records())
        render(entries, job.output, job.top_k, job.csv_safe, optional_columns)
        footer = Footer.of_output(job.output, sorted_folder)
    journal.keep(asdict(footer))


def finished_summary(job: Job, output: Path, name: str | None = None) -> Summary | None:
    """The summary of a job that should be resumed although its output (shown to the user as `name`) is complete.

    None where there is no such output. Raises ConvlineError where the output belongs to other files, its decisions to
    another threshold, or where it lacks a column.
    """
    if not (job.continues and output.exists()):
        return None
    summary = Summary("nothing", observers=open_observers(replace(job, sort_into=None)))
    for file, entry in _read_finished(output, shard_files(job)[0], job.csv_safe):
        if job.threshold is not None and not _has_threshold(entry, job.threshold):
            raise _not_written_with(f"--threshold {job.threshold:g}", name or output)
        if job.unfamiliar and isinstance(entry, Prediction) and entry.unfamiliar is None:
            raise _not_written_with("--unfamiliar", name or output)
        summary.add(file, entry)
    report = f", except for writing {job.report} again" if job.report else ""
    log(f"{name or output} is complete; there is nothing to resume{report}")
    summary.resumed = summary.tally.found
    summary.finish(0)
    return summary


def _not_written_with(option: str, output: Path | str) -> ConvlineError:
    return ConvlineError(
        f"{output} is complete, but was not written with {option}; choose another name, or replace it with --overwrite"
    )


def _has_threshold(entry: Entry, threshold: float) -> bool:
    """Whether an entry of a table has the decision that follows from a threshold. Rejects have none."""
    if isinstance(entry, Reject):
        return True
    probability = float(str(np.float32(entry.probabilities[0])))  # as it was compared; Parquet holds a float32
    return entry.decision == decide(entry.labels[0], probability, threshold)


def _read_finished(
    output: Path, files: Iterable[InputFile], csv_safe: bool = False
) -> Iterator[tuple[InputFile, Entry]]:
    """The files of a finished job with their entries, read from its table and its rejects.

    Predictions have their most probable class only. Raises ConvlineError if these were not written by `serving
    classify`, or belong to other files or another order.
    """
    can_rescan = finished_journal_path(output).exists()
    advice = "bring it up to date with --rescan" if can_rescan else "choose another name"
    mismatch = f"{output} is complete, but belongs to other files; {advice}, or replace it with --overwrite"
    try:
        with rejects_path(output).open("rb") as file:
            rows = read_rows(output, csv_safe)
            rejects = (Reject(fields["path"], fields["reason"], fields["detail"]) for fields in map(json.loads, file))
            row, reject = next(rows, None), next(rejects, None)
            for listed in files:
                if row and row.path == path_in_table(listed.path, output, csv_safe):
                    yield listed, replace(row, path=listed.path)
                    row = next(rows, None)
                elif reject and reject.path == listed.path:
                    yield listed, reject
                    reject = next(rejects, None)
                else:
                    raise ConvlineError(mismatch)
            if row or reject:
                raise ConvlineError(mismatch)
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise ConvlineError(
            f"{output} was not written by `serving classify` ({error}); start from the beginning with --overwrite"
        ) from error
