"""Reads splits and classes off the folder names of an image folder or archive: train/<class>/…, <class>/train/…, …"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from convline.console import log
from convline.errors import ConvlineError
from pipeline.preparing.class_names import check_classes
from pipeline.preparing.folder_tree import SourceFolder, read_tree
from pipeline.preparing.skipped_files import escape_unprintable, log_skipped
from pipeline.preparing.split_names import SplitKind, combine_class_and_split, split_of

EXPECTED = "expected <class>/<image> or train/<class>/<image>"
MOVE_AWAY = "move away folders that should not be used"
INTO_TRAIN = "if all of these are classes, put them into a folder train/"  # whose subfolders are always classes


@dataclass(frozen=True)
class FolderLayout:
    """The sorted class names, and by image path the split ("train", "test" or "validation") and class of each image,
    its group, where it has one, and the name to sort it by, where that is not its path."""

    classes: list[str]
    split_and_class: dict[str, tuple[str, str]]
    groups: dict[str, str] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)


ClassFolders = dict[str, SourceFolder]  # by class
Splits = dict[SplitKind, ClassFolders]


def read_layout(source: Path, paths: Iterable[str], folders: Iterable[str] = ()) -> FolderLayout:
    """The layout of the files at `paths`: train/<class>/… with test/<class>/…, <class>/train/… with <class>/test/…, or
    <class>/… alone, below any number of single folders, with the usual names for splits. `folders` are all folders of
    the source, so that an empty class folder is noticed.

    Raises ConvlineError, which names the folder, for any other layout, and asks where folders could be splits or
    classes.
    """
    root = read_tree(paths, folders)
    skipped = [path for folder in root.walk() for path in folder.skipped]
    log_skipped(skipped, "not images")
    top = _without_wrappers(root)
    if not top.nonempty_subfolders:
        files = top.images or skipped
        only = f", only files such as {escape_unprintable(files[0])}" if files else ""
        raise ConvlineError(f"{source} has no class folders{only}; {EXPECTED}")
    splits = _find_splits(source, top)
    classes = check_classes(source, {kind: class_folders.keys() for kind, class_folders in splits.items()})
    return FolderLayout(
        classes,
        {
            path: (kind, label)
            for kind, class_folders in splits.items()
            for label, folder in class_folders.items()
            for path in folder.all_images()
        },
    )


def has_class_folders(paths: Iterable[str]) -> bool:
    """Whether the folders of a source's files at `paths` are classes: two or more, beside or below any splits."""
    top = _without_wrappers(read_tree(paths))
    splits = [folder for folder in top.nonempty_subfolders if split_of(folder.name)]
    return len({inner.name for folder in splits or [top] for inner in folder.nonempty_subfolders}) > 1


def _without_wrappers(folder: SourceFolder) -> SourceFolder:
    """The folder that holds the splits or classes, inside any single folders around it."""
    while len(folder.nonempty_subfolders) == 1:
        (inner,) = folder.nonempty_subfolders
        if not inner.nonempty_subfolders or (split_of(inner.name) and not _holds_splits(inner)):
            break
        _log_outside_classes(folder)
        folder = inner
    return folder


def _holds_splits(folder: SourceFolder) -> bool:
    """Whether a folder that is named like a split holds splits, and not just a class that is named like one."""
    kinds = {split_of(inner.name) for inner in folder.nonempty_subfolders if inner.is_nested}
    return "train" in kinds and (
        len(kinds - {None}) > 1 or all(split_of(inner.name) for inner in folder.nonempty_subfolders)
    )


def _log_outside_classes(folder: SourceFolder) -> None:
    log_skipped(folder.images, "not in a class folder")


def _find_splits(source: Path, top: SourceFolder) -> Splits:
    named = [folder for folder in top.nonempty_subfolders if split_of(folder.name)]
    for folder in top.subfolders.values():
        if not folder.image_count and split_of(folder.name):
            raise ConvlineError(
                f"{source}: {folder.path} is named like a split but holds no images; add some or remove it"
            )
    if any(folder.nonempty_subfolders and split_of(folder.name) != "unlabelled" for folder in named):
        return _read_splits(source, top)
    if named:  # classes named like splits, or images without labels
        raise ConvlineError(
            f"{source}: {_names(named)} is named like a split but holds no class folders; {EXPECTED}; {MOVE_AWAY}; "
            f"{INTO_TRAIN}"
        )
    if (transposed := _transposed(top)) is not None:
        return _read_splits(source, transposed)
    _refuse_possible_splits(source, top)
    return {"train": _class_folders(source, top)}


def _read_splits(source: Path, top: SourceFolder) -> Splits:
    """Splits with classes in them. Raises ConvlineError for other folders beside them, and for two of one kind."""
    by_kind: dict[SplitKind, list[SourceFolder]] = {}
    others = []
    for folder in top.nonempty_subfolders:
        if kind := split_of(folder.name):
            by_kind.setdefault(kind, []).append(folder)
        else:
            others.append(folder)
    if others:
        splits = [folder for folders in by_kind.values() for folder in folders]
        raise ConvlineError(
            f"{source} holds {_names(splits)} beside {_names(others)}: is {_names(others[:1])} a split? "
            f"Then name it train, val or test; {MOVE_AWAY}; {INTO_TRAIN}"
        )
    _log_outside_classes(top)
    for folder in by_kind.pop("unlabelled", []):
        log_skipped(list(folder.all_images()), f"{folder.name} is named like a folder of unlabelled images")
    if len(by_kind.get("train", [])) != 1:
        raise ConvlineError(
            f"{source} holds {_names(top.nonempty_subfolders)}; exactly one folder must be named train; {INTO_TRAIN}"
        )
    for kind, folders in by_kind.items():
        if len(folders) > 1:
            raise ConvlineError(f"{source}: {_names(folders)} are all named like the {kind} split; keep one of them")
    used = _used_splits({kind: folder for kind, (folder,) in by_kind.items()})
    return {kind: _class_folders(source, _around_classes(source, folder)) for kind, folder in used.items()}


def _used_splits(folders: dict[SplitKind, SourceFolder]) -> dict[SplitKind, SourceFolder]:
    """The folders that are used as train, test and validation; logs which, where their names differ."""
    if renamed := [f"{folder.name} is {kind}" for kind, folder in folders.items() if folder.name.lower() != kind]:
        log(f"splits: {', '.join(renamed)}")
    if "validation" in folders and "test" not in folders:
        log(f"there is no test split: {folders['validation'].name} serves as test")
        folders["test"] = folders.pop("validation")
    return folders


def _around_classes(source: Path, split: SourceFolder) -> SourceFolder:
    """The folder that holds the classes of a split: the split's own, or a single folder in it, as in train/train/."""
    if not split.nonempty_subfolders:
        raise ConvlineError(
            f"{source}: {escape_unprintable(split.images[0])} is not in a class folder; expected "
            f"{split.path}/<class>/<image>; move {split.name} away if its images have no labels"
        )
    *wrappers, folder = split.unwrapped()
    for wrapper in wrappers:
        _log_outside_classes(wrapper)
    return folder


def _class_folders(source: Path, parent: SourceFolder) -> ClassFolders:
    """The class folders in `parent`. Raises ConvlineError for one without images."""
    _log_outside_classes(parent)
    for name, folder in sorted(parent.subfolders.items()):
        if not folder.image_count:
            skipped = [path for inner in folder.walk() for path in inner.skipped]
            what = f"holds no images, only files such as {escape_unprintable(skipped[0])}" if skipped else "is empty"
            raise ConvlineError(
                f"{source}: the class folder {escape_unprintable(folder.path)} {what}; add images or remove it"
            )
        if (count := len(folder.spellings)) > 1:
            log(f"{count} folders are named {escape_unprintable(name)}, in different Unicode forms: they are one class")
    return {folder.name: folder for folder in parent.nonempty_subfolders}


def _transposed(top: SourceFolder) -> SourceFolder | None:
    """A tree <class>/<split>/… as <split>/<class>/…; None where not every class is divided into splits."""
    inner = [folder for class_folder in top.nonempty_subfolders for folder in class_folder.nonempty_subfolders]
    kinds = {split_of(folder.name) for folder in inner}
    if None in kinds or "train" not in kinds or len(kinds) < 2:
        return None
    if not all(folder.is_nested for folder in top.nonempty_subfolders) or any(folder.is_nested for folder in inner):
        return None
    transposed = SourceFolder(images=list(top.images))
    for class_folder in top.nonempty_subfolders:
        _log_outside_classes(class_folder)
        for folder in class_folder.nonempty_subfolders:
            renamed = replace(folder, name=class_folder.name, spellings=class_folder.spellings)
            transposed.subfolder(folder.name).subfolders[class_folder.name] = renamed
    return transposed


def _refuse_possible_splits(source: Path, top: SourceFolder) -> None:
    """Raise ConvlineError where folders without split names could be splits all the same, or hold some."""
    if combine_class_and_split([folder.name for folder in top.nonempty_subfolders]):
        raise ConvlineError(
            f"{source} holds {_names(top.nonempty_subfolders)}: does each name combine a class and a split? "
            f"Then arrange them as train/<class>/<image> and test/<class>/<image>; {INTO_TRAIN}"
        )
    for folder in top.nonempty_subfolders:
        kinds = {split_of(inner.name) for inner in folder.nonempty_subfolders} - {None}
        if kinds > {"train"} or any(split_of(inner.name) and inner.is_nested for inner in folder.nonempty_subfolders):
            others = [other for other in top.nonempty_subfolders if other is not folder]
            raise ConvlineError(
                f"{source}: {_names([folder])} holds splits ({_names(folder.nonempty_subfolders)}) but "
                f"{_names(others)} beside it does not; put splits above classes (train/<class>/<image>), or {MOVE_AWAY}"
            )
    alike, shared = _with_same_subfolders([top, *(folder for folder in top.nonempty_subfolders if folder.is_nested)])
    if top in alike:
        raise ConvlineError(
            f"{source}: {_names(alike[1:])} holds the same folders ({shared}) as are beside it; {MOVE_AWAY}; "
            f"{INTO_TRAIN}"
        )
    if alike:
        raise ConvlineError(
            f"{source}: {_names(alike)} hold the same folders ({shared}): is {_names(alike[:1])} a split? "
            f"Then name them train, val or test; {INTO_TRAIN}"
        )


def _with_same_subfolders(folders: list[SourceFolder]) -> tuple[list[SourceFolder], str]:
    """The folders of whose subfolder names at least two, and at least half, occur in another of the folders as well;
    and these names."""
    names = [{inner.name.casefold() for inner in folder.unwrapped()[-1].nonempty_subfolders} for folder in folders]
    count = Counter(name for of_folder in names for name in of_folder)
    shared = {name for name, times in count.items() if times > 1}
    alike = [
        folder
        for folder, of_folder in zip(folders, names, strict=True)
        if len(of_folder & shared) >= 2 and 2 * len(of_folder & shared) >= len(of_folder)
    ]
    if len(alike) < 2:
        return [], ""
    return alike, _names(
        [inner for inner in alike[0].unwrapped()[-1].nonempty_subfolders if inner.name.casefold() in shared]
    )


def _names(folders: list[SourceFolder]) -> str:
    return ", ".join(escape_unprintable(folder.name) for folder in folders[:3]) + (", …" if len(folders) > 3 else "")
