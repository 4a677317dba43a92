"""`--rescan`: reuse the results of an earlier job for files that have not changed since."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterable

from convline.inputs.input_file import InputFile
from serving.journal import JournalRecord
from serving.records import Entry, Reject


class EarlierResults:
    """Journal records by path, in a temporary database on disk, as there may be millions. Of two records for one path
    the later one counts. `reused` counts the entries that `find` returned.
    """

    def __init__(self, records: Iterable[JournalRecord]) -> None:
        self.reused = 0
        self._database = sqlite3.connect("")  # SQLite removes it when it is closed or the process dies
        self._database.execute("create table results (path blob primary key, line blob) without rowid")
        rows = ((os.fsencode(record.entry.path), record.line()) for record in records)
        self._database.executemany("insert or replace into results values (?, ?)", rows)

    def close(self) -> None:
        self._database.close()

    def find(self, file: InputFile) -> Entry | None:
        """The earlier entry of a file whose size and time are still the same; None for any other file.

        A file that could not be read is tried again.
        """
        row = self._database.execute("select line from results where path = ?", (os.fsencode(file.path),)).fetchone()
        if row is None:
            return None
        record = JournalRecord.parse(row[0])
        was_unreadable = isinstance(record.entry, Reject) and record.entry.reason == "unreadable"
        if file.version is None or record.stamp != file.version or was_unreadable:
            return None
        self.reused += 1
        return record.entry
