"""Which file of a folder or archive is of which class and split, read off the paths alone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from serving.console import log
from serving.errors import ConvlineError

TRAIN_NAMES = ("train", "training")
# in the order of their claim to be the test split
TEST_NAMES = ("test", "testing", "val", "valid", "validation")

Parts = dict[str, tuple[str, ...]]


@dataclass(frozen=True)
class Layout:
    """Where each file goes: `places[path]` is its (split, class)."""

    classes: list[str]
    places: dict[str, tuple[str, str]]


def lay_out(source: Path, paths: Iterable[str], folders: Iterable[str] = ()) -> Layout:
    """train/<class>/* with test/<class>/* (or another name of test), or just <class>/*, below any single
    folders. `folders` are all of the source's folders: a class may not be an empty one.

    Raises ConvlineError, naming the folder, for what is neither.
    """
    files: Parts = {path: PurePosixPath(path).parts for path in paths}
    depth = _depth_of_classes(files)
    parts = {path: p for path, p in files.items() if len(p) > depth + 1}
    loose = [path for path in files if path not in parts]
    if not parts:
        raise ConvlineError(
            f"{source} has no class folders{f', only files such as {loose[0]}' if loose else ''}; "
            "expected <class>/<image> or train/<class>/<image>"
        )
    if loose:
        log(f"not in any class, so not used: {', '.join(loose[:3])}{' …' if len(loose) > 3 else ''}")
    top = {p[depth] for p in parts.values()}
    has_splits = any(map(_split_of, top))
    wrap = next(iter(parts.values()))[:depth]
    folders = [f for f in folders if PurePosixPath(f).parts[:depth] == wrap]
    _refuse_empty_classes(source, files, folders, depth + 2 if has_splits else depth + 1)
    if has_splits:
        return _layout(source, _read_splits(source, parts, depth, top))
    return _layout(source, {path: ("train", p[depth]) for path, p in parts.items()})


def _depth_of_classes(files: Parts) -> int:
    """How many single folders wrap the splits or classes."""
    depth = 0
    while True:
        inside = [p for p in files.values() if len(p) > depth + 1]
        names = {p[depth] for p in inside}
        if len(names) != 1 or _split_of(*names) or not any(len(p) > depth + 2 for p in inside):
            return depth
        depth += 1


def _split_of(name: str) -> Literal["train", "test"] | None:
    if name.lower() in TRAIN_NAMES:
        return "train"
    return "test" if name.lower() in TEST_NAMES else None


def _refuse_empty_classes(source: Path, files: Parts, folders: Iterable[str], depth: int) -> None:
    filled = {p[:depth] for p in files.values()}
    for folder in sorted(folders):
        parts = PurePosixPath(folder).parts
        if len(parts) == depth and parts not in filled:
            raise ConvlineError(f"{source}: the class folder {folder} is empty; add images or remove it")


def _read_splits(source: Path, parts: Parts, depth: int, top: set[str]) -> dict[str, tuple[str, str]]:
    train = [name for name in top if _split_of(name) == "train"]
    tests = sorted((name for name in top if _split_of(name) == "test"), key=lambda n: TEST_NAMES.index(n.lower()))
    if others := sorted(name for name in top if _split_of(name) is None):
        raise ConvlineError(
            f"{source} holds splits ({', '.join(sorted(top.difference(others)))}) and other folders "
            f"({', '.join(others[:3])}); move the others away"
        )
    if len(train) != 1:
        raise ConvlineError(f"{source} holds {', '.join(sorted(top))}; exactly one folder must be named train")
    if unused := tests[1:]:
        log(f"{tests[0]} serves as test; not used: {', '.join(unused)}")
    splits = {train[0]: "train"} | dict.fromkeys(tests[:1], "test")
    for path, p in parts.items():
        if len(p) < depth + 3:
            raise ConvlineError(f"{source}: {path} is in no class; expected {p[depth]}/<class>/<image>")
    return {path: (splits[p[depth]], p[depth + 1]) for path, p in parts.items() if p[depth] in splits}


def _layout(source: Path, places: dict[str, tuple[str, str]]) -> Layout:
    """Sorted class names, the same in every split."""
    of: dict[str, set[str]] = {}
    for split, label in places.values():
        of.setdefault(split, set()).add(label)
    for label in of["train"]:
        if not label.isprintable():
            raise ConvlineError(f"{source}: {label!r} is no name for a class (not UTF-8, or unprintable); rename it")
    if len(of["train"]) < 2:
        raise ConvlineError(f"{source} has only the class {min(of['train'])!r}; a classifier needs two or more")
    for here, there in (("train", "test"), ("test", "train")):
        if len(of) == 2 and (missing := of[here] - of[there]):
            raise ConvlineError(f"{source}: class {min(missing)!r} is in {here} but not in {there}; add or remove it")
    return Layout(sorted(of["train"]), places)
