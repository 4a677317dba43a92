"""Writes rows of CSV that every reader takes apart again as they were."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from typing import IO


class CsvRows:
    """Rows on a text file that was opened with newline=""; each ends with a line feed."""

    def __init__(self, file: IO[str]) -> None:
        self._writer = csv.writer(file, lineterminator="\n")
        # a carriage return ends a row for readers of CSV, but csv.writer does not quote it
        self._quoting_writer = csv.writer(file, lineterminator="\n", quoting=csv.QUOTE_ALL)

    def write(self, cells: Sequence[str | float]) -> None:
        has_return = any("\r" in cell for cell in cells if isinstance(cell, str))
        (self._quoting_writer if has_return else self._writer).writerow(cells)
