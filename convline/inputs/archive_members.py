"""What the members of all archives have in common: where their names lead, and which of them are held in memory."""

from __future__ import annotations

import sqlite3
from collections import deque
from collections.abc import Callable, Iterator

from convline.errors import ConvlineError, ImageError
from convline.inputs.input_file import Content, InputFile, Unusable, check_size

ROW = 256  # members of a compressed stream
HELD = 2**25  # bytes of so many members in a row that are held in memory: 128 KiB each
LINKS = 2**28  # bytes of names that links are remembered by
AT_ONCE = 1000  # links that are looked up at once


def inner_path(archive: str, name: str) -> str:
    """A member's path within its archive, without `.` and `..`; "" is the archive itself.

    Raises ConvlineError for one that leaves the archive, on whatever system.
    """
    path = normal(name)
    portable = name.replace("\\", "/")
    if path is None or portable.startswith("/") or name[1:3] in (":\\", ":/") or normal(portable) is None:
        raise ConvlineError(f"{archive} holds a member that leaves the archive, {name!r}; refused: do not trust it")
    return path


def normal(path: str) -> str | None:
    """A path without `.`, `..` and empty parts; None where it leads out of where it begins."""
    parts: list[str] = []
    for part in path.split("/"):
        if part == "..":
            if not parts:
                return None
            parts.pop()
        elif part not in ("", "."):
            parts.append(part)
    return "/".join(parts)


def link_target(path: str, target: str) -> str | None:
    """Where a symbolic link at `path` leads to, within its archive; None where it leads out of it."""
    return None if target.startswith("/") else normal(f"{path.rpartition('/')[0]}/{target}")


def is_hidden(path: str) -> bool:
    return any(part.startswith(".") for part in path.split("/"))


def member(path: str, size: int, content: Callable[[], Content]) -> InputFile:
    """A member of `size` bytes, which is unusable where that is too many, or where `content` raises ImageError."""
    try:
        if not path or path.endswith("/"):
            raise ImageError("unsupported", "a member without a name")
        check_size(size)
        return InputFile(path, content())
    except ImageError as problem:
        return InputFile(path or ".", Unusable(problem))


class Window:
    """Which members to hold in memory, so that no `ROW` of them in a row take more than `HELD` bytes."""

    def __init__(self) -> None:
        self._sizes: deque[int] = deque([0] * ROW, ROW)
        self._total = 0

    def takes(self, size: int) -> bool:
        """Whether the next member, of `size` bytes, is to be held."""
        self._total -= self._sizes[0]
        is_held = self._total + size <= HELD
        self._sizes.append(size if is_held else 0)
        self._total += self._sizes[-1]
        return is_held


class Links:
    """Links by what they lead to, in a temporary database on disk, as there may be millions."""

    def __init__(self) -> None:
        self._database = sqlite3.connect("")  # SQLite removes it when it is closed, or its process dies
        self._database.execute("create table links (target blob, path blob)")
        self._database.execute("create index targets on links (target)")
        self._room = LINKS
        self.found = 0

    def add(self, path: str, target: str) -> bool:
        """Remember a link; False where there are too many."""
        row = target.encode("utf-8", "surrogateescape"), path.encode("utf-8", "surrogateescape")
        self._room -= sum(map(len, row))
        if self._room < 0:
            return False
        self._database.execute("insert into links values (?, ?)", row)
        self.found += 1
        return True

    def take(self, target: str) -> Iterator[str]:
        """The links that lead to `target`, also those that do so by other links; they are forgotten."""
        targets = [target.encode("utf-8", "surrogateescape")]
        while targets:
            leading = targets.pop()
            while rows := self._database.execute(
                f"select rowid, path from links where target = ? order by rowid limit {AT_ONCE}", (leading,)
            ).fetchall():
                self._database.executemany("delete from links where rowid = ?", [row[:1] for row in rows])
                for _, path in rows:
                    if self._database.execute("select 1 from links where target = ?", (path,)).fetchone():
                        targets.append(path)
                    yield path.decode("utf-8", "surrogateescape")

    def left(self) -> Iterator[tuple[str, str]]:
        """What was not taken: links with their targets."""
        for row in self._database.execute("select path, target from links order by rowid"):
            yield row[0].decode("utf-8", "surrogateescape"), row[1].decode("utf-8", "surrogateescape")
