"""Reads tables of labels as rows of text: CSV, JSON lines and Parquet."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import PurePath
from typing import IO

from convline.errors import ConvlineError
from pipeline.preparing.parquet_files import as_text, class_names, open_parquet, read_rows

DELIMITERS = ",;\t"


@dataclass(frozen=True)
class LabelTable:
    """`rows`: where each row is, for messages ("labels.csv, line 3"), and its cells by column, "" for empty ones; a
    column that was not wanted may be left out."""

    columns: list[str]
    rows: list[tuple[str, dict[str, str]]]


def read_table(name: str, file: IO[bytes], wanted: Collection[str | None]) -> LabelTable:
    """The `wanted` columns of the table in `file`, as far as it has them. The ending of `name` says whether it is
    Parquet, JSON lines or, any other, CSV.

    Raises ConvlineError for a file that is none, and for a cell that is neither text nor a whole number.
    """
    ending = PurePath(name).suffix.lower()
    if ending == ".parquet":
        return _read_parquet(name, file, wanted)
    return _read_json_lines(name, file, wanted) if ending in (".jsonl", ".ndjson") else _read_csv(name, file)


def _read_csv(name: str, file: IO[bytes]) -> LabelTable:
    """Comma, semicolon and tab separate the columns."""
    try:
        with io.TextIOWrapper(file, encoding="utf-8-sig", newline="") as opened:
            header = opened.readline()
            opened.seek(0)
            reader = csv.DictReader(opened, delimiter=max(DELIMITERS, key=header.count), restval="", strict=True)
            columns = [column.strip() for column in reader.fieldnames or []]
            reader.fieldnames = columns
            rows = []
            for row in reader:
                if None in row:
                    raise ConvlineError(f"{name}, line {reader.line_num}: it has more cells than the header")
                cells = {column: value.strip() for column, value in row.items()}
                rows.append((f"{name}, line {reader.line_num}", cells))
            return LabelTable(columns, rows)
    except (csv.Error, UnicodeDecodeError) as error:
        raise ConvlineError(f"{name} is not a CSV file in UTF-8 ({error})") from error


def _read_json_lines(name: str, file: IO[bytes], wanted: Collection[str | None]) -> LabelTable:
    columns: dict[str, None] = {}
    rows = []
    for number, line in enumerate(file, start=1):
        where = f"{name}, line {number}"
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise ConvlineError(f"{where} is not JSON in UTF-8 ({error}); write one object a line") from error
        if not isinstance(row, dict):
            raise ConvlineError(f"{where} is not a JSON object; write one object a line")
        columns |= dict.fromkeys(row)
        rows.append((where, {column: as_text(row[column], where) for column in row if column in wanted}))
    return LabelTable(list(columns), rows)


def _read_parquet(name: str, file: IO[bytes], wanted: Collection[str | None]) -> LabelTable:
    with open_parquet(name, file) as opened:
        schema = opened.schema_arrow
        names = class_names(name, schema)
        read = [column for column in schema.names if column in wanted]
        rows = []
        for number, values in enumerate(read_rows(opened, read)):
            where = f"{name}, row {number}"
            cells = zip(read, values, strict=True)
            rows.append((where, {column: as_text(value, where, names.get(column)) for column, value in cells}))
        return LabelTable(schema.names, rows)
