"""`--sort-into DIR`: each classified image once more, in a folder that bears its label."""

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
    """Files become symbolic links, members of archives and files behind URLs are copied.

    A file keeps its path within the folder of its label. Placing a file twice is placing it once, so a job may go
    on at any point. Raises ConvlineError for a folder that lies in an input, or holds files of something else.
    """

    def __init__(self, folder: Path, inputs: tuple[str, ...], *, resume: bool) -> None:
        if holds := folder_with([_searched(name) for name in inputs], folder):
            raise ConvlineError(f"--sort-into {folder} lies inside the input {holds}; choose a folder outside of it")
        if folder.exists() and not folder.is_dir():
            raise ConvlineError(f"--sort-into {folder} is a file; name a folder")
        if not resume and folder.exists() and any(folder.iterdir()):
            raise ConvlineError(f"--sort-into {folder} holds files already; choose another folder, or empty it")
        for left in folder.rglob(".*.tmp"):  # of a job that was killed
            if left.is_file() and not left.is_symlink():
                left.unlink()
        self._folder = folder

    def add(self, file: InputFile, entry: Entry) -> None:
        """Place a file that was classified."""
        if not isinstance(entry, Prediction):
            return
        top = self._folder / name_on_disk(entry.labels[0])
        parts = [name_on_disk(part) for part in file.path.split("/") if part not in ("", ".", "..")]
        parts = parts or [name_on_disk(file.path)]
        target = top / Path(*parts)
        number = 1
        try:
            while not _put(file, target):  # a/x.jpg and ../a/x.jpg, say
                number += 1
                target = target.with_name(name_on_disk(f"{Path(parts[-1]).stem} ({number}){target.suffix}"))
        except OSError as error:
            if error.errno not in UNNAMEABLE:
                raise
            _put(file, top / (digest(file.path) + Path(parts[-1]).suffix[:LONGEST_SUFFIX]))

    def finish(self, summary: Summary) -> None:
        """Nothing is left to do: each file was placed as it came."""


# in an archive x may be a file beside x/y.jpg, or a path longer than a file system takes
UNNAMEABLE = (errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.EEXIST)


def _put(file: InputFile, target: Path) -> bool:
    """Whether the file is there now; False where another one is."""
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


def folder_with(folders: Sequence[str], path: Path) -> str | None:
    """The folder below which a path lies, if there is one."""
    real = path.resolve()
    return next((name for name in folders if Path(name).is_dir() and real.is_relative_to(Path(name).resolve())), None)


def _searched(name: str) -> str:
    """The folder in which a glob begins to search; any other input as it is."""
    if os.path.lexists(name) or not glob.has_magic(name):
        return name
    return str(Path(*takewhile(lambda part: not glob.has_magic(part), Path(name).parts)))
