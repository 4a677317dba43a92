"""The folder tree of an image source: which images, skipped files and subfolders each folder holds."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property

from pipeline.preparing.skipped_files import is_in_skipped_folder, is_skipped


@dataclass(eq=False)
class SourceFolder:
    """One folder. Names are compared in Unicode form NFC: folders whose names differ only in their Unicode form are one
    folder, and `spellings` are their names as the source writes them."""

    name: str = ""
    parent: SourceFolder | None = None
    images: list[str] = field(default_factory=list)  # paths in the source of the files directly in this folder
    skipped: list[str] = field(default_factory=list)
    subfolders: dict[str, SourceFolder] = field(default_factory=dict)
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
    def image_count(self) -> int:
        """Images in this folder and its subfolders."""
        return len(self.images) + sum(folder.image_count for folder in self.subfolders.values())

    @cached_property
    def nonempty_subfolders(self) -> list[SourceFolder]:
        """The subfolders that hold images, sorted by name."""
        return [self.subfolders[name] for name in sorted(self.subfolders) if self.subfolders[name].image_count]

    @property
    def is_nested(self) -> bool:
        """Whether more than nine tenths of the images are in subfolders."""
        return bool(self.nonempty_subfolders) and 10 * len(self.images) < self.image_count

    def unwrapped(self) -> list[SourceFolder]:
        """The chain from this folder down through single nested subfolders (train/train/<class>/…); the last one holds
        the classes."""
        folders = [self]
        while len(folders[-1].nonempty_subfolders) == 1 and folders[-1].nonempty_subfolders[0].is_nested:
            folders.append(folders[-1].nonempty_subfolders[0])
        return folders

    def walk(self) -> Iterator[SourceFolder]:
        """This folder and all below it, each before its subfolders."""
        pending = [self]
        while pending:
            folder = pending.pop()
            yield folder
            pending.extend(folder.subfolders[name] for name in sorted(folder.subfolders, reverse=True))

    def all_images(self) -> Iterator[str]:
        for folder in self.walk():
            yield from folder.images

    def subfolder(self, name: str) -> SourceFolder:
        """The subfolder of this name, which is created if it is missing."""
        normal = unicodedata.normalize("NFC", name)
        if normal not in self.subfolders:
            self.subfolders[normal] = SourceFolder(normal, self)
        self.subfolders[normal].spellings.add(name)
        return self.subfolders[normal]


def read_tree(paths: Iterable[str], folders: Iterable[str] = ()) -> SourceFolder:
    """The root of a source's tree, given the paths of its files and of its folders, which may be empty."""
    root = SourceFolder()
    known = {"": root, ".": root}

    def folder_at(path: str) -> SourceFolder:
        if path not in known:
            folder = root
            for name in path.split("/"):
                folder = folder.subfolder(name)
            known[path] = folder
        return known[path]

    for path in paths:
        folder = root if is_in_skipped_folder(path) else folder_at(path.rpartition("/")[0])
        (folder.skipped if is_skipped(path) else folder.images).append(path)
    for path in folders:
        if not is_in_skipped_folder(f"{path}/"):
            folder_at(path)
    for folder in reversed(list(root.walk())):
        _ = folder.image_count  # from the innermost out: thousands of nested folders would exceed the recursion limit
    return root
