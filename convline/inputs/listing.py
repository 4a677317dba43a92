"""Finds the input files: folders, files, globs, archives, lists and URLs become one stream in a fixed order.

Folders are walked depth first, each folder's names sorted by their bytes; archives come in member order, lists as
given; hidden files are skipped. All other files are listed, whatever they contain. Memory holds the names of one folder
at a time.
"""

from __future__ import annotations

import glob
import os
import re
import sys
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import IO

from convline.console import log
from convline.errors import ConvlineError
from convline.inputs.archive_members import normalized
from convline.inputs.archives import archive_paths, is_archive, read_archive, refuse_unsupported_archive
from convline.inputs.input_file import InputFile, OnDisk, unreadable_file
from convline.inputs.path_lists import listed_paths

STDIN = "-"
IMAGES = (
    ".jpg",
    ".jpeg",
    ".png",
    ".gif",
    ".webp",
    ".tif",
    ".tiff",
    ".bmp",
    ".ppm",
    ".pgm",
    ".jp2",
    ".avif",
    ".heic",
    ".heif",
)
MACOS = "__MACOSX"  # the folder that macOS adds to a .zip for file metadata; all files in it are hidden
MAX_NESTED_LINKS = 4  # links to folders within one path: folders that link to each other give endless paths


def find(inputs: Sequence[str]) -> Iterator[InputFile]:
    """All files of the inputs. Paths are relative to the input; if there are several inputs, they start with it.

    An input is a file, a folder, a glob, an archive, `@FILE` or `-` (a list of paths, in a file or on standard
    input, separated by newlines or NULs, relative to the current folder) or an fsspec URL (s3://…).
    A list is UTF-8, or UTF-16 or UTF-32 with a byte order mark. An archive in a list or glob that is damaged or of an
    unsupported format is one reject.

    Raises ConvlineError, before the first file, if an input does not exist or is an unsupported archive.
    """
    return chain.from_iterable([_files_of_input(name, len(inputs) > 1) for name in inputs])


def is_url(name: str) -> bool:
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+(::|://)", name) is not None


def _files_of_input(name: str, is_prefixed: bool) -> Iterator[InputFile]:
    """The files of one input, none of them read yet."""
    if name == STDIN:
        return _files_of_list(sys.stdin.buffer, "standard input")
    if os.path.lexists(name):
        _refuse_unsupported(name)
        return _local_files(name, is_prefixed)
    if is_url(name):
        from convline.inputs.remote_files import find_remote

        return find_remote(name, is_prefixed)
    if name.startswith("@"):
        if not Path(name[1:]).is_file():
            raise ConvlineError(f"no such list of files: {name[1:]}")
        return _files_of_list_file(Path(name[1:]))
    if not glob.has_magic(name):
        raise ConvlineError(f"no such file or folder: {name}")
    # as if the shell had expanded it; folder by folder, as no name has a byte below NUL
    matches = glob.glob(name, recursive=True)
    matches.sort(key=lambda match: os.fsencode(match).replace(b"/", b"\0"))
    if "**" in name:  # it matches folders and the files in them: each file must come once
        matches = [match for match in matches if not Path(match).is_dir()]
    if not matches:
        raise ConvlineError(f"nothing matches {name}; is the pattern right?")
    return chain.from_iterable(map(_files_of_entry, matches))


def _refuse_unsupported(name: str) -> None:
    if not Path(name).is_dir():
        refuse_unsupported_archive(name)


def _local_files(name: str, is_prefixed: bool) -> Iterator[InputFile]:
    path = Path(name)
    prefix = name.rstrip("/") + "/" if is_prefixed else ""
    if path.is_dir():
        yield from walk(path, prefix)
    elif is_archive(path):
        yield from read_archive(path, prefix)
    else:
        yield InputFile(name if is_prefixed else path.name, OnDisk(name))


def _files_of_entry(name: str) -> Iterator[InputFile]:
    """The files of one entry of a list or glob; an archive that cannot be read is one reject."""
    try:
        _refuse_unsupported(name)
        yield from _local_files(name, True)
    except ConvlineError as error:
        yield unreadable_file(name, str(error))


def _files_of_list_file(path: Path) -> Iterator[InputFile]:
    with path.open("rb") as file:
        yield from _files_of_list(file, str(path))


def _files_of_list(file: IO[bytes], name: str) -> Iterator[InputFile]:
    for line in listed_paths(file, name):
        entry = os.fsdecode(line)
        if is_url(entry) and not os.path.lexists(entry):
            from convline.inputs.remote_files import RemoteFile

            yield InputFile(entry, RemoteFile(entry))
        elif os.path.lexists(entry):
            yield from _files_of_entry(entry)
        else:  # a missing file becomes a reject, so that every line is accounted for
            yield InputFile(entry, OnDisk(entry))


@dataclass
class _OpenFolder:
    """A folder that is being walked; `names` are those still to visit, the next one last."""

    folder: str
    prefix: str
    identity: tuple[int, int]
    is_link: bool
    names: list[bytes]
    folders: frozenset[bytes]


def walk(folder: Path | str, prefix: str = "") -> Iterator[InputFile]:
    """The files below `folder`. Links are followed; a link to a folder that contains it becomes a reject."""
    open_folders: list[_OpenFolder] = []
    found: _OpenFolder | InputFile = _open_folder(str(folder), prefix)
    while True:
        if isinstance(found, InputFile):
            yield found
        elif any(outer.identity == found.identity for outer in open_folders):
            yield unreadable_file(found.prefix.rstrip("/"), "a link to a folder that contains it")
        elif found.is_link and sum(outer.is_link for outer in open_folders) == MAX_NESTED_LINKS:
            yield unreadable_file(found.prefix.rstrip("/"), f"a link to a folder below {MAX_NESTED_LINKS} other links")
        else:
            open_folders.append(found)
        while open_folders and not open_folders[-1].names:
            open_folders.pop()
        if not open_folders:
            return
        current = open_folders[-1]
        encoded = current.names.pop()
        name = os.fsdecode(encoded)
        path = f"{current.folder}/{name}"
        if encoded in current.folders:
            found = _open_folder(path, f"{current.prefix}{name}/")
        else:
            found = InputFile(current.prefix + name, OnDisk(path))


def _open_folder(folder: str, prefix: str) -> _OpenFolder | InputFile:
    """List a folder; a reject if it cannot be read."""
    try:
        status = Path(folder).stat()
        with os.scandir(folder) as entries:
            found = [(os.fsencode(e.name), _is_folder(e)) for e in entries if not e.name.startswith(".")]
    except OSError as error:
        return unreadable_file(prefix.rstrip("/") or ".", error.strerror or str(error))
    names = sorted((name for name, _ in found), reverse=True)
    folders = frozenset(name for name, is_folder in found if is_folder)
    return _OpenFolder(folder, prefix, (status.st_dev, status.st_ino), Path(folder).is_symlink(), names, folders)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def last_of_each_path(files: Iterable[InputFile], counts: Mapping[str, int]) -> Iterator[InputFile]:
    """The last file of each path, as unpacking an archive leaves it; `counts` says how often each path comes."""
    remaining = {path: count for path, count in counts.items() if count > 1}
    for file in files:
        if remaining.get(file.path, 1) > 1:
            remaining[file.path] -= 1
        else:
            yield file


def files_at(source: Path, paths: Collection[str]) -> Iterator[InputFile]:
    """The files of a folder or archive at some of the paths that `find` gives. A folder is not walked, so a missing
    file is one that cannot be read. An archive that holds a path more than once gives each of the files.

    Raises ConvlineError for an archive that cannot be read.
    """
    if os.path.isdir(source):  # noqa: PTH112  # Path.is_dir raises PermissionError
        yield from (InputFile(path, OnDisk(f"{source}/{path}")) for path in paths if normalized(path) == path)
    elif is_archive(source):
        yield from (file for file in read_archive(source) if file.path in paths)


def folders(source: Path) -> set[str]:
    """The paths of the folders below a folder or in an archive, without hidden ones and macOS's metadata.

    Logs the hidden folders that hold images, as users may not know that they are hidden.
    """
    found: set[str] = set()
    hidden: Counter[str] = Counter()
    for path, is_folder in _paths_below(source):
        parts = path.split("/")
        depth = next((depth for depth, part in enumerate(parts) if part.startswith(".")), len(parts))
        if depth < len(parts) - 1 and path.lower().endswith(IMAGES) and not parts[-1].startswith("."):
            hidden["/".join(parts[: depth + 1])] += 1
        elif is_folder and depth == len(parts) and MACOS not in parts:
            found.add(path)
    if hidden:
        named = ", ".join(f"{name} ({count} images)" for name, count in sorted(hidden.items())[:3])
        more = " …" if len(hidden) > 3 else ""
        log(f"skipped hidden folders, whose names begin with a dot: {named}{more}")
    return found - {""}


def _paths_below(source: Path) -> Iterator[tuple[str, bool]]:
    """All paths below a folder or in an archive, hidden ones too, and whether each is a folder."""
    if not source.is_dir():
        yield from archive_paths(source) if is_archive(source) else ()
        return
    for top, folders, files in os.walk(source):
        inside = Path(top).relative_to(source)
        yield from (((inside / name).as_posix(), True) for name in folders)
        yield from (((inside / name).as_posix(), False) for name in files)
