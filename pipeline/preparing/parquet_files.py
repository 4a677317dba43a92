"""Opens Parquet files and reads them in batches of rows, with the class names that Hugging Face stores in them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from convline.errors import ConvlineError

ROWS = 16  # of a batch: photographs of 10 MB each are 160 MB
BUFFER = 2**20  # bytes of a column that are read at a time


@contextmanager
def open_parquet(name: str, file: Path | IO[bytes]) -> Iterator[Any]:
    """A `pyarrow.parquet.ParquetFile`. Raises ConvlineError for a damaged one, also while the block reads it, and
    without pyarrow."""
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise ConvlineError(f"{name} needs pyarrow: pip install 'convline[parquet]'") from error
    try:
        # pre_buffer holds what was read until the end: 1.0 GB rather than 0.2 for a file of 0.8 GB
        with ParquetFile(file, buffer_size=BUFFER, pre_buffer=False) as opened:
            if len(set(opened.schema_arrow.names)) < len(opened.schema_arrow.names):
                raise ConvlineError(f"{name} has two columns of one name; rename one")
            yield opened
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = str(error).partition("\n")[0]
        raise ConvlineError(f"cannot read the Parquet file {name}: {reason}; fetch it again") from error


def read_rows(opened: Any, columns: Sequence[str]) -> Iterator[tuple[Any, ...]]:
    """The values of the columns in each row, as Python's own. A column `image.path` is the field `path` of `image`,
    and its values are dictionaries with that field alone."""
    names = [column.rpartition(".")[0] if column not in opened.schema_arrow.names else column for column in columns]
    # without threads, as processes are forked while the file is read
    for batch in opened.iter_batches(ROWS, columns=list(columns), use_threads=False):
        yield from zip(*(batch.column(name).to_pylist() for name in names), strict=True)


def class_names(name: str, schema: Any) -> dict[str, list[str]]:
    """The class names of each column that is a ClassLabel of Hugging Face's `datasets`.

    Raises ConvlineError where the schema's metadata are not JSON.
    """
    try:
        found = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    except (ValueError, RecursionError) as error:
        raise ConvlineError(f"{name}: its metadata 'huggingface' are not JSON ({error}); fetch it again") from error
    for key in ("info", "features"):
        found = found.get(key) if isinstance(found, dict) else None
    features = found.items() if isinstance(found, dict) else ()
    return {
        column: [str(label) for label in feature["names"]]
        for column, feature in features
        if isinstance(feature, dict) and isinstance(feature.get("names"), list)
    }


def as_text(value: Any, where: str, names: Sequence[str] | None = None) -> str:
    """A cell of a table as text, "" where it is null; the number of a class becomes its name, if there are `names`.

    Raises ConvlineError, with `where`, for a number without a name and for what is neither text nor a whole number.
    """
    if value is None:
        return ""
    if isinstance(value, str):
        return value.strip()
    if not isinstance(value, int):
        raise ConvlineError(f"{where}: {str(value)[:50]!r} is neither text nor a whole number; write it as one")
    if names is None or isinstance(value, bool):
        return str(value)
    if not 0 <= value < len(names):
        raise ConvlineError(
            f"{where}: {value} is none of the file's {len(names)} classes; mend it, or remove what has no label"
        )
    return names[value]
