"""What all archive readers share: safe member paths, links between members, and which members are held in memory."""

from __future__ import annotations

import sqlite3
from collections import deque
from collections.abc import Callable, Iterator

from convline.errors import ConvlineError, ImageError
from convline.inputs.input_file import FileLocation, InputFile, Rejected, check_size

WINDOW = 256  # consecutive members of a compressed archive
WINDOW_BYTES = 2**25  # that a window of members may hold in memory: on average 128 KiB each
LINK_TABLE_BYTES = 2**28  # of link names and targets that are remembered for one archive
ROWS_PER_QUERY = 1000


def inner_path(archive: str, name: str) -> str:
    """A member's path within its archive, without `.` and `..`; "" is the root of the archive.

    Raises ConvlineError for a path that leads out of the archive, on Unix or on Windows.
    """
    path = normalized(name)
    portable = name.replace("\\", "/")
    if path is None or portable.startswith("/") or name[1:3] in (":\\", ":/") or normalized(portable) is None:
        raise ConvlineError(f"{archive} holds a member that leaves the archive, {name!r}; refused: do not trust it")
    return path


def normalized(path: str) -> str | None:
    """A relative path without `.`, `..` and empty parts; None if it leads out of the folder where it starts."""
    parts: list[str] = []
    for part in path.split("/"):
        if part == "..":
            if not parts:
                return None
            parts.pop()
        elif part not in ("", "."):
            parts.append(part)
    return "/".join(parts)


def symlink_target(path: str, target: str) -> str | None:
    """The path that a symbolic link at `path` points to, within its archive; None if it leads out of the archive."""
    return None if target.startswith("/") else normalized(f"{path.rpartition('/')[0]}/{target}")


def is_hidden(path: str) -> bool:
    return any(part.startswith(".") for part in path.split("/"))


def member_file(path: str, size: int, locate: Callable[[], FileLocation]) -> InputFile:
    """The file of a member of `size` bytes; a reject if that is too large, or if `locate` raises ImageError."""
    try:
        if not path or path.endswith("/"):
            raise ImageError("unsupported", "a member without a name")
        check_size(size)
        return InputFile(path, locate())
    except ImageError as error:
        return InputFile(path or ".", Rejected(error))


class MemoryWindow:
    """Decides which members to hold in memory: any `WINDOW` consecutive ones take at most `WINDOW_BYTES`.

    This bounds the memory of a job, which goes through the members in order.
    """

    def __init__(self) -> None:
        self._sizes: deque[int] = deque([0] * WINDOW, WINDOW)
        self._total = 0

    def admits(self, size: int) -> bool:
        """Whether to hold the next member, of `size` bytes."""
        self._total -= self._sizes[0]
        is_held = self._total + size <= WINDOW_BYTES
        self._sizes.append(size if is_held else 0)
        self._total += self._sizes[-1]
        return is_held


class LinkTable:
    """The links of an archive, indexed by their targets, in a temporary database on disk: there may be millions."""

    def __init__(self) -> None:
        # SQLite deletes it when it is closed or the process ends. An abandoned listing may be closed by another thread
        self._database = sqlite3.connect("", check_same_thread=False)
        self._database.execute("create table links (target blob, path blob)")
        self._database.execute("create index targets on links (target)")
        self._bytes_left = LINK_TABLE_BYTES
        self.added = 0  # number of links

    def close(self) -> None:
        self._database.close()

    def add(self, path: str, target: str) -> bool:
        """Remember a link; False if there are too many."""
        row = target.encode("utf-8", "surrogateescape"), path.encode("utf-8", "surrogateescape")
        self._bytes_left -= sum(map(len, row))
        if self._bytes_left < 0:
            return False
        self._database.execute("insert into links values (?, ?)", row)
        self.added += 1
        return True

    def pop_links_to(self, target: str) -> Iterator[str]:
        """Remove and give the links that lead to `target`, directly or through other links."""
        targets = [target.encode("utf-8", "surrogateescape")]
        while targets:
            current = targets.pop()
            while rows := self._database.execute(
                f"select rowid, path from links where target = ? order by rowid limit {ROWS_PER_QUERY}", (current,)
            ).fetchall():
                self._database.executemany("delete from links where rowid = ?", [row[:1] for row in rows])
                for _, path in rows:
                    if self._database.execute("select 1 from links where target = ?", (path,)).fetchone():
                        targets.append(path)
                    yield path.decode("utf-8", "surrogateescape")

    def unresolved(self) -> Iterator[tuple[str, str]]:
        """The links that `pop_links_to` has not removed, with their targets."""
        for row in self._database.execute("select path, target from links order by rowid"):
            yield row[0].decode("utf-8", "surrogateescape"), row[1].decode("utf-8", "surrogateescape")
