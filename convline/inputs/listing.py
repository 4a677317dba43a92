"""Finding files: folders, files, globs, archives, lists and URLs become one stream in one fixed order.

Folders depth first, each folder's names sorted by their bytes; archives in member order; lists as given;
hidden files skipped. Every other file is found, whatever it holds. Only one folder's names are held at a time.
"""

from __future__ import annotations

import glob
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import IO

from convline.console import log
from convline.errors import ConvlineError
from convline.inputs.archives import is_archive, names_within, read_archive, refuse_unread
from convline.inputs.input_file import InputFile, OnDisk, unreadable
from convline.inputs.path_lists import list_lines

STDIN = "-"
IMAGES = (".jpg", ".jpeg", ".png", ".gif", ".webp", ".tif", ".tiff", ".bmp", ".ppm", ".pgm", ".jp2", ".avif")
MACOS = "__MACOSX"  # the folder for what is beside the files in a .zip of the Finder, all of it hidden
MAX_LINKS = 4  # to folders, one below the other: folders that link to each other have no end of paths


def find(inputs: Sequence[str]) -> Iterator[InputFile]:
    """Every file of the inputs. Paths are relative to the input; several inputs prefix theirs, as given.

    An input is a file, a folder, a glob, an archive, `@FILE` or `-` (a list of paths, in a file or on standard
    input, separated by newlines or NULs, relative to the current folder) or an fsspec URL (s3://…).
    A list is UTF-8, or UTF-16 or UTF-32 with a byte order mark. An archive that is damaged, or of a kind that is not
    read here, is one reject where a list or a glob names it.

    Raises ConvlineError, before the first file, for an input that does not exist or is such an archive.
    """
    return chain.from_iterable([_source(name, len(inputs) > 1) for name in inputs])


def is_url(name: str) -> bool:
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+(::|://)", name) is not None


def _source(name: str, is_prefixed: bool) -> Iterator[InputFile]:
    """The files of one input, none of them read yet."""
    if name == STDIN:
        return _listed(sys.stdin.buffer, "standard input")
    if os.path.lexists(name):
        _refuse_unread(name)
        return _local(name, is_prefixed)
    if is_url(name):
        from convline.inputs.remote import find_remote

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
    return chain.from_iterable(map(_entry, matches))


def _refuse_unread(name: str) -> None:
    if not Path(name).is_dir():
        refuse_unread(name)


def _local(name: str, is_prefixed: bool) -> Iterator[InputFile]:
    path = Path(name)
    prefix = name.rstrip("/") + "/" if is_prefixed else ""
    if path.is_dir():
        yield from walk(path, prefix)
    elif is_archive(path):
        yield from read_archive(path, prefix)
    else:
        yield InputFile(name if is_prefixed else path.name, OnDisk(name))


def _entry(name: str) -> Iterator[InputFile]:
    """The files of what a list or a glob names; as in a folder, an archive that cannot be read is one reject."""
    try:
        _refuse_unread(name)
        yield from _local(name, True)
    except ConvlineError as error:
        yield unreadable(name, str(error))


def _listed_in(path: Path) -> Iterator[InputFile]:
    with path.open("rb") as file:
        yield from _listed(file, str(path))


def _listed(file: IO[bytes], name: str) -> Iterator[InputFile]:
    for line in list_lines(file, name):
        entry = os.fsdecode(line)
        if is_url(entry) and not os.path.lexists(entry):
            from convline.inputs.remote import Remote

            yield InputFile(entry, Remote(entry))
        elif os.path.lexists(entry):
            yield from _entry(entry)
        else:  # a line is never lost
            yield InputFile(entry, OnDisk(entry))


@dataclass
class _Level:
    """A folder that is being walked: what is left of its names, the next one last."""

    folder: str
    prefix: str
    identity: tuple[int, int]
    is_link: bool
    names: list[bytes]
    folders: frozenset[bytes]


def walk(folder: Path | str, prefix: str = "") -> Iterator[InputFile]:
    """The files below `folder`; links are followed, a folder inside itself is reported, not entered."""
    levels: list[_Level] = []
    entered: _Level | InputFile = _enter(str(folder), prefix)
    while True:
        if isinstance(entered, InputFile):
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
            entered = InputFile(level.prefix + name, OnDisk(path))


def _enter(folder: str, prefix: str) -> _Level | InputFile:
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


def once_each(files: Iterable[InputFile], found: Mapping[str, int]) -> Iterator[InputFile]:
    """The last file of each path, as unpacking an archive leaves it; `found` says how many there are."""
    left = {path: count for path, count in found.items() if count > 1}
    for file in files:
        if left.get(file.path, 1) > 1:
            left[file.path] -= 1
        else:
            yield file


def folders(source: Path) -> set[str]:
    """The folders below a folder, or in an archive, without hidden ones and macOS's own.

    A line names the hidden ones that hold images, as whoever made them may not think of them as hidden.
    """
    found: set[str] = set()
    hidden: Counter[str] = Counter()
    for path, is_folder in _names(source):
        parts = path.split("/")
        depth = next((depth for depth, part in enumerate(parts) if part.startswith(".")), len(parts))
        if depth < len(parts) - 1 and path.lower().endswith(IMAGES) and not parts[-1].startswith("."):
            hidden["/".join(parts[: depth + 1])] += 1
        elif is_folder and depth == len(parts) and MACOS not in parts:
            found.add(path)
    if hidden:
        named = ", ".join(f"{name} ({count} images)" for name, count in sorted(hidden.items())[:3])
        log(f"hidden, as their names begin with a dot, so not used: {named}{' …' if len(hidden) > 3 else ''}")
    return found - {""}


def _names(source: Path) -> Iterator[tuple[str, bool]]:
    """What is below a folder, or in an archive, hidden or not, and whether it is a folder."""
    if not source.is_dir():
        yield from names_within(source) if is_archive(source) else ()
        return
    for top, folders, files in os.walk(source):
        inside = Path(top).relative_to(source)
        yield from (((inside / name).as_posix(), True) for name in folders)
        yield from (((inside / name).as_posix(), False) for name in files)
