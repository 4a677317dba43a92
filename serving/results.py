"""The journal of a classification, and the table rendered from it.

`<output>.partial` is JSON Lines: a header that says what the job is, then one entry a found file, in
listing order. The table and `<output>.rejects.jsonl` are rendered from it and appear by rename. A job
that was killed goes on after the last whole batch, so that its batches, and so its bytes, are those of
a job that was not.
"""

from __future__ import annotations

import csv
import fcntl
import json
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

from serving.classifier import Prediction, Reject
from serving.errors import ConvlineError
from serving.files import atomic_write, sync_folder

Entry = Prediction | Reject
Format = Literal["csv", "jsonl"]

SYNC_SECONDS = 1.0  # what a power cut may cost; a mere kill costs at most a batch


@dataclass
class Tally:
    """Counts of a job; `classified + rejected == found`."""

    classified: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    labels: Counter[str] = field(default_factory=Counter)

    @property
    def rejected(self) -> int:
        return self.reasons.total()

    @property
    def found(self) -> int:
        return self.classified + self.rejected

    def add(self, entry: Entry) -> None:
        if isinstance(entry, Reject):
            self.reasons[entry.reason] += 1
        else:
            self.classified += 1
            self.labels[entry.labels[0]] += 1


def output_format(output: Path) -> Format:
    """By the file's ending. Raises ConvlineError for one that is not known."""
    formats: dict[str, Format] = {".csv": "csv", ".jsonl": "jsonl"}
    if output.suffix.lower() not in formats:
        raise ConvlineError(f"cannot tell the format of {output}; end its name in {' or '.join(formats)}")
    return formats[output.suffix.lower()]


def finished_tally(output: Path) -> Tally:
    """The counts of a finished job, read off its table and its rejects."""
    tally = Tally()
    with output.open(encoding="utf-8", errors="surrogateescape", newline="") as table:
        if output_format(output) == "csv":
            labels = (row["label"] for row in csv.DictReader(table))
        else:
            labels = (json.loads(line)["label"] for line in table)
        tally.labels.update(labels)
    tally.classified = tally.labels.total()
    with rejects_path(output).open("rb") as rejects:
        tally.reasons.update(json.loads(line)["reason"] for line in rejects)
    return tally


def partial_path(output: Path) -> Path:
    return output.with_name(output.name + ".partial")


def rejects_path(output: Path) -> Path:
    return output.with_name(output.name + ".rejects.jsonl")


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
        self._file = open(path, "a+b")  # noqa: SIM115  # closed by __exit__
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._file.close()
            raise ConvlineError(f"another job is writing {path}; wait for it or choose another output") from error
        if not (path.exists() and os.path.samestat(os.fstat(self._file.fileno()), path.stat())):
            self._file.close()
            raise ConvlineError(f"another job has just finished {path}; look at its output first")
        if overwrite:
            self._file.truncate(0)
        self._begin(header)
        self._synced = time.monotonic()

    def _begin(self, header: dict[str, Any]) -> None:
        self._file.seek(0)
        line = self._file.readline()
        if not line.endswith(b"\n"):  # new, or killed before the header was whole
            self._file.truncate(0)
            self._file.write(_line(header))
            self._file.flush()
            return
        try:
            earlier = json.loads(line)
        except ValueError as error:
            raise ConvlineError(f"{self.path} is damaged; start from the beginning with --overwrite") from error
        if changed := [key for key in header if earlier.get(key) != header[key]]:
            raise ConvlineError(
                f"{self.path} belongs to a job with another {', '.join(changed)}; "
                "repeat that job's command, or start from the beginning with --overwrite"
            )

    def keep_whole_batches(self, batch_size: int) -> int:
        """Cut a torn last line and a broken batch; returns how many entries stay."""
        self._file.seek(0)
        ends = [len(self._file.readline())]
        count, position = 0, ends[0]
        for line in self._file:
            if not line.endswith(b"\n"):
                break
            position, count = position + len(line), count + 1
            if count % batch_size == 0:
                ends = [position]
        self._file.truncate(ends[0])
        return count - count % batch_size

    def entries(self) -> Iterator[Entry]:
        """The entries so far, streamed."""
        with self.path.open("rb") as file:
            file.readline()
            for line in file:
                yield _parse(line)

    def append(self, entries: Iterable[Entry]) -> None:
        self._file.write(b"".join(_line(_fields(entry)) for entry in entries))
        self._file.flush()
        if time.monotonic() - self._synced > SYNC_SECONDS:
            os.fsync(self._file.fileno())
            self._synced = time.monotonic()

    def render(self, output: Path, top_k: int) -> None:
        """Write the table and the rejects, then drop the journal."""
        os.fsync(self._file.fileno())
        with ExitStack() as stack:
            table = stack.enter_context(
                atomic_write(output, "w", encoding="utf-8", errors="surrogateescape", newline="")
            )
            # closed first, so that the table, which says "done", appears last
            rejects = stack.enter_context(atomic_write(rejects_path(output), "wb"))
            write_table = table_writer(table, output_format(output), top_k)
            for entry in self.entries():
                if isinstance(entry, Reject):
                    rejects.write(_line(_fields(entry)))
                else:
                    write_table(entry)
        self.path.unlink()
        sync_folder(self.path.parent)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def table_writer(file: IO[str], format: Format, top_k: int) -> Any:
    """A function that writes one Prediction as one row; the header, where there is one, is written now."""
    ranks = [""] + [f"_{rank}" for rank in range(2, top_k + 1)]
    columns = ["path"] + [f"{name}{rank}" for rank in ranks for name in ("label", "probability")]
    if format == "jsonl":
        return lambda row: file.write(
            json.dumps(dict(zip(columns, _cells(row), strict=False)), ensure_ascii=True) + "\n"
        )
    writer = csv.writer(file, lineterminator="\n")
    # the writer does not see that a carriage return ends a row too
    careful = csv.writer(file, lineterminator="\n", quoting=csv.QUOTE_ALL)
    writer.writerow(columns)
    return lambda row: (careful if "\r" in row.path else writer).writerow(_cells(row))


def _cells(row: Prediction) -> list[str | float]:
    pairs = zip(row.labels, row.probabilities, strict=True)
    return [row.path, *(cell for pair in pairs for cell in pair)]


def _fields(entry: Entry) -> dict[str, Any]:
    if isinstance(entry, Reject):
        return {"path": entry.path, "reason": entry.reason, "detail": entry.detail}
    return {"path": entry.path, "labels": entry.labels, "probabilities": entry.probabilities}


def _parse(line: bytes) -> Entry:
    fields = json.loads(line)
    if "reason" in fields:
        return Reject(**fields)
    return Prediction(fields["path"], tuple(fields["labels"]), tuple(fields["probabilities"]))


def _line(fields: dict[str, Any]) -> bytes:
    # ASCII, so that names which are not UTF-8 survive as escaped surrogates
    return json.dumps(fields, ensure_ascii=True).encode("ascii") + b"\n"


def reject_line(entry: Reject) -> str:
    """A reject as its JSON line, without the newline."""
    return _line(_fields(entry)).decode("ascii").rstrip("\n")
