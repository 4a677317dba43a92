"""Reads the class, and if given the split and the group, of each image of a source from tables: `--labels FILE`, and
the `metadata.csv` of Hugging Face's ImageFolder."""

from __future__ import annotations

import io
import unicodedata
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from convline.console import log
from convline.errors import ConvlineError
from pipeline.preparing.class_names import check_classes
from pipeline.preparing.folder_layout import FolderLayout
from pipeline.preparing.image_groups import groups_by_pattern
from pipeline.preparing.label_tables import LabelTable, read_table
from pipeline.preparing.skipped_files import escape_unprintable, is_in_skipped_folder, is_skipped
from pipeline.preparing.split_names import split_of, split_of_folders

METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
COLUMNS = ("path", "file_name", "label", "split", "group")


@dataclass(frozen=True)
class LabelledImage:
    """What a table says of an image. `where`: the row, for messages; `path`: of the image in the source; `split`: under
    any usual name, "" for none; `group`: "" for none."""

    where: str
    path: str
    label: str
    split: str = ""
    group: str = ""


def read_labels(file: Path, source: Path, paths: Iterable[str], group_by: str | None = None) -> FolderLayout:
    """The layout of the images at `paths`, from a table with the columns `path` (in the source; `file_name` where there
    is none), `label`, and optionally `split` (under any usual name) and `group`, or the column that `group_by` names.
    Images that it does not list are left out.

    Raises ConvlineError for a table without these columns, a row without a value, a path that the source does not hold
    or that has two labels, and for rows of which only some have a split.
    """
    try:
        with file.open("rb") as opened:
            table = read_table(str(file), opened, {*COLUMNS, group_by})
    except FileNotFoundError as error:
        raise ConvlineError(f"no such file: {file}") from error
    path_column = "file_name" if "file_name" in table.columns and "path" not in table.columns else "path"
    found = _Paths(source, paths)
    images = _images(str(file), table, path_column, found, group_by)
    layout = layout_of(source, str(file), images, None if group_by in table.columns else group_by)
    found.log_left_out(layout.split_and_class, file.name)
    return layout


def is_metadata(path: str) -> bool:
    return PurePosixPath(path).name.casefold() in METADATA and not is_in_skipped_folder(path)


def read_metadata(
    source: Path, metadata: Mapping[str, bytes], paths: Iterable[str], group_by: str | None = None
) -> FolderLayout:
    """The layout of the images at `paths`, from the `metadata` files in the source, with their contents: tables as for
    `read_labels`, where `file_name` is the path of an image below the table's folder. A folder that is named like a
    split is one, for images to which the table gives none. Raises ConvlineError as `read_labels`."""
    found = _Paths(source, paths)
    images: list[LabelledImage] = []
    columns: set[str] = set()
    for path, content in metadata.items():
        name = str(source / path)
        table = read_table(name, io.BytesIO(content), {*COLUMNS, group_by})
        columns |= set(table.columns)
        images += _images(name, table, "file_name", found, group_by, folder=path.rpartition("/")[0])
    layout = layout_of(source, str(source / min(metadata)), images, None if group_by in columns else group_by)
    found.log_left_out(layout.split_and_class, ", ".join(metadata))
    return layout


def layout_of(source: Path, table: str, images: Iterable[LabelledImage], pattern: str | None) -> FolderLayout:
    """The layout of images that a table, or several, lists. `pattern`: a regular expression on paths for their groups
    (see `groups_by_pattern`), where the table has none."""
    split_and_class: dict[str, tuple[str, str]] = {}
    groups: dict[str, str] = {}
    for image in images:
        shown = escape_unprintable(image.path)
        label = unicodedata.normalize("NFC", image.label)
        if not label:
            raise ConvlineError(f"{image.where}: {shown} has no label; add it, or remove the row")
        read = _split(image.split, image.where), label
        if split_and_class.setdefault(image.path, read) != read:
            raise ConvlineError(f"{image.where}: {shown} has another label or split in an earlier row")
        if image.group:
            groups[image.path] = image.group
    splits = {split for split, _ in split_and_class.values()}
    if not splits:
        raise ConvlineError(f"{table} lists no images")
    if "" in splits and len(splits) > 1:
        missing = next(path for path, (split, _) in split_and_class.items() if not split)
        raise ConvlineError(f"{table}: {escape_unprintable(missing)} has no split, but others do; add it")
    used = {"": "train"}
    if "validation" in splits and "test" not in splits:
        log("there is no test split: validation serves as test")
        used["validation"] = "test"
    split_and_class = {path: (used.get(split, split), label) for path, (split, label) in split_and_class.items()}
    if pattern is not None:
        groups = groups_by_pattern(split_and_class, pattern)
    return FolderLayout(_classes(source, table, split_and_class), split_and_class, groups)


def group_column(columns: Collection[str], group_by: str | None) -> str | None:
    """The column that holds the groups: the one that `group_by` names, or `group` where it is not given."""
    wanted = group_by or "group"
    return wanted if wanted in columns else None


def _images(
    name: str, table: LabelTable, path_column: str, found: _Paths, group_by: str | None, folder: str | None = None
) -> Iterator[LabelledImage]:
    """The images of a table. With a `folder`, paths are relative to it, and its name and theirs may be splits."""
    for column in (path_column, "label"):
        if column not in table.columns:
            raise ConvlineError(f"{name} has no column {column!r}; its columns are {', '.join(table.columns)}")
    column_of_groups = group_column(table.columns, group_by) or ""
    for where, row in table.rows:
        written = row.get(path_column, "")
        path = found.of(f"{folder}/{written.removeprefix('./')}" if folder else written, where)
        split = row.get("split") or (split_of_folders(path) if folder is not None else "")
        yield LabelledImage(where, path, row.get("label", ""), split or "", row.get(column_of_groups, ""))


class _Paths:
    """Finds the paths of a source as a table may write them: with `./` before them, in another Unicode form, or without
    the single folder that an archive wraps around everything."""

    def __init__(self, source: Path, paths: Iterable[str]) -> None:
        self._source = source
        self._paths = {_normal(path): path for path in paths if not is_skipped(path)}
        tops = {path.split("/")[0] for path in self._paths}
        self._wrapper = f"{tops.pop()}/" if len(tops) == 1 else ""

    def of(self, written: str, where: str) -> str:
        normal = _normal(written)
        path = self._paths.get(normal) or self._paths.get(self._wrapper + normal)
        if path is None:
            raise ConvlineError(f"{where}: {self._source} holds no image {escape_unprintable(written)!r}")
        return path

    def log_left_out(self, used: Collection[str], table: str) -> None:
        if left_out := len(self._paths) - len(used):
            log(f"{left_out} images of {self._source} are not in {table} and are left out")


def _normal(path: str) -> str:
    return unicodedata.normalize("NFC", path).removeprefix("./")


def _split(written: str, where: str) -> str:
    if not written:
        return ""
    kind = split_of(written)
    if kind is None or kind == "unlabelled":
        raise ConvlineError(f"{where}: {written!r} is no split; write train, validation or test")
    return kind


def _classes(source: Path, table: str, split_and_class: dict[str, tuple[str, str]]) -> list[str]:
    by_split: dict[str, set[str]] = {}
    for split, label in split_and_class.values():
        by_split.setdefault(split, set()).add(label)
    if "train" not in by_split:
        raise ConvlineError(f"{table} names no training images; give some the split train")
    return check_classes(source, by_split)
