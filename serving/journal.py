"""The journal of a classification, which makes `--resume` possible; the table and the rejects are written from it.

`<output>.partial` is JSON Lines: a header with the settings of the job, then one record per file found, in listing
order. The table and `<output>.rejects.jsonl` are written from it at the end and appear by rename. A job that was
killed continues after the last whole batch, so that its batches, and therefore the bytes of its table, are those of an
uninterrupted job.
"""

from __future__ import annotations

import csv
import json
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from convline.errors import ConvlineError
from convline.files import atomic_write, lock_file, open_in_place, remove_leftovers, remove_open_file, sync_folder
from convline.inputs.input_file import FileVersion, InputFile
from serving.records import Entry, Prediction, Reject
from serving.tables import open_table, path_in_table, read_rows, table_format

SYNC_SECONDS = 1.0  # of work are lost at most in a power cut; a kill loses at most a batch
LINES_AT_ONCE = 1000  # lines of a journal that are parsed together
LOCK_SECONDS = 2.0  # to wait for the processes of a killed job, which may still lock its journal
# header keys that users do not know, and what they stand for
SETTING_NAMES = {"foreign": "--classes or --preprocess", "listing": "listing of the inputs"}


@dataclass(frozen=True)
class JournalRecord:
    """A line of the journal: an entry, and the stamp (size and time) of its file before it was read."""

    entry: Entry
    stamp: FileVersion | None

    def line(self) -> bytes:
        return _line(_fields(self.entry) | {"stamp": self.stamp})

    @classmethod
    def parse(cls, line: bytes) -> JournalRecord:
        return cls.from_fields(json.loads(line))

    @classmethod
    def from_fields(cls, fields: dict[str, Any]) -> JournalRecord:
        stamp = fields.pop("stamp")
        if "reason" in fields:
            entry: Entry = Reject(**fields)
        else:
            labels, probabilities = tuple(fields["labels"]), tuple(fields["probabilities"])
            entry = Prediction(fields["path"], labels, probabilities, fields.get("decision"))
        return cls(entry, None if stamp is None else (stamp[0], stamp[1]))


def read_finished(
    output: Path, files: Iterable[InputFile], csv_safe: bool = False
) -> Iterator[tuple[InputFile, Entry]]:
    """The files of a finished job with their entries, read from its table and its rejects.

    Predictions have their most probable class only. Raises ConvlineError if these were not written by `serving
    classify`, or belong to other files or another order.
    """
    mismatch = f"{output} is complete, but belongs to other files; choose another name, or replace it with --overwrite"
    try:
        with rejects_path(output).open("rb") as file:
            rows = read_rows(output, csv_safe)
            rejects = (Reject(fields["path"], fields["reason"], fields["detail"]) for fields in map(json.loads, file))
            row, reject = next(rows, None), next(rejects, None)
            for listed in files:
                if row and row[0] == path_in_table(listed.path, output, csv_safe):
                    yield listed, Prediction(listed.path, (row[1],), (row[2],), row[3])
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


def partial_path(output: Path) -> Path:
    return output.with_name(output.name + ".partial")


def shards_path(output: Path) -> Path:
    """Where a job on a cluster keeps its shards."""
    return output.with_name(output.name + ".shards")


def before_rescan_path(partial: Path) -> Path:
    """Where the earlier records of a journal are kept during a rescan."""
    return partial.with_name(partial.name + ".before")


def rejects_path(output: Path) -> Path:
    return output.with_name(output.name + ".rejects.jsonl")


def render(
    entries: Iterable[Entry], output: Path, top_k: int, csv_safe: bool = False, has_decision: bool = False
) -> None:
    """Write the table and the rejects; both files appear by rename."""
    for path in (output, rejects_path(output)):
        remove_leftovers(path)
    with ExitStack() as stack:
        file = stack.enter_context(atomic_write(output))
        # closed first, so that the table appears last: where it exists, the job is done
        rejects = stack.enter_context(atomic_write(rejects_path(output)))
        table = stack.enter_context(open_table(file, table_format(output), top_k, csv_safe, has_decision))
        for entry in entries:
            if isinstance(entry, Reject):
                rejects.write(_line(_fields(entry)))
            else:
                table.write(entry)


def check_same_job(name: Path | str, earlier: dict[str, Any], header: dict[str, Any]) -> None:
    """Raises ConvlineError if the unfinished job at `name`, whose header is `earlier`, has different settings."""
    if changed := [key for key in {**earlier, **header} if earlier.get(key) != header.get(key)]:
        settings = ", ".join(SETTING_NAMES.get(key, key) for key in changed)
        raise ConvlineError(
            f"{name} was started with different settings: {settings}; "
            "repeat the command of that job, or start from the beginning with --overwrite"
        )


class Journal:
    """The results of a running job, appended batch by batch and synced to disk every second.

    Raises ConvlineError if an earlier job left a journal (unless `resume` continues or `overwrite` discards it), if
    that journal belongs to another job, and if another process is writing it.
    """

    def __init__(self, path: Path, header: dict[str, Any], *, resume: bool, overwrite: bool) -> None:
        self.path = path
        if path.exists() and not (resume or overwrite):
            raise ConvlineError(
                f"{path} holds an unfinished job: --resume continues it, --overwrite starts from the beginning"
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open_in_place(path)
        try:
            lock_file(self._file, path, path, LOCK_SECONDS)
            if overwrite:
                self._file.truncate(0)
                before_rescan_path(path).unlink(missing_ok=True)
            self._write_or_check_header(header)
        except BaseException:
            self._file.close()
            raise
        self.batch_size: int = header["batch_size"]
        self._last_sync = time.monotonic()

    def _write_or_check_header(self, header: dict[str, Any]) -> None:
        earlier = _read_header(self._file, self.path)
        if earlier is None:  # a new file, or one of a job that was killed before the header was whole
            self._file.truncate(0)
            self._file.write(_line(header))
            self._file.flush()
        else:
            check_same_job(self.path, earlier, header)

    def set_aside(self) -> Iterator[JournalRecord]:
        """Move all records to another file, which is kept until `drop`, and return them, streamed."""
        earlier_path = before_rescan_path(self.path)
        remove_leftovers(earlier_path)
        self._file.seek(0)
        header = self._file.readline()
        with atomic_write(earlier_path) as merged, ExitStack() as stack:
            if earlier_path.exists():  # of a rescan that was stopped
                merged.writelines(stack.enter_context(earlier_path.open("rb")))
            else:
                merged.write(header)
            merged.writelines(line for line in self._file if line.endswith(b"\n"))
        self._file.truncate(len(header))
        return read_records(earlier_path)

    def keep_whole_batches(self, batch_size: int) -> int:
        """Cut off a torn last line and an incomplete last batch; returns the number of records that remain."""
        self._file.seek(0)
        end = position = len(self._file.readline())
        count = 0
        for line in self._file:
            if not line.endswith(b"\n"):
                break
            position, count = position + len(line), count + 1
            if count % batch_size == 0:
                end = position
        self._file.truncate(end)
        return count - count % batch_size

    def records(self) -> Iterator[JournalRecord]:
        """The records written so far, streamed."""
        return read_records(self.path)

    def append(self, records: Iterable[JournalRecord]) -> None:
        self._file.write(b"".join(record.line() for record in records))
        self._file.flush()
        if time.monotonic() - self._last_sync > SYNC_SECONDS:
            self.sync()
            self._last_sync = time.monotonic()

    def sync(self) -> None:
        os.fsync(self._file.fileno())

    def drop(self) -> None:
        """Delete the journal, once the table is written."""
        before_rescan_path(self.path).unlink(missing_ok=True)
        remove_open_file(self._file, self.path)
        sync_folder(self.path.parent)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def read_records(path: Path) -> Iterator[JournalRecord]:
    """The records of a journal, streamed."""
    with path.open("rb") as file:
        file.readline()
        while lines := list(islice(file, LINES_AT_ONCE)):
            try:
                # parsed together, which takes half the time
                yield from map(JournalRecord.from_fields, json.loads(b"[" + b",".join(lines) + b"]"))
            except (ValueError, KeyError, TypeError) as error:
                raise ConvlineError(f"{path} is damaged; start from the beginning with --overwrite") from error


def read_header(path: Path) -> dict[str, Any] | None:
    """The header of a journal; None if there is no journal. Raises ConvlineError for a damaged one."""
    try:
        with path.open("rb") as file:
            return _read_header(file, path)
    except FileNotFoundError:
        return None


def _read_header(file: Any, path: Path) -> dict[str, Any] | None:
    file.seek(0)
    line = file.readline()
    if not line.endswith(b"\n"):
        return None
    try:
        header: dict[str, Any] = json.loads(line)
    except ValueError as error:
        raise ConvlineError(f"{path} is damaged; start from the beginning with --overwrite") from error
    return header


def _fields(entry: Entry) -> dict[str, Any]:
    if isinstance(entry, Reject):
        return {"path": entry.path, "reason": entry.reason, "detail": entry.detail}
    decision = {} if entry.decision is None else {"decision": entry.decision}
    return {"path": entry.path, "labels": entry.labels, "probabilities": entry.probabilities, **decision}


def _line(fields: dict[str, Any]) -> bytes:
    # ASCII, so that names which are not UTF-8 survive as escaped surrogates
    return json.dumps(fields, ensure_ascii=True, allow_nan=False).encode("ascii") + b"\n"


def reject_line(entry: Reject) -> str:
    """A reject as its JSON line, without the newline."""
    return _line(_fields(entry)).decode("ascii").rstrip("\n")
