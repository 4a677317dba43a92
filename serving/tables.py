"""The output table: its formats (CSV, JSON Lines, Parquet) and its columns; one row per prediction."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any, Literal, Protocol

from convline.csv_rows import CsvRows
from convline.errors import ConvlineError
from serving.records import Prediction

Format = Literal["csv", "jsonl", "parquet"]
FORMATS: dict[str, Format] = {".csv": "csv", ".jsonl": "jsonl", ".parquet": "parquet"}
OPTIONAL_COLUMNS = ("decision", "unfamiliar")  # which follow the first probability, where a job has them
ROW_GROUP = 2**16  # rows of a Parquet file that are held in memory
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "\n")  # a spreadsheet runs a cell that begins so as a formula


def optional_columns(threshold: float | None, unfamiliar: bool) -> tuple[str, ...]:
    """The columns of OPTIONAL_COLUMNS that a job with these options has."""
    has = (threshold is not None, unfamiliar)
    return tuple(name for name, is_there in zip(OPTIONAL_COLUMNS, has, strict=True) if is_there)


class Table(Protocol):
    """A table that is being written; `flush` passes all rows so far to the file."""

    def write(self, row: Prediction) -> object: ...

    def flush(self) -> None: ...


def table_format(output: Path | str) -> Format:
    """The format that the file's ending stands for. Raises ConvlineError for an unknown one, and if a library for it is
    missing.
    """
    ending = Path(output).suffix.lower()
    if ending not in FORMATS:
        raise ConvlineError(f"cannot tell the format of {output}; end its name in {' or '.join(FORMATS)}")
    if FORMATS[ending] == "parquet" and find_spec("pyarrow") is None:
        raise ConvlineError(f"{output} needs pyarrow: pip install 'convline[parquet]'")
    return FORMATS[ending]


@contextmanager
def open_table(
    file: IO[bytes], format: Format, top_k: int, csv_safe: bool = False, optional: Sequence[str] = ()
) -> Iterator[Table]:
    """A table on `file`, finished at the end; `file` stays open.

    `csv_safe` puts a ' before cells that a spreadsheet would run as a formula. `optional` are those of OPTIONAL_COLUMNS
    for which all predictions have a value, in that order.
    """
    ranks = [""] + [f"_{rank}" for rank in range(2, top_k + 1)]
    columns = ["path"] + [f"{name}{rank}" for rank in ranks for name in ("label", "probability")]
    columns[3:3] = optional
    if format == "parquet":
        parquet = _Parquet(file, columns)
        yield parquet
        parquet.close()
        return
    text = io.TextIOWrapper(file, encoding="utf-8", errors="surrogateescape", newline="")
    try:
        yield _Csv(text, columns, csv_safe) if format == "csv" else _JsonLines(text, columns)
        text.flush()
    finally:
        text.detach()


def read_rows(table: Path, csv_safe: bool = False) -> Iterator[Prediction]:
    """The rows, each with its most probable class only, and with the path as `path_in_table` gives it.

    `csv_safe` as for `open_table`. Raises ValueError or KeyError for a file that is not such a table.
    """
    if table_format(table) == "parquet":
        import pyarrow.parquet

        with pyarrow.parquet.ParquetFile(table) as parquet:
            optional = [name for name in OPTIONAL_COLUMNS if name in parquet.schema_arrow.names]
            for batch in parquet.iter_batches(columns=["path", "label", "probability", *optional]):
                yield from map(_as_prediction, batch.to_pylist())
        return
    with table.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        rows = csv.DictReader(file) if table_format(table) == "csv" else map(json.loads, file)
        for row in rows:
            if csv_safe:
                row |= {name: _unsafe(row[name]) for name in ("label", "decision") if name in row}
            yield _as_prediction(row)


def _as_prediction(row: dict[str, Any]) -> Prediction:
    unfamiliar = row.get("unfamiliar")
    return Prediction(
        row["path"],
        (row["label"],),
        (float(row["probability"]),),
        row.get("decision"),
        None if unfamiliar is None else float(unfamiliar),
    )


def path_in_table(path: str, table: Path, csv_safe: bool = False) -> str:
    """A path as it stands in the table, where it may be escaped."""
    if table_format(table) == "parquet":
        return _utf8(path)
    return _safe(path) if csv_safe else path


def _cells(row: Prediction) -> list[str | float]:
    pairs = zip(row.labels, row.probabilities, strict=True)
    cells = [row.path, *(cell for pair in pairs for cell in pair)]
    cells[3:3] = [value for value in (row.decision, row.unfamiliar) if value is not None]
    return cells


class _Csv:
    def __init__(self, file: IO[str], columns: list[str], is_safe: bool) -> None:
        self.flush = file.flush
        self._is_safe = is_safe
        self._rows = CsvRows(file)
        self._rows.write(columns)

    def write(self, row: Prediction) -> None:
        cells = _cells(row)
        if self._is_safe:
            cells = [_safe(cell) if isinstance(cell, str) else cell for cell in cells]
        self._rows.write(cells)


class _JsonLines:
    def __init__(self, file: IO[str], columns: list[str]) -> None:
        self.flush = file.flush
        self._file, self._columns = file, columns

    def write(self, row: Prediction) -> None:
        # ASCII, so that names that are not UTF-8 survive as escaped surrogates
        cells = dict(zip(self._columns, _cells(row), strict=True))
        self._file.write(json.dumps(cells, ensure_ascii=True, allow_nan=False) + "\n")


class _Parquet:
    """Strings and float32. A string must be UTF-8: other bytes of a name are written as \\xNN."""

    def __init__(self, file: IO[bytes], columns: list[str]) -> None:
        import pyarrow
        import pyarrow.parquet

        names_of_numbers = ("probability", "unfamiliar")
        types = [pyarrow.float32() if name.startswith(names_of_numbers) else pyarrow.string() for name in columns]
        self._schema = pyarrow.schema(list(zip(columns, types, strict=True)))
        self._writer = pyarrow.parquet.ParquetWriter(file, self._schema, compression="zstd")
        self._rows: list[list[Any]] = []

    def write(self, row: Prediction) -> None:
        path, *rest = _cells(row)
        self._rows.append([_utf8(str(path)), *rest])
        if len(self._rows) == ROW_GROUP:
            self._write_group()

    def _write_group(self) -> None:
        import pyarrow

        columns = zip(*self._rows, strict=True)
        arrays = [pyarrow.array(column, field.type) for column, field in zip(columns, self._schema, strict=True)]
        self._writer.write_table(pyarrow.Table.from_arrays(arrays, schema=self._schema))
        self._rows.clear()

    def flush(self) -> None:
        """Does nothing: a Parquet file can only be read once it is complete."""

    def close(self) -> None:
        if self._rows:
            self._write_group()
        self._writer.close()


def _safe(cell: str) -> str:
    """Put a ' before a cell that a spreadsheet would run as a formula, and before one that already looks like that."""
    return f"'{cell}" if cell.lstrip("'").startswith(FORMULA_STARTS) else cell


def _unsafe(cell: str) -> str:
    """Undo `_safe`."""
    return cell[1:] if cell != _safe(cell) else cell


def _utf8(name: str) -> str:
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
