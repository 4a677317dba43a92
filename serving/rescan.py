"""What an earlier listing's journal still knows, when the listing has changed since."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterable

from convline.inputs.input_file import InputFile
from serving.journal import Record
from serving.records import Entry, Reject


class Kept:
    """Records by path, in a temporary database on disk, as there may be millions. A later one replaces an earlier."""

    def __init__(self, records: Iterable[Record]) -> None:
        self.found = 0
        self._database = sqlite3.connect("")  # SQLite removes it when it is closed, or its process dies
        self._database.execute("create table kept (path blob primary key, line blob) without rowid")
        rows = ((os.fsencode(record.entry.path), record.line()) for record in records)
        self._database.executemany("insert or replace into kept values (?, ?)", rows)

    def find(self, file: InputFile) -> Entry | None:
        """The file's entry, where the file is still what it was, as far as can be told."""
        row = self._database.execute("select line from kept where path = ?", (os.fsencode(file.path),)).fetchone()
        if row is None:
            return None
        record = Record.parse(row[0])
        was_unreadable = isinstance(record.entry, Reject) and record.entry.reason == "unreadable"
        if file.version is None or record.stamp != file.version or was_unreadable:
            return None
        self.found += 1
        return record.entry
