"""`--sort-into DIR`: each classified image once more, in a folder that bears its label."""

from __future__ import annotations

import os
from pathlib import Path

from serving.classifier import Prediction
from serving.errors import ConvlineError
from serving.files import atomic_write
from serving.found import Found, OnDisk


class Sorter:
    """Files become symbolic links, members of archives and files behind URLs are copied.

    A file keeps its path within the folder of its label. Placing a file twice is placing it once, so a job may go
    on at any point. Raises ConvlineError for a folder that lies in an input, or holds files of something else.
    """

    def __init__(self, folder: Path, inputs: tuple[str, ...], *, resume: bool) -> None:
        real = folder.resolve()
        for name in inputs:
            if Path(name).is_dir() and real.is_relative_to(Path(name).resolve()):
                raise ConvlineError(f"--sort-into {folder} lies inside the input {name}; choose a folder outside of it")
        if folder.exists() and not folder.is_dir():
            raise ConvlineError(f"--sort-into {folder} is a file; name a folder")
        if not resume and folder.exists() and any(folder.iterdir()):
            raise ConvlineError(f"--sort-into {folder} holds files already; choose another folder, or empty it")
        self._folder = folder

    def place(self, file: Found, prediction: Prediction) -> None:
        parts = [part for part in file.path.split("/") if part not in ("", ".", "..")]
        target = self._folder / folder_name(prediction.labels[0]) / Path(*parts)
        target.parent.mkdir(parents=True, exist_ok=True)
        number = 1
        while not self._put(file, target):  # a/x.jpg and ../a/x.jpg, say
            number += 1
            target = target.with_name(f"{Path(parts[-1]).stem} ({number}){target.suffix}")

    @staticmethod
    def _put(file: Found, target: Path) -> bool:
        """Whether the file is there now; False where another one is."""
        if isinstance(file.content, OnDisk) and file.content.size is None:
            source = os.path.abspath(file.content.file)
            try:
                target.symlink_to(source)
            except FileExistsError:
                return target.is_symlink() and str(target.readlink()) == source
            return True
        data = file.read()
        if os.path.lexists(target):
            return target.read_bytes() == data
        with atomic_write(target) as copy:
            copy.write(data)
        return True


def folder_name(label: str) -> str:
    """A label as one folder's name: "T-shirt/top" becomes "T-shirt_top"."""
    name = label.replace("/", "_").replace("\0", "_")
    return f"_{name}" if name in ("", ".", "..") else name
