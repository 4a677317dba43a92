"""The names of the files that a job writes beside its table."""

from __future__ import annotations

from pathlib import Path

PARTIAL = ".partial"


def partial_path(output: Path) -> Path:
    """The journal of an unfinished job."""
    return output.with_name(output.name + PARTIAL)


def finished_journal_path(output: Path) -> Path:
    """The journal of the finished job that wrote the table, for `--rescan`."""
    return output.with_name(output.name + ".journal")


def rejects_path(output: Path) -> Path:
    return output.with_name(output.name + ".rejects.jsonl")


def shards_path(output: Path) -> Path:
    """Where a job on a cluster keeps its shards."""
    return output.with_name(output.name + ".shards")


def before_rescan_path(partial: Path) -> Path:
    """Where the earlier records of an unfinished journal are kept during a rescan."""
    return partial.with_name(partial.name + ".before")


def output_of(partial: Path) -> Path:
    """The table that is made from the journal `partial`."""
    return partial.with_name(partial.name.removesuffix(PARTIAL))


def written_paths(output: Path) -> list[Path]:
    """The files that a job may leave: its table and those beside it."""
    partial = partial_path(output)
    return [output, rejects_path(output), finished_journal_path(output), partial, before_rescan_path(partial)]
