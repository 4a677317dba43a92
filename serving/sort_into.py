"""`--sort-into DIR`: link or copy each classified image into a folder named after its label, or into `unsure`."""

from __future__ import annotations

import errno
import glob
import os
import sqlite3
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice, takewhile
from pathlib import Path
from typing import TYPE_CHECKING

from convline.errors import ConvlineError
from convline.files import LONGEST_SUFFIX, atomic_write, digest, name_on_disk
from convline.inputs.input_file import InputFile, OnDisk
from serving.records import Entry, Prediction

if TYPE_CHECKING:
    from serving.summary import Summary


@dataclass(frozen=True)
class SortedFolder:
    """The folder of `--sort-into` as a finished job left it; `working_folder` is where its relative paths began.

    `has_only_links` says that every image is a link whose place follows from its path and its label.
    """

    folder: str
    working_folder: str
    has_only_links: bool


class Sorter:
    """Links files on disk; copies members of archives and remote files.

    A file keeps its path within the folder of its label (of its decision, with a threshold). Placing a file a second
    time changes nothing, so a job may be resumed at any point.

    A rescan of the job that left `earlier` also removes the links of its results (`entries`, read at the end) that are
    no longer valid: of files that vanished, or have another label now.

    Raises ConvlineError for a folder inside an input, for one that holds other files, and where a rescan cannot know
    what to remove.
    """

    def __init__(
        self,
        folder: Path,
        inputs: Sequence[str],
        *,
        resume: bool,
        earlier: SortedFolder | None = None,
        entries: Callable[[], Iterable[Entry]] = tuple,
    ) -> None:
        if container := containing_folder([_search_root(name) for name in inputs], folder):
            raise ConvlineError(f"--sort-into {folder} lies inside the input {container}; choose a folder outside it")
        if folder.exists() and not folder.is_dir():
            raise ConvlineError(f"--sort-into {folder} is a file; name a folder")
        self._folder = folder
        self._updated: UpdatedLinks | None = None
        if not resume and folder.exists() and any(folder.iterdir()):
            if earlier is None or earlier.folder != os.path.realpath(folder):
                raise ConvlineError(f"--sort-into {folder} holds files already; choose another folder, or empty it")
            if not earlier.has_only_links:
                raise self._not_only_links()
            self._updated = UpdatedLinks(folder, inputs, earlier.working_folder, entries)
        self._has_only_links = True
        for temporary in folder.rglob(".*.tmp"):  # of a job that was killed
            if temporary.is_file() and not temporary.is_symlink():
                temporary.unlink()

    @property
    def sorted_folder(self) -> SortedFolder:
        return SortedFolder(os.path.realpath(self._folder), os.getcwd(), self._has_only_links)

    def add(self, file: InputFile, entry: Entry) -> None:
        """Link or copy the file, unless it was rejected."""
        if not isinstance(entry, Prediction):
            return
        expected = _expected_place(self._folder, entry)
        if self._updated is None:
            self._has_only_links &= _place_somewhere(file, expected, self._folder) and _is_linked(file)
        elif _is_linked(file) and _place(file, expected):
            self._updated.add(expected)
        else:
            raise self._not_only_links()

    def finish(self, _: Summary) -> None:
        """Remove the links that a rescan found to be no longer valid."""
        if self._updated is not None:
            self._updated.remove_others()

    def _not_only_links(self) -> ConvlineError:
        return ConvlineError(
            f"--sort-into {self._folder}: only links can be brought up to date, each at the place that follows from "
            "its path, not copies of archive members and remote files; empty the folder, or choose another"
        )


class UpdatedLinks:
    """The links of a folder that is brought up to date: those that were added are valid, those that only earlier
    results ask for are not. Nothing else in the folder is touched. Memory does not grow with their number.
    """

    def __init__(
        self, folder: Path, inputs: Sequence[str], working_folder: str, entries: Callable[[], Iterable[Entry]]
    ) -> None:
        self._folder, self._inputs, self._entries = folder, inputs, entries
        self._working_folders = {working_folder, os.getcwd()}  # the latter for a rescan that was stopped
        self._database = sqlite3.connect("")  # a temporary file, which SQLite removes
        self._database.execute("create table valid (link text primary key) without rowid")

    def add(self, link: Path) -> None:
        self._database.execute("insert or ignore into valid values (?)", (_identity(link),))

    def remove_others(self) -> None:
        """Remove the links to the files of the earlier results, at their places, that were not added."""
        for entry in self._entries():
            link = _expected_place(self._folder, entry) if isinstance(entry, Prediction) else None
            if link is not None and self._is_ours(link, entry.path) and not self._is_valid(link):
                link.unlink()
                for parent in islice(link.parents, len(link.parents) - len(self._folder.parents) - 1):
                    with suppress(OSError):  # it holds other files
                        parent.rmdir()
        self._database.close()

    def _is_valid(self, link: Path) -> bool:
        return bool(self._database.execute("select 1 from valid where link = ?", (_identity(link),)).fetchone())

    def _is_ours(self, link: Path, path: str) -> bool:
        """Whether `link` is a link to the file whose path in results is `path`."""
        try:
            source = str(link.readlink())
        except (OSError, ValueError):
            return False
        if len(self._inputs) == 1 and os.path.lexists(self._inputs[0]):
            name = self._inputs[0]
            path = f"{name}/{path}" if Path(name).is_dir() else name
        return source in [os.path.normpath(Path(folder, path)) for folder in self._working_folders]


def sorted_folder(observers: Iterable[object]) -> SortedFolder | None:
    """The folder that a Sorter among the observers has filled."""
    return next((observer.sorted_folder for observer in observers if isinstance(observer, Sorter)), None)


def _identity(link: Path) -> str:
    """What two names of one link have in common, where a file system does not distinguish upper and lower case."""
    status = link.lstat()
    return f"{status.st_dev} {status.st_ino}"


def _expected_place(folder: Path, entry: Prediction) -> Path:
    """The place of an image whose place is not taken."""
    parts = [name_on_disk(part) for part in entry.path.split("/") if part not in ("", ".", "..")]
    return folder / name_on_disk(entry.decision or entry.labels[0]) / Path(*(parts or [name_on_disk(entry.path)]))


def _place_somewhere(file: InputFile, expected: Path, folder: Path) -> bool:
    """Place the file at `expected`, or, where that is taken or impossible, near it. Returns whether it is there."""
    target = expected
    number = 1
    try:
        while not _place(file, target):  # for a/x.jpg and ../a/x.jpg, say
            number += 1
            target = target.with_name(name_on_disk(f"{expected.stem} ({number}){target.suffix}"))
    except OSError as error:
        if error.errno not in PATH_ERRORS:
            raise
        label_folder = folder / expected.relative_to(folder).parts[0]
        _place(file, label_folder / (digest(file.path) + expected.suffix[:LONGEST_SUFFIX]))
        return False
    return number == 1


def _is_linked(file: InputFile) -> bool:
    return isinstance(file.location, OnDisk) and file.location.size is None


# errors for paths that an archive may hold and a folder may not: a file x beside x/y.jpg, or a very long path
PATH_ERRORS = (errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.EEXIST)


def _place(file: InputFile, target: Path) -> bool:
    """Link or copy the file to `target`. Returns False if another file is there already."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if _is_linked(file):
        assert isinstance(file.location, OnDisk)
        source = os.path.abspath(file.location.file)
        try:
            target.symlink_to(source)
        except FileExistsError:
            if target.is_dir():
                raise
            return target.is_symlink() and str(target.readlink()) == source
        return True
    data = file.read()
    if os.path.lexists(target):
        return target.read_bytes() == data
    with atomic_write(target) as copy:
        copy.write(data)
    return True


def containing_folder(folders: Sequence[str], path: Path) -> str | None:
    """The first of the folders that contains `path`; None if none does."""
    real = path.resolve()
    return next((name for name in folders if Path(name).is_dir() and real.is_relative_to(Path(name).resolve())), None)


def _search_root(name: str) -> str:
    """For a glob, the folder where its search begins; any other input as it is."""
    if os.path.lexists(name) or not glob.has_magic(name):
        return name
    return str(Path(*takewhile(lambda part: not glob.has_magic(part), Path(name).parts)))
