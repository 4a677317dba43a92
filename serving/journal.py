"""The journal of a classification, which makes `--resume` and `--rescan` possible; the table and the rejects are
written from it.

`<output>.partial` is JSON Lines: a header with the settings of the job, then one record per file found, in listing
order. The table and `<output>.rejects.jsonl` are written from it at the end and appear by rename. A job that was
killed continues after the last whole batch, so that its batches, and therefore the bytes of its table, are those of an
uninterrupted job.

Then a footer that describes the finished output is added, and the journal is renamed to `<output>.journal`. It stays
there, beside its table, until a rescan replaces both. A new job removes it before it begins, so `<output>.partial`
beside `<output>.journal` is always a rescan of a finished job. Until the very last rename there is an
`<output>.partial`, and the job counts as unfinished.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from itertools import zip_longest
from pathlib import Path
from typing import Any

from convline.errors import ConvlineError
from convline.files import (
    atomic_write,
    lock_file,
    open_in_place,
    remove_leftovers,
    remove_open_file,
    rename_open_file,
    sync_folder,
)
from serving.journal_format import (
    JournalRecord,
    earlier_records,
    entry_fields,
    footer_line,
    header_of,
    json_line,
    read_header,
    read_records,
    record_lines,
)
from serving.output_files import before_rescan_path, finished_journal_path, output_of, rejects_path
from serving.records import Entry, Reject
from serving.tables import open_table, table_format

SYNC_SECONDS = 1.0  # of work are lost at most in a power cut; a kill loses at most a batch
LOCK_SECONDS = 2.0  # to wait for the processes of a killed job, which may still lock its journal
# header keys that users do not know, and what they stand for
SETTING_NAMES = {"foreign": "--classes or --preprocess", "listing": "listing of the inputs"}


def render(
    entries: Iterable[Entry], output: Path, top_k: int, csv_safe: bool = False, optional: Sequence[str] = ()
) -> None:
    """Write the table and the rejects; both files appear by rename."""
    for path in (output, rejects_path(output)):
        remove_leftovers(path)
    with ExitStack() as stack:
        file = stack.enter_context(atomic_write(output))
        # closed first, so that the table appears last: where it exists, the job is done
        rejects = stack.enter_context(atomic_write(rejects_path(output)))
        table = stack.enter_context(open_table(file, table_format(output), top_k, csv_safe, optional))
        for entry in entries:
            if isinstance(entry, Reject):
                rejects.write(json_line(entry_fields(entry)))
            else:
                table.write(entry)


def check_same_job(
    name: Path | str, earlier: dict[str, Any], header: dict[str, Any], may_differ: Iterable[str] = ()
) -> None:
    """Raises ConvlineError if the job at `name`, whose header is `earlier`, has different settings."""
    keys = [key for key in {**earlier, **header} if key not in may_differ]
    if changed := [key for key in keys if earlier.get(key) != header.get(key)]:
        settings = ", ".join(SETTING_NAMES.get(key, key) for key in changed)
        raise ConvlineError(
            f"{name} was started with different settings: {settings}; "
            "repeat the command of that job, or start from the beginning with --overwrite"
        )


def is_rescan(partial: Path, rescan: bool) -> bool:
    """Whether a job that continues the journal `partial`, with or without `--rescan`, goes through the listing again
    and reuses earlier results.
    """
    is_begun = read_header(partial) is not None or before_rescan_path(partial).exists()
    if not is_begun:
        return rescan and output_of(partial).exists()
    return rescan or before_rescan_path(partial).exists() or finished_journal_path(output_of(partial)).exists()


class Journal:
    """The results of a running job, appended batch by batch and synced to disk every second.

    Raises ConvlineError if an earlier job left a journal (unless `resume` continues or `overwrite` discards it), if
    that journal belongs to another job, and if another process is writing it. `rescan` continues the journal of a
    finished job, too; `is_rescan` says whether earlier results are reused.
    """

    def __init__(
        self, path: Path, header: dict[str, Any], *, resume: bool, overwrite: bool, rescan: bool = False
    ) -> None:
        self.path = path
        self._finished_path = finished_journal_path(output_of(path))
        self._header = json_line(header)
        if path.exists() and not (resume or overwrite or rescan):
            raise ConvlineError(
                f"{path} holds an unfinished job: --resume continues it, --overwrite starts from the beginning"
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open_in_place(path)
        try:
            lock_file(self._file, path, path, LOCK_SECONDS)
            self._begin(header, overwrite, rescan)
        except BaseException:
            self._file.close()
            raise
        self.batch_size: int = header["batch_size"]
        self._last_sync = time.monotonic()

    def _begin(self, header: dict[str, Any], overwrite: bool, rescan: bool) -> None:
        before = before_rescan_path(self.path)
        if overwrite:
            # first: beside an unfinished journal, that of a finished job would stand for a rescan
            self._finished_path.unlink(missing_ok=True)
            before.unlink(missing_ok=True)
            self._file.truncate(0)
        self.is_rescan = is_rescan(self.path, rescan)
        if not self.is_rescan:
            self._finished_path.unlink(missing_ok=True)  # its table is gone
        earlier = header_of(self._file, self.path)
        try:
            finished = read_header(self._finished_path)
            headers = {self.path: earlier, before: read_header(before), output_of(self.path): finished}
            for name, known in headers.items():
                if known is not None:
                    # a rescan is for listings that changed
                    check_same_job(name, known, header, ["listing"] if self.is_rescan else [])
        except ConvlineError:
            if earlier is None:  # the file is new, and nothing has begun
                remove_open_file(self._file, self.path)
            raise
        if earlier is None:  # a new file, or one of a job that was killed before the header was whole
            self._write_only_header()

    def _write_only_header(self) -> None:
        self._file.truncate(0)
        self._file.write(self._header)
        self._file.flush()

    def set_aside(self) -> Iterator[JournalRecord]:
        """Move all records to another file, which is kept until `keep`, and return all earlier records."""
        earlier_path = before_rescan_path(self.path)
        remove_leftovers(earlier_path)
        with atomic_write(earlier_path) as merged, ExitStack() as stack:
            merged.write(self._header)
            if earlier_path.exists():  # of a rescan that was stopped
                merged.writelines(record_lines(stack.enter_context(earlier_path.open("rb"))))
            merged.writelines(line for line in record_lines(self._file) if line.endswith(b"\n"))
        self._write_only_header()
        return earlier_records(self.path)

    def keep_whole_batches(self, batch_size: int) -> int:
        """Cut off a torn last line and an incomplete last batch; returns the number of records that remain."""
        self._file.seek(0)
        end = position = len(self._file.readline())
        count = 0
        for line in record_lines(self._file):
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

    def has_records_of_finished(self) -> bool:
        """Whether the records are those of the finished job, byte for byte."""
        if not self._finished_path.exists():
            return False
        with self._finished_path.open("rb") as finished:
            pairs = zip_longest(record_lines(self._file), record_lines(finished))
            return all(mine == theirs for mine, theirs in pairs)

    def keep(self, footer: dict[str, Any]) -> None:
        """Rename the journal to that of a finished job, once the table that `footer` describes is written."""
        self._file.write(footer_line(footer))
        self._file.flush()
        self.sync()
        before_rescan_path(self.path).unlink(missing_ok=True)
        rename_open_file(self._file, self.path, self._finished_path)
        sync_folder(self.path.parent)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
