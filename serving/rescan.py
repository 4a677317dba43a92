"""`--rescan`: reuse the results of an earlier job for files that have not changed since."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterable

from convline.errors import Reason
from convline.inputs.input_file import InputFile
from serving.journal_format import JournalRecord
from serving.records import Entry, Reject
from serving.summary import RescanCounts

TRIED_AGAIN: tuple[Reason, ...] = ("unreadable", "timeout")  # which may have been due to the machine, not the file


class EarlierResults:
    """Journal records by path, in a temporary database on disk, as there may be millions. Of two records for one path
    the later one counts.
    """

    def __init__(self, records: Iterable[JournalRecord]) -> None:
        self._kept = self._classified_again = self._new = 0
        self._database = sqlite3.connect("")  # SQLite removes it when it is closed or the process dies
        self._database.execute(
            "create table results (path blob primary key, line blob, is_listed integer) without rowid"
        )
        rows = ((os.fsencode(record.entry.path), record.line()) for record in records)
        self._database.executemany("insert or replace into results values (?, ?, 0)", rows)

    def close(self) -> None:
        self._database.close()

    def find(self, file: InputFile) -> Entry | None:
        """The earlier entry of a file whose size and time are still the same; None for any other file.

        A file that could not be read, or took too long, is tried again.
        """
        path = (os.fsencode(file.path),)
        row = self._database.execute("select line, is_listed from results where path = ?", path).fetchone()
        if row is None:
            self._new += 1
            return None
        line, is_listed = row
        if not is_listed:
            self._database.execute("update results set is_listed = 1 where path = ?", path)
        record = JournalRecord.parse(line)
        is_tried_again = isinstance(record.entry, Reject) and record.entry.reason in TRIED_AGAIN
        if file.version is None or record.stamp != file.version or is_tried_again:
            self._classified_again += 1
            return None
        self._kept += 1
        return record.entry

    def counts(self) -> RescanCounts:
        """The counts of a rescan, once `find` was called for all files of the listing."""
        (vanished,) = self._database.execute("select count(*) from results where not is_listed").fetchone()
        return RescanCounts(self._kept, self._classified_again, self._new, vanished)
