"""Where a job on Ray keeps its shards: a folder that all machines share, or an object store such as S3.

In a folder the journal of a shard grows in place, and the next worker that takes the shard continues it. Files in an
object store cannot grow: there the journal lies on the worker's own disk, and other workers see finished shards only.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from convline.files import atomic_write, lock_file, open_in_place
from convline.inputs.listing import is_url
from convline.inputs.remote_files import open_file_system
from serving.journal import Journal
from serving.journal_format import JournalRecord, read_records

PLAN = "job.json"
LOCK = "lock"


class ShardStore(Protocol):
    """Shards by number, and the plan of the job that they belong to."""

    name: str

    def exists(self) -> bool: ...

    def lock(self) -> Any:
        """A context that excludes other drivers, where the storage has locks. Raises ConvlineError if another driver
        holds the lock.
        """

    def plan(self) -> dict[str, Any] | None: ...

    def write_plan(self, plan: dict[str, Any]) -> None: ...

    def has(self, shard: int) -> bool: ...

    def journal(self, shard: int, header: dict[str, Any]) -> Any:
        """A context with the Journal of the shard, which continues that of an earlier worker if there is one."""

    def finish(self, shard: int, journal: Journal) -> None:
        """Publish the finished shard."""

    def records(self, shard: int) -> Iterator[JournalRecord]: ...

    def clear(self) -> None:
        """Delete the plan and all shards."""

    def remove(self) -> None:
        """Delete the store."""


def open_shard_store(name: str) -> ShardStore:
    """The store at a folder's path or a URL."""
    return _ObjectShardStore(name) if is_url(name) else _FolderShardStore(name)


class _FolderShardStore:
    def __init__(self, name: str) -> None:
        self.name, self._folder = name, Path(name)

    def exists(self) -> bool:
        return self._folder.exists()

    @contextmanager
    def lock(self) -> Iterator[None]:
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / LOCK
        with open_in_place(path, "wb") as lock:
            lock_file(lock, path, self.name)
            yield

    def plan(self) -> dict[str, Any] | None:
        path = self._folder / PLAN
        return json.loads(path.read_bytes()) if path.exists() else None

    def write_plan(self, plan: dict[str, Any]) -> None:
        with atomic_write(self._folder / PLAN) as file:
            file.write(json.dumps(plan, allow_nan=False).encode())

    def _shard(self, shard: int) -> Path:
        return self._folder / f"{shard:05}.jsonl"

    def has(self, shard: int) -> bool:
        return self._shard(shard).exists()

    def journal(self, shard: int, header: dict[str, Any]) -> Journal:
        return Journal(self._shard(shard).with_suffix(".partial"), header, resume=True, overwrite=False)

    def finish(self, shard: int, journal: Journal) -> None:
        journal.path.rename(self._shard(shard))

    def records(self, shard: int) -> Iterator[JournalRecord]:
        return read_records(self._shard(shard))

    def clear(self) -> None:
        for path in self._folder.iterdir():
            if path.name != LOCK:
                path.unlink()

    def remove(self) -> None:
        shutil.rmtree(self._folder)


class _ObjectShardStore:
    def __init__(self, name: str) -> None:
        self.name = name
        self._system, self._folder = open_file_system(name)

    def exists(self) -> bool:
        return bool(self._system.exists(self._folder))

    @contextmanager
    def lock(self) -> Iterator[None]:
        yield  # there are no locks: shards are whole or absent, and two shards of one number are equal

    def plan(self) -> dict[str, Any] | None:
        path = f"{self._folder}/{PLAN}"
        return json.loads(self._system.cat_file(path)) if self._system.exists(path) else None

    def write_plan(self, plan: dict[str, Any]) -> None:
        self._system.makedirs(self._folder, exist_ok=True)
        self._system.pipe_file(f"{self._folder}/{PLAN}", json.dumps(plan, allow_nan=False).encode())

    def _shard(self, shard: int) -> str:
        return f"{self._folder}/{shard:05}.jsonl"

    def has(self, shard: int) -> bool:
        return bool(self._system.exists(self._shard(shard)))

    @contextmanager
    def journal(self, shard: int, header: dict[str, Any]) -> Iterator[Journal]:
        with (
            tempfile.TemporaryDirectory() as folder,
            Journal(Path(folder, f"{shard:05}.partial"), header, resume=False, overwrite=False) as journal,
        ):
            yield journal

    def finish(self, shard: int, journal: Journal) -> None:
        self._system.put_file(str(journal.path), self._shard(shard))

    def records(self, shard: int) -> Iterator[JournalRecord]:
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder, "shard")
            self._system.get_file(self._shard(shard), str(copy))
            yield from read_records(copy)

    def clear(self) -> None:
        if self.exists():
            self._system.rm(self._folder, recursive=True)

    remove = clear
