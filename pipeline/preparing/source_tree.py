"""The folders of a source of images, and which files each holds."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property

from pipeline.preparing.stray_files import is_in_stray_folder, is_stray


@dataclass(eq=False)
class Folder:
    """`name` is in Unicode's form C; `spellings` are the name as it is written in the source: two folders whose names
    differ in that form alone are one."""

    name: str = ""
    parent: Folder | None = None
    images: list[str] = field(default_factory=list)  # paths, as the source has them, of files directly in it
    strays: list[str] = field(default_factory=list)
    folders: dict[str, Folder] = field(default_factory=dict)
    spellings: set[str] = field(default_factory=set)

    @property
    def path(self) -> str:
        names = []
        folder = self
        while folder.parent is not None:
            names.append(folder.name)
            folder = folder.parent
        return "/".join(reversed(names))

    @cached_property
    def count(self) -> int:
        """Images in it and below."""
        return len(self.images) + sum(folder.count for folder in self.folders.values())

    @cached_property
    def filled(self) -> list[Folder]:
        """The folders in it that hold images, sorted by name."""
        return [self.folders[name] for name in sorted(self.folders) if self.folders[name].count]

    @property
    def holds_folders(self) -> bool:
        """Whether its images are in folders, but for a few."""
        return bool(self.filled) and 10 * len(self.images) < self.count

    def below(self) -> Iterator[Folder]:
        """This one and all that are below it, each before what is in it."""
        left = [self]
        while left:
            folder = left.pop()
            yield folder
            left.extend(folder.folders[name] for name in sorted(folder.folders, reverse=True))

    def all_images(self) -> Iterator[str]:
        for folder in self.below():
            yield from folder.images

    def enter(self, name: str) -> Folder:
        """The folder of that name in it, made where there is none yet."""
        normal = unicodedata.normalize("NFC", name)
        if normal not in self.folders:
            self.folders[normal] = Folder(normal, self)
        self.folders[normal].spellings.add(name)
        return self.folders[normal]


def read_tree(paths: Iterable[str], folders: Iterable[str] = ()) -> Folder:
    """The folders of a source, from the paths of its files and of its folders, which may be empty."""
    root = Folder()
    known = {"": root, ".": root}

    def folder_at(path: str) -> Folder:
        if path not in known:
            folder = root
            for name in path.split("/"):
                folder = folder.enter(name)
            known[path] = folder
        return known[path]

    for path in paths:
        folder = root if is_in_stray_folder(path) else folder_at(path.rpartition("/")[0])
        (folder.strays if is_stray(path) else folder.images).append(path)
    for path in folders:
        if not is_in_stray_folder(f"{path}/"):
            folder_at(path)
    for folder in reversed(list(root.below())):
        _ = folder.count  # from the innermost ones on, as an archive can hold thousands one in the other
    return root
