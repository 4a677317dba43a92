"""The format of a journal: JSON Lines of a header, a record for each file, and in a finished job a footer."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice, takewhile
from pathlib import Path
from typing import IO, Any

from convline.errors import ConvlineError
from convline.inputs.input_file import FileVersion
from serving.output_files import before_rescan_path, finished_journal_path, output_of
from serving.records import Entry, Prediction, Reject

LINES_AT_ONCE = 1000  # lines of a journal that are parsed together
MAX_FOOTER = 2**16  # bytes
FOOTER_START = b'{"finished":'


@dataclass(frozen=True)
class JournalRecord:
    """A line of the journal: an entry, and the stamp (size and time) of its file before it was read."""

    entry: Entry
    stamp: FileVersion | None

    def line(self) -> bytes:
        return json_line(entry_fields(self.entry) | {"stamp": self.stamp})

    @classmethod
    def parse(cls, line: bytes) -> JournalRecord:
        return cls.from_fields(json.loads(line))

    @classmethod
    def from_fields(cls, fields: dict[str, Any]) -> JournalRecord:
        stamp = fields.pop("stamp")
        if "reason" in fields:
            entry: Entry = Reject(**fields)
        else:
            labels, probabilities = tuple(fields["labels"]), tuple(fields["probabilities"])
            others = fields.get("decision"), fields.get("unfamiliar")
            entry = Prediction(fields["path"], labels, probabilities, *others)
        return cls(entry, None if stamp is None else (stamp[0], stamp[1]))


def earlier_records(partial: Path) -> Iterator[JournalRecord]:
    """What a rescan knows, streamed: the records of the finished job, then those of a rescan that was stopped."""
    paths = (finished_journal_path(output_of(partial)), before_rescan_path(partial))
    return chain.from_iterable(read_records(path) for path in paths if path.exists())


def read_records(path: Path) -> Iterator[JournalRecord]:
    """The records of a journal, streamed."""
    with path.open("rb") as file:
        records = record_lines(file)
        while lines := list(islice(records, LINES_AT_ONCE)):
            try:
                # parsed together, which takes half the time
                yield from map(JournalRecord.from_fields, json.loads(b"[" + b",".join(lines) + b"]"))
            except (ValueError, KeyError, TypeError) as error:
                raise ConvlineError(f"{path} is damaged; start from the beginning with --overwrite") from error


def record_lines(file: IO[bytes]) -> Iterator[bytes]:
    """The lines between the header and the footer of an open journal; the last one may be torn."""
    file.seek(0)
    file.readline()
    return takewhile(lambda line: not line.startswith(FOOTER_START), file)


def read_footer(path: Path) -> dict[str, Any] | None:
    """The content of the last line of a finished job's journal; None if there is no such line, or no journal.

    Raises ValueError or KeyError for a damaged one.
    """
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - MAX_FOOTER))
            line = file.read().splitlines(keepends=True)[-1:]
    except FileNotFoundError:
        return None
    if not line or not line[0].startswith(FOOTER_START):
        return None
    footer: dict[str, Any] = json.loads(line[0])["finished"]
    return footer


def read_header(path: Path) -> dict[str, Any] | None:
    """The header of a journal; None if there is no journal. Raises ConvlineError for a damaged one."""
    try:
        with path.open("rb") as file:
            return header_of(file, path)
    except FileNotFoundError:
        return None


def header_of(file: IO[bytes], path: Path) -> dict[str, Any] | None:
    """The header of the open journal at `path`; None where it is not whole. Raises ConvlineError as `read_header`."""
    file.seek(0)
    line = file.readline()
    if not line.endswith(b"\n"):
        return None
    try:
        header: dict[str, Any] = json.loads(line)
    except ValueError as error:
        raise ConvlineError(f"{path} is damaged; start from the beginning with --overwrite") from error
    return header


def entry_fields(entry: Entry) -> dict[str, Any]:
    """An entry as it stands in a journal and in the rejects."""
    if isinstance(entry, Reject):
        return {"path": entry.path, "reason": entry.reason, "detail": entry.detail}
    others = {"decision": entry.decision, "unfamiliar": entry.unfamiliar}
    return {
        "path": entry.path,
        "labels": entry.labels,
        "probabilities": entry.probabilities,
        **{name: value for name, value in others.items() if value is not None},
    }


def json_line(fields: dict[str, Any]) -> bytes:
    """A line of a journal or of the rejects."""
    # ASCII, so that names which are not UTF-8 survive as escaped surrogates
    return json.dumps(fields, ensure_ascii=True, allow_nan=False).encode("ascii") + b"\n"


def footer_line(footer: dict[str, Any]) -> bytes:
    return json_line({"finished": footer})


def reject_line(entry: Reject) -> str:
    """A reject as its JSON line, without the newline."""
    return json_line(entry_fields(entry)).decode("ascii").rstrip("\n")
