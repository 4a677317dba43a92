"""Reads `--labels FILE.csv`: the class, and if given the split and the group, of each image of a source."""

from __future__ import annotations

import csv
import unicodedata
from collections.abc import Iterable
from pathlib import Path

from convline.console import log
from convline.errors import ConvlineError
from pipeline.preparing.class_names import check_classes
from pipeline.preparing.folder_layout import FolderLayout
from pipeline.preparing.image_groups import groups_by_pattern
from pipeline.preparing.skipped_files import escape_unprintable, is_skipped
from pipeline.preparing.split_names import split_of

DELIMITERS = ",;\t"


def read_labels(file: Path, source: Path, paths: Iterable[str], group_by: str | None = None) -> FolderLayout:
    """The layout of the images at `paths`, from a table with the columns `path` (in the source), `label`, and
    optionally `split` (under any usual name) and `group`, or the column that `group_by` names. Images that it does not
    list are left out.

    Raises ConvlineError for a table without these columns, a row without a value, a path that the source does not hold
    or that has two labels, and for rows of which only some have a split.
    """
    columns, rows = _read_table(file)
    for column in ("path", "label"):
        if column not in columns:
            raise ConvlineError(f"{file} has no column {column!r}; its columns are {', '.join(columns)}")
    group_column = group_by if group_by in columns else "group" if "group" in columns and group_by is None else None
    found = _Paths([path for path in paths if not is_skipped(path)])
    split_and_class: dict[str, tuple[str, str]] = {}
    groups: dict[str, str] = {}
    for line, row in rows:
        where = f"{file}, line {line}"
        path = found.of(row["path"])
        if path is None:
            raise ConvlineError(f"{where}: {source} holds no image {escape_unprintable(row['path'])!r}")
        label = unicodedata.normalize("NFC", row["label"])
        if not label:
            raise ConvlineError(f"{where}: {escape_unprintable(row['path'])} has no label; add it, or remove the line")
        read = _split(row.get("split", ""), where), label
        if split_and_class.setdefault(path, read) != read:
            raise ConvlineError(f"{where}: {escape_unprintable(path)} has another label or split in an earlier line")
        if group_column and row[group_column]:
            groups[path] = row[group_column]
    splits = {split for split, _ in split_and_class.values()}
    if not splits:
        raise ConvlineError(f"{file} lists no images")
    if "" in splits and len(splits) > 1:
        missing = next(path for path, (split, _) in split_and_class.items() if not split)
        raise ConvlineError(f"{file}: {escape_unprintable(missing)} has no split, but others do; add it")
    if left_out := len(found) - len(split_and_class):
        log(f"{left_out} images of {source} are not in {file.name} and are left out")
    split_and_class = {path: (split or "train", label) for path, (split, label) in split_and_class.items()}
    if group_by is not None and group_by not in columns:
        groups = groups_by_pattern(split_and_class, group_by)
    return FolderLayout(_classes(source, split_and_class), split_and_class, groups)


def _read_table(file: Path) -> tuple[list[str], list[tuple[int, dict[str, str]]]]:
    """The columns, and each row with the number of its line. Comma, semicolon and tab separate the columns."""
    try:
        with file.open(encoding="utf-8-sig", newline="") as opened:
            header = opened.readline()
            opened.seek(0)
            delimiter = max(DELIMITERS, key=header.count)
            reader = csv.DictReader(opened, delimiter=delimiter, restval="", strict=True)
            columns = [name.strip() for name in reader.fieldnames or []]
            reader.fieldnames = columns
            rows = []
            for row in reader:
                if None in row:
                    raise ConvlineError(f"{file}, line {reader.line_num}: it has more cells than the header")
                rows.append((reader.line_num, {name: value.strip() for name, value in row.items()}))
            return columns, rows
    except FileNotFoundError as error:
        raise ConvlineError(f"no such file: {file}") from error
    except (csv.Error, UnicodeDecodeError) as error:
        raise ConvlineError(f"{file} is not a CSV file in UTF-8 ({error})") from error


class _Paths:
    """Finds the paths of a source as a table may write them: with `./` before them, in another Unicode form, or without
    the single folder that an archive wraps around everything."""

    def __init__(self, paths: list[str]) -> None:
        self._paths = {_normal(path): path for path in paths}
        tops = {path.split("/")[0] for path in self._paths}
        self._wrapper = f"{tops.pop()}/" if len(tops) == 1 else ""

    def __len__(self) -> int:
        return len(self._paths)

    def of(self, written: str) -> str | None:
        normal = _normal(written)
        return self._paths.get(normal) or self._paths.get(self._wrapper + normal)


def _normal(path: str) -> str:
    return unicodedata.normalize("NFC", path).removeprefix("./")


def _split(written: str, where: str) -> str:
    if not written:
        return ""
    kind = split_of(written)
    if kind is None or kind == "unlabelled":
        raise ConvlineError(f"{where}: {written!r} is no split; write train, validation or test")
    return kind


def _classes(source: Path, split_and_class: dict[str, tuple[str, str]]) -> list[str]:
    by_split: dict[str, set[str]] = {}
    for split, label in split_and_class.values():
        by_split.setdefault(split, set()).add(label)
    if "train" not in by_split:
        raise ConvlineError(f"{source}: the table names no training images; give some the split train")
    if "validation" in by_split and "test" not in by_split:
        raise ConvlineError(f"{source}: the table names validation images but no test images; name these test")
    return check_classes(source, by_split)
