"""Folders of very many images, made from a few thousand real ones."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from random import Random

from image_folders import unpack
from PIL import Image

from convline.inputs.input_file import OnDisk
from convline.inputs.listing import find

ORIGINALS = 10_000
PER_FOLDER = 1000
MOST_LINKS = 60_000  # to one file; ext4 allows 65,000
# none turns an image into what another one of them makes of it, so all variants of different images are different
TURNS = (None, *Image.Transpose)


class LinkedFiles:
    """`count` hard links, PER_FOLDER to a folder, to copies of the first JPEGs below `images`. The copies are beside
    the links, so the images may be on another file system, and get no further links."""

    def __init__(self, folder: Path, images: Path, count: int) -> None:
        self.folder = folder / f"files-{count}"
        self.count = count
        copies = folder / "originals"
        if not copies.exists():
            _copy(images, copies)
        self.originals = sorted(copies.iterdir())
        if count > MOST_LINKS * len(self.originals):
            raise SystemExit(f"{images} has {len(self.originals)} JPEGs; {count} links need more of them")
        if not self.folder.exists():
            self._link(self.folder.with_suffix(".unfinished"))

    def _link(self, unfinished: Path) -> None:
        shutil.rmtree(unfinished, ignore_errors=True)
        for number in range(self.count):
            if number % PER_FOLDER == 0:
                self._path(number, unfinished).parent.mkdir(parents=True)
            os.link(self._original(number), self._path(number, unfinished))
        unfinished.rename(self.folder)

    def _path(self, number: int, folder: Path) -> Path:
        return folder / f"{number // PER_FOLDER:05}" / f"{number:08}.jpg"

    def _original(self, number: int) -> Path:
        return self.originals[number % len(self.originals)]

    @contextmanager
    def replaced(self, count: int) -> Iterator[None]:
        """Meanwhile `count` of the files, evenly spread, are new ones, with another image; then they are links again.
        To touch a link would change the time of all links to the same file."""
        numbers = range(0, self.count, self.count // count)[:count]
        for number in numbers:
            path = self._path(number, self.folder)
            path.unlink()
            path.write_bytes(self._original(number + 1).read_bytes())
        try:
            yield
        finally:
            for number in numbers:
                path = self._path(number, self.folder)
                path.unlink()
                os.link(self._original(number), path)


def _copy(images: Path, target: Path) -> None:
    unfinished = target.with_suffix(".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    found = (file.location.file for file in find([str(images)]) if isinstance(file.location, OnDisk))
    jpegs = (path for path in found if path.lower().endswith((".jpg", ".jpeg")))
    for number, path in enumerate(islice(jpegs, ORIGINALS)):
        shutil.copyfile(path, unfinished / f"{number:05}.jpg")
    if not any(unfinished.iterdir()):
        raise SystemExit(f"there are no JPEGs below {images}")
    unfinished.rename(target)


def different_images(folder: Path, source: Path, count: int) -> Path:
    """A folder of `count` JPEGs, no two of them with the same pixels if those of `source` are different: first its own,
    then all of them mirrored, turned by 90 degrees and so on. `source` is a folder or an archive with train/<class>/…
    and test/<class>/…; all variants of an image are in its split and class."""
    target = folder / f"images-{count}"
    if target.exists():
        return target
    unfinished = target.with_suffix(".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    top = unpack(source, folder / "unpacked")
    files = sorted(path for split in ("train", "test") for path in (top / split).glob("*/*.jpg"))
    Random(0).shuffle(files)  # so that a part of them is of all classes
    if count > len(TURNS) * len(files):
        raise SystemExit(f"{source} has {len(files)} JPEGs; at most {len(TURNS)} times as many images are made of them")
    variants = ((path, turn) for turn in TURNS for path in files)
    for path, turn in islice(variants, count):
        made = unfinished / path.relative_to(top).with_stem(f"{path.stem}-{'as-is' if turn is None else turn.name}")
        made.parent.mkdir(parents=True, exist_ok=True)
        if turn is None:
            shutil.copyfile(path, made)
        else:
            with Image.open(path) as image:
                image.transpose(turn).save(made, quality=95)
    unfinished.rename(target)
    return target
