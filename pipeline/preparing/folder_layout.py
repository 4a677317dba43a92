"""Which image of a folder or archive is of which class and split, read off the paths alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from convline.console import log
from convline.errors import ConvlineError
from pipeline.preparing.class_names import check_classes
from pipeline.preparing.source_tree import Folder, read_tree
from pipeline.preparing.split_names import Kind, are_of_classes_and_splits, split_of
from pipeline.preparing.stray_files import printable, tell_unused

EXPECTED = "expected <class>/<image> or train/<class>/<image>"
MOVE_AWAY = "move away what is not to be used"
BELOW_TRAIN = "if all of them are classes, put them below a folder train/"  # where no class is taken for a split


@dataclass(frozen=True)
class Layout:
    """Where each image goes: `places[path]` is its (split, class)."""

    classes: list[str]
    places: dict[str, tuple[str, str]]


Splits = dict[Kind, dict[str, Folder]]  # the folder of each class, by split


def lay_out(source: Path, paths: Iterable[str], folders: Iterable[str] = ()) -> Layout:
    """train/<class>/* with test/<class>/*, <class>/train/* with <class>/test/*, or just <class>/*, below any single
    folders, whatever people call the splits. `folders` are all of the source's folders: a class may not be empty.

    Raises ConvlineError, naming the folder, for what is none of these, and with a question where splits could be
    classes.
    """
    root = read_tree(paths, folders)
    strays = [path for folder in root.below() for path in folder.strays]
    tell_unused(strays, "as they are no images")
    top = _unwrapped(root)
    if not top.filled:
        files = top.images or strays
        only = f", only files such as {printable(files[0])}" if files else ""
        raise ConvlineError(f"{source} has no class folders{only}; {EXPECTED}")
    splits = _splits(source, top)
    classes = check_classes(source, {kind: labelled.keys() for kind, labelled in splits.items()})
    return Layout(
        classes,
        {
            path: (kind, label)
            for kind, labelled in splits.items()
            for label, folder in labelled.items()
            for path in folder.all_images()
        },
    )


def _unwrapped(folder: Folder) -> Folder:
    """What single folders wrap: the folder with the splits or classes in it."""
    while len(folder.filled) == 1:
        (inner,) = folder.filled
        if not inner.filled or (split_of(inner.name) and not _wraps_splits(inner)):
            break
        _tell_loose(folder)
        folder = inner
    return folder


def _wraps_splits(folder: Folder) -> bool:
    """Whether a folder that is called like a split holds splits, and not a class that is called like one."""
    kinds = {split_of(inner.name) for inner in folder.filled if inner.holds_folders}
    return "train" in kinds and (len(kinds - {None}) > 1 or all(split_of(inner.name) for inner in folder.filled))


def _tell_loose(folder: Folder) -> None:
    tell_unused(folder.images, "as they are in no class")


def _splits(source: Path, top: Folder) -> Splits:
    named = [folder for folder in top.filled if split_of(folder.name)]
    for folder in top.folders.values():
        if not folder.count and split_of(folder.name):
            raise ConvlineError(
                f"{source}: {folder.path} is called like a split and holds no images; add some or remove it"
            )
    if any(folder.filled and split_of(folder.name) != "unlabelled" for folder in named):
        return _read_splits(source, top)
    if named:  # a class may be called train, but so may be images without labels
        raise ConvlineError(
            f"{source}: {_names(named)} is called like a split and holds no class folders; {EXPECTED}; {MOVE_AWAY}; "
            f"{BELOW_TRAIN}"
        )
    if (turned := _turned(top)) is not None:
        return _read_splits(source, turned)
    _ask_what_could_be_splits(source, top)
    return {"train": _classes(source, top)}


def _read_splits(source: Path, top: Folder) -> Splits:
    """Splits with classes in them. Raises ConvlineError for other folders beside them, and for two of one kind."""
    of_kind: dict[Kind, list[Folder]] = {}
    others = []
    for folder in top.filled:
        if kind := split_of(folder.name):
            of_kind.setdefault(kind, []).append(folder)
        else:
            others.append(folder)
    if others:
        splits = [folder for folders in of_kind.values() for folder in folders]
        raise ConvlineError(
            f"{source} holds {_names(splits)} beside {_names(others)}: is {_names(others[:1])} a split? "
            f"Then call it train, val or test; {MOVE_AWAY}; {BELOW_TRAIN}"
        )
    _tell_loose(top)
    for folder in of_kind.pop("unlabelled", []):
        tell_unused(list(folder.all_images()), f"as {folder.name} is called like images without labels")
    if len(of_kind.get("train", [])) != 1:
        raise ConvlineError(
            f"{source} holds {_names(top.filled)}; exactly one folder must be named train; {BELOW_TRAIN}"
        )
    for kind, folders in of_kind.items():
        if len(folders) > 1:
            raise ConvlineError(f"{source}: {_names(folders)} are all called like the {kind} split; keep one of them")
    chosen = _chosen({kind: folder for kind, (folder,) in of_kind.items()})
    return {kind: _classes(source, _inner(source, folder)) for kind, folder in chosen.items()}


def _chosen(folders: dict[Kind, Folder]) -> dict[Kind, Folder]:
    """The splits that are used, train and test; tells what serves as what."""
    validation = folders.pop("validation", None)
    if renamed := [f"{folder.name} is {kind}" for kind, folder in folders.items() if folder.name.lower() != kind]:
        log(f"splits: {', '.join(renamed)}")
    if validation is not None and "test" in folders:
        log(
            f"{folders['test'].name} serves as test; {validation.name} ({validation.count} images) is not used: "
            "validation images are held out of train, as a recipe says"
        )
    elif validation is not None:
        log(f"there is no test split: {validation.name} serves as test")
        folders["test"] = validation
    return folders


def _inner(source: Path, split: Folder) -> Folder:
    """The folder of a split that its classes are in: often in a second one of its name."""
    if not split.filled:
        raise ConvlineError(
            f"{source}: {printable(split.images[0])} is in no class; expected {split.path}/<class>/<image>; move "
            f"{split.name} away if its images have no labels"
        )
    while len(split.filled) == 1 and split.filled[0].holds_folders:
        _tell_loose(split)
        (split,) = split.filled
    return split


def _classes(source: Path, folder: Folder) -> dict[str, Folder]:
    """The class folders in a folder. Raises ConvlineError for one without images."""
    _tell_loose(folder)
    for name, label in sorted(folder.folders.items()):
        if not label.count:
            strays = [path for below in label.below() for path in below.strays]
            what = f"holds no images, only files such as {printable(strays[0])}" if strays else "is empty"
            raise ConvlineError(f"{source}: the class folder {printable(label.path)} {what}; add images or remove it")
        if (several := len(label.spellings)) > 1:
            log(f"{several} folders are called {printable(name)}, in several forms of Unicode: they are one class")
    return {label.name: label for label in folder.filled}


def _turned(top: Folder) -> Folder | None:
    """<class>/<split>/* as <split>/<class>/*, where every class is divided like that."""
    inner = [folder for label in top.filled for folder in label.filled]
    kinds = {split_of(folder.name) for folder in inner}
    if None in kinds or "train" not in kinds or len(kinds) < 2:
        return None
    if not all(label.holds_folders for label in top.filled) or any(folder.holds_folders for folder in inner):
        return None
    turned = Folder(images=list(top.images))
    for label in top.filled:
        _tell_loose(label)
        for folder in label.filled:
            as_label = replace(folder, name=label.name, spellings=label.spellings)
            turned.enter(folder.name).folders[label.name] = as_label
    return turned


def _ask_what_could_be_splits(source: Path, top: Folder) -> None:
    """Raise ConvlineError where folders that are not called like splits could be some, or hold some."""
    if are_of_classes_and_splits([folder.name for folder in top.filled]):
        raise ConvlineError(
            f"{source} holds {_names(top.filled)}: are these classes and splits in one name? "
            f"Then put them as train/<class>/<image> and test/<class>/<image>; {BELOW_TRAIN}"
        )
    for folder in top.filled:
        kinds = {split_of(inner.name) for inner in folder.filled} - {None}
        if kinds > {"train"} or any(split_of(inner.name) and inner.holds_folders for inner in folder.filled):
            others = [other for other in top.filled if other is not folder]
            raise ConvlineError(
                f"{source}: {_names([folder])} holds splits ({_names(folder.filled)}) and {_names(others)} beside it "
                f"does not: put splits above classes, as train/<class>/<image>, or {MOVE_AWAY}"
            )
    alike, shared = _alike([top, *(folder for folder in top.filled if folder.holds_folders)])
    if top in alike:
        raise ConvlineError(
            f"{source}: {_names(alike[1:])} holds folders that are beside it as well ({shared}); {MOVE_AWAY}; "
            f"{BELOW_TRAIN}"
        )
    if alike:
        raise ConvlineError(
            f"{source}: {_names(alike)} hold the same folders ({shared}): is {_names(alike[:1])} a split? "
            f"Then call them train, val or test; {BELOW_TRAIN}"
        )


def _alike(folders: list[Folder]) -> tuple[list[Folder], str]:
    """Folders of which at least two names, and half of all in each, stand in another one too; and these names."""
    names = [{inner.name.casefold() for inner in _inside(folder).filled} for folder in folders]
    count = Counter(name for within in names for name in within)
    shared = {name for name, times in count.items() if times > 1}
    alike = [
        folder
        for folder, within in zip(folders, names, strict=True)
        if len(within & shared) >= 2 and 2 * len(within & shared) >= len(within)
    ]
    if len(alike) < 2:
        return [], ""
    return alike, _names([inner for inner in _inside(alike[0]).filled if inner.name.casefold() in shared])


def _inside(folder: Folder) -> Folder:
    while len(folder.filled) == 1 and folder.filled[0].holds_folders:
        (folder,) = folder.filled
    return folder


def _names(folders: list[Folder]) -> str:
    return ", ".join(printable(folder.name) for folder in folders[:3]) + (", …" if len(folders) > 3 else "")
