"""The journal of a classification, and what is rendered from it.

`<output>.partial` is JSON Lines: a header that says what the job is, then one entry a found file, in
listing order. The table and `<output>.rejects.jsonl` are rendered from it and appear by rename. A job
that was killed goes on after the last whole batch, so that its batches, and so its bytes, are those of
a job that was not.
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
from serving.tables import open_table, read_rows, shown, table_format

SYNC_SECONDS = 1.0  # what a power cut may cost; a mere kill costs at most a batch
LINES = 1000  # of a journal that are parsed at once
LOCK_SECONDS = 2.0  # that a killed job's processes may hold its journal for


@dataclass(frozen=True)
class Record:
    """A line of the journal: an entry, and the stamp that its file had before it was read."""

    entry: Entry
    stamp: FileVersion | None

    def line(self) -> bytes:
        return _line(_fields(self.entry) | {"stamp": self.stamp})

    @classmethod
    def parse(cls, line: bytes) -> Record:
        return cls.of(json.loads(line))

    @classmethod
    def of(cls, fields: dict[str, Any]) -> Record:
        stamp = fields.pop("stamp")
        if "reason" in fields:
            entry: Entry = Reject(**fields)
        else:
            entry = Prediction(fields["path"], tuple(fields["labels"]), tuple(fields["probabilities"]))
        return cls(entry, None if stamp is None else (stamp[0], stamp[1]))


def read_finished(
    output: Path, files: Iterable[InputFile], csv_safe: bool = False
) -> Iterator[tuple[InputFile, Entry]]:
    """The files of a finished job with what became of them, the most probable class only, off its table and rejects.

    Raises ConvlineError where they are not what `serving classify` writes, or not of these files in order.
    """
    other = f"{output} is complete, and of other files; choose another name, or replace it with --overwrite"
    try:
        with rejects_path(output).open("rb") as file:
            rows = read_rows(output, csv_safe)
            rejects = (Reject(fields["path"], fields["reason"], fields["detail"]) for fields in map(json.loads, file))
            row, reject = next(rows, None), next(rejects, None)
            for found in files:
                if row and row[0] == shown(found.path, output, csv_safe):
                    yield found, Prediction(found.path, (row[1],), (row[2],))
                    row = next(rows, None)
                elif reject and reject.path == found.path:
                    yield found, reject
                    reject = next(rejects, None)
                else:
                    raise ConvlineError(other)
            if row or reject:
                raise ConvlineError(other)
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise ConvlineError(
            f"{output} was not finished by `serving classify` ({error}); start from the beginning with --overwrite"
        ) from error


def partial_path(output: Path) -> Path:
    return output.with_name(output.name + ".partial")


def shards_path(output: Path) -> Path:
    """Where a job on a cluster keeps its shards."""
    return output.with_name(output.name + ".shards")


def before_path(partial: Path) -> Path:
    """Where a journal's records are while the listing is gone through again."""
    return partial.with_name(partial.name + ".before")


def rejects_path(output: Path) -> Path:
    return output.with_name(output.name + ".rejects.jsonl")


def render(entries: Iterable[Entry], output: Path, top_k: int, csv_safe: bool = False) -> None:
    """Write the table and the rejects; both appear by rename."""
    for path in (output, rejects_path(output)):
        remove_leftovers(path)
    with ExitStack() as stack:
        file = stack.enter_context(atomic_write(output))
        # closed first, so that the table, which says "done", appears last
        rejects = stack.enter_context(atomic_write(rejects_path(output)))
        table = stack.enter_context(open_table(file, table_format(output), top_k, csv_safe))
        for entry in entries:
            if isinstance(entry, Reject):
                rejects.write(_line(_fields(entry)))
            else:
                table.write(entry)


def check_same_job(name: Path | str, earlier: dict[str, Any], header: dict[str, Any]) -> None:
    """Raises ConvlineError where what was begun at `name` is not the job that `header` describes."""
    if changed := [key for key in {**earlier, **header} if earlier.get(key) != header.get(key)]:
        raise ConvlineError(
            f"{name} belongs to a job with another {', '.join(changed)}; "
            "repeat that job's command, or start from the beginning with --overwrite"
        )


class Journal:
    """The one record of a running job, appended batch by batch and made durable every second.

    Raises ConvlineError where an earlier job left a journal (unless `resume` continues or `overwrite`
    drops it), where that journal is of another job, and where another process is writing it.
    """

    def __init__(self, path: Path, header: dict[str, Any], *, resume: bool, overwrite: bool) -> None:
        self.path = path
        if path.exists() and not (resume or overwrite):
            raise ConvlineError(
                f"{path} is left of an earlier job: --resume continues it, --overwrite starts from the beginning"
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open_in_place(path)
        try:
            lock_file(self._file, path, path, LOCK_SECONDS)
            if overwrite:
                self._file.truncate(0)
                before_path(path).unlink(missing_ok=True)
            self._begin(header)
        except BaseException:
            self._file.close()
            raise
        self.batch_size: int = header["batch_size"]
        self._synced = time.monotonic()

    def _begin(self, header: dict[str, Any]) -> None:
        earlier = _read_header(self._file, self.path)
        if earlier is None:  # new, or killed before the header was whole
            self._file.truncate(0)
            self._file.write(_line(header))
            self._file.flush()
        else:
            check_same_job(self.path, earlier, header)

    def set_aside(self) -> Iterator[Record]:
        """Begin again, with what it held kept in another file until `drop`; returns that, streamed."""
        before = before_path(self.path)
        remove_leftovers(before)
        self._file.seek(0)
        header = self._file.readline()
        with atomic_write(before) as merged, ExitStack() as stack:
            if before.exists():
                merged.writelines(stack.enter_context(before.open("rb")))
            else:
                merged.write(header)
            merged.writelines(line for line in self._file if line.endswith(b"\n"))
        self._file.truncate(len(header))
        return read_records(before)

    def keep_whole_batches(self, batch_size: int) -> int:
        """Cut a torn last line and a broken batch; returns how many entries stay."""
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

    def records(self) -> Iterator[Record]:
        """What it holds so far, streamed."""
        return read_records(self.path)

    def append(self, records: Iterable[Record]) -> None:
        self._file.write(b"".join(record.line() for record in records))
        self._file.flush()
        if time.monotonic() - self._synced > SYNC_SECONDS:
            self.sync()
            self._synced = time.monotonic()

    def sync(self) -> None:
        os.fsync(self._file.fileno())

    def drop(self) -> None:
        """Remove it: what it held is rendered."""
        before_path(self.path).unlink(missing_ok=True)
        remove_open_file(self._file, self.path)
        sync_folder(self.path.parent)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def read_records(path: Path) -> Iterator[Record]:
    """The records of a journal, streamed."""
    with path.open("rb") as file:
        file.readline()
        while lines := list(islice(file, LINES)):
            try:
                yield from map(Record.of, json.loads(b"[" + b",".join(lines) + b"]"))  # at once: half the time
            except (ValueError, KeyError, TypeError) as error:
                raise ConvlineError(f"{path} is damaged; start from the beginning with --overwrite") from error


def read_header(path: Path) -> dict[str, Any] | None:
    """What a journal says its job is; None where there is none. Raises ConvlineError for a damaged one."""
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
    return {"path": entry.path, "labels": entry.labels, "probabilities": entry.probabilities}


def _line(fields: dict[str, Any]) -> bytes:
    # ASCII, so that names which are not UTF-8 survive as escaped surrogates
    return json.dumps(fields, ensure_ascii=True, allow_nan=False).encode("ascii") + b"\n"


def reject_line(entry: Reject) -> str:
    """A reject as its JSON line, without the newline."""
    return _line(_fields(entry)).decode("ascii").rstrip("\n")
