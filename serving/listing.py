"""Finding files: folders, files, globs, archives, lists and URLs become one stream in one fixed order.

Folders depth first, each folder's names sorted by their bytes; archives in member order; lists as given;
hidden files skipped. Every other file is found, whatever it holds. Only one folder's names are held at a time.
"""

from __future__ import annotations

import glob
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import IO

from serving.archives import folders_within, is_archive, read_archive
from serving.errors import ConvlineError
from serving.found import Found, OnDisk, unreadable

STDIN = "-"
MAX_LINKS = 4  # to folders, one below the other: folders that link to each other have no end of paths
BLOCK = 2**16  # bytes of a list that are read at once


def find(inputs: Sequence[str]) -> Iterator[Found]:
    """Every file of the inputs. Paths are relative to the input; several inputs prefix theirs, as given.

    An input is a file, a folder, a glob, an archive, `@FILE` or `-` (a list of paths, in a file or on standard
    input, separated by newlines or NULs, relative to the current folder) or an fsspec URL (s3://…).
    Raises ConvlineError, before the first file, for an input that does not exist.
    """
    return chain.from_iterable([_source(name, len(inputs) > 1) for name in inputs])


def is_url(name: str) -> bool:
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+(::|://)", name) is not None


def _source(name: str, is_prefixed: bool) -> Iterator[Found]:
    """The files of one input, none of them read yet."""
    if name == STDIN:
        return _listed(sys.stdin.buffer)
    if os.path.lexists(name):
        return _local(name, is_prefixed)
    if is_url(name):
        from serving.remote import find_remote

        return find_remote(name, is_prefixed)
    if name.startswith("@"):
        if not Path(name[1:]).is_file():
            raise ConvlineError(f"no such list of files: {name[1:]}")
        return _listed_in(Path(name[1:]))
    if not glob.has_magic(name):
        raise ConvlineError(f"no such file or folder: {name}")
    # as if the shell had put them in its place
    matches = sorted(glob.glob(name, recursive=True), key=lambda match: os.fsencode(match).split(b"/"))
    if "**" in name:  # whose files are matches of their own
        matches = [match for match in matches if not Path(match).is_dir()]
    if not matches:
        raise ConvlineError(f"nothing matches {name}; is the pattern right?")
    return chain.from_iterable(_local(match, True) for match in matches)


def _local(name: str, is_prefixed: bool) -> Iterator[Found]:
    path = Path(name)
    prefix = name.rstrip("/") + "/" if is_prefixed else ""
    if path.is_dir():
        yield from walk(path, prefix)
    elif is_archive(path):
        yield from read_archive(path, prefix)
    else:
        yield Found(name if is_prefixed else path.name, OnDisk(name))


def _listed_in(path: Path) -> Iterator[Found]:
    with path.open("rb") as file:
        yield from _listed(file)


def _listed(file: IO[bytes]) -> Iterator[Found]:
    for line in _lines(file):
        name = os.fsdecode(line)
        if is_url(name) and not os.path.lexists(name):
            from serving.remote import Remote

            yield Found(name, Remote(name))
        elif os.path.lexists(name):
            yield from _local(name, True)
        else:  # a line is never lost
            yield Found(name, OnDisk(name))


def _lines(file: IO[bytes]) -> Iterator[bytes]:
    """What is between newlines, or between NULs where there is one in the first block (`find -print0`)."""
    separator = None
    rest = b""
    while block := file.read(BLOCK):
        separator = separator or (b"\0" if b"\0" in block else b"\n")
        *lines, rest = (rest + block).split(separator)
        yield from filter(None, (_line(line, separator) for line in lines))
    if last := _line(rest, separator or b"\n"):
        yield last


def _line(line: bytes, separator: bytes) -> bytes:
    return line.rstrip(b"\r") if separator == b"\n" else line


@dataclass
class _Level:
    """A folder that is being walked: what is left of its names, the next one last."""

    folder: str
    prefix: str
    identity: tuple[int, int]
    is_link: bool
    names: list[bytes]
    folders: frozenset[bytes]


def walk(folder: Path | str, prefix: str = "") -> Iterator[Found]:
    """The files below `folder`; links are followed, a folder inside itself is reported, not entered."""
    levels: list[_Level] = []
    entered: _Level | Found = _enter(str(folder), prefix)
    while True:
        if isinstance(entered, Found):
            yield entered
        elif any(level.identity == entered.identity for level in levels):
            yield unreadable(entered.prefix.rstrip("/"), "a link to a folder that contains it")
        elif entered.is_link and sum(level.is_link for level in levels) == MAX_LINKS:
            yield unreadable(entered.prefix.rstrip("/"), f"a link to a folder below {MAX_LINKS} other links")
        else:
            levels.append(entered)
        while levels and not levels[-1].names:
            levels.pop()
        if not levels:
            return
        level = levels[-1]
        encoded = level.names.pop()
        name = os.fsdecode(encoded)
        path = f"{level.folder}/{name}"
        if encoded in level.folders:
            entered = _enter(path, f"{level.prefix}{name}/")
        else:
            entered = Found(level.prefix + name, OnDisk(path))


def _enter(folder: str, prefix: str) -> _Level | Found:
    """A folder and its names, or that it cannot be read."""
    try:
        status = Path(folder).stat()
        with os.scandir(folder) as entries:
            found = [(os.fsencode(e.name), _is_folder(e)) for e in entries if not e.name.startswith(".")]
    except OSError as error:
        return unreadable(prefix.rstrip("/") or ".", error.strerror or str(error))
    names = sorted((name for name, _ in found), reverse=True)
    folders = frozenset(name for name, is_folder in found if is_folder)
    return _Level(folder, prefix, (status.st_dev, status.st_ino), Path(folder).is_symlink(), names, folders)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def folders(source: Path) -> set[str]:
    """The folders below a folder, or in an archive, hidden ones left out."""
    if source.is_dir():
        below = (Path(top, name) for top, names, _ in os.walk(source) for name in names)
        names = (path.relative_to(source) for path in below)
        return {name.as_posix() for name in names if not any(part.startswith(".") for part in name.parts)}
    return folders_within(source) if is_archive(source) else set()
