"""`--sort-into DIR`: link or copy each classified image into a folder named after its label, or into `unsure`."""

from __future__ import annotations

import errno
import glob
import os
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING

from convline.errors import ConvlineError
from convline.files import LONGEST_SUFFIX, atomic_write, digest, name_on_disk
from convline.inputs.input_file import InputFile, OnDisk
from serving.records import Entry, Prediction

if TYPE_CHECKING:
    from serving.summary import Summary


class Sorter:
    """Links files on disk; copies members of archives and remote files.

    A file keeps its path within the folder of its label (of its decision, with a threshold). Placing a file a second
    time changes nothing, so a job may be resumed at any point. Raises ConvlineError for a folder inside an input, and
    for one that holds other files.
    """

    def __init__(self, folder: Path, inputs: tuple[str, ...], *, resume: bool) -> None:
        if container := containing_folder([_search_root(name) for name in inputs], folder):
            raise ConvlineError(f"--sort-into {folder} lies inside the input {container}; choose a folder outside it")
        if folder.exists() and not folder.is_dir():
            raise ConvlineError(f"--sort-into {folder} is a file; name a folder")
        if not resume and folder.exists() and any(folder.iterdir()):
            raise ConvlineError(f"--sort-into {folder} holds files already; choose another folder, or empty it")
        for temporary in folder.rglob(".*.tmp"):  # of a job that was killed
            if temporary.is_file() and not temporary.is_symlink():
                temporary.unlink()
        self._folder = folder

    def add(self, file: InputFile, entry: Entry) -> None:
        """Link or copy the file, unless it was rejected."""
        if not isinstance(entry, Prediction):
            return
        label_folder = self._folder / name_on_disk(entry.decision or entry.labels[0])
        parts = [name_on_disk(part) for part in file.path.split("/") if part not in ("", ".", "..")]
        parts = parts or [name_on_disk(file.path)]
        target = label_folder / Path(*parts)
        number = 1
        try:
            while not _place(file, target):  # for a/x.jpg and ../a/x.jpg, say
                number += 1
                target = target.with_name(name_on_disk(f"{Path(parts[-1]).stem} ({number}){target.suffix}"))
        except OSError as error:
            if error.errno not in PATH_ERRORS:
                raise
            _place(file, label_folder / (digest(file.path) + Path(parts[-1]).suffix[:LONGEST_SUFFIX]))

    def finish(self, summary: Summary) -> None:
        """Does nothing: each file was placed by `add`."""


# errors for paths that an archive may hold and a folder may not: a file x beside x/y.jpg, or a very long path
PATH_ERRORS = (errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.EEXIST)


def _place(file: InputFile, target: Path) -> bool:
    """Link or copy the file to `target`. Returns False if another file is there already."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(file.location, OnDisk) and file.location.size is None:
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
