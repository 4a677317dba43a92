"""Reads images and their labels from Parquet files, as Hugging Face's `datasets` writes them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from convline.errors import ConvlineError, ImageError
from convline.inputs.archive_members import symlink_target
from convline.inputs.archives import is_archive
from convline.inputs.input_file import FileLocation, InMemory, InputFile, OnDisk, Rejected, check_size
from pipeline.preparing.folder_layout import FolderLayout
from pipeline.preparing.label_files import LabelledImage, group_column, is_metadata, layout_of
from pipeline.preparing.parquet_files import as_text, class_names, open_parquet, read_rows
from pipeline.preparing.skipped_files import escape_unprintable, is_skipped, log_skipped
from pipeline.preparing.split_names import SplitKind, split_of_file

IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMNS = ("label", "labels")
BINARY, TEXT = ("binary", "large_binary"), ("string", "large_string")  # types of pyarrow


def parquet_files(source: Path, paths: Sequence[str]) -> list[str]:
    """Those of the paths in a source that are Parquet files of images. Beside other images, these are the ones with an
    image column; in an archive, there are none.

    Raises ConvlineError for a damaged file.
    """
    if is_archive(source):
        return []
    found = [path for path in paths if path.lower().endswith(".parquet") and not is_metadata(path)]
    if all(is_skipped(path) for path in paths):
        return found
    with_images = []
    for path in found:
        with _open(source, path) as opened:
            if any(_may_be_image(field.type) for field in opened.schema_arrow):
                with_images.append(path)
    return with_images


@dataclass(frozen=True)
class ParquetImages:
    """The images in the Parquet `files` of a source, and the `paths` of all of them, in the order of the rows.

    A path is the one in the image's struct, if all have one and no two the same. Otherwise it is that of the file, the
    number of the row, from 0, and the struct's path: `data/train-00000-of-00002.parquet/17/cat.jpg`. The layout sorts
    images by the struct's path, as a folder does.
    """

    source: Path
    files: list[str]
    paths: list[str]
    layout: FolderLayout

    def read(self) -> Iterator[InputFile]:
        """The images, in the order of the rows."""
        paths = iter(self.paths)
        for file in self.files:
            with _open(self.source, file) as opened:
                column = _find_columns(str(_folder(self.source) / file), opened.schema_arrow).image
                for (image,), path in zip(read_rows(opened, [column]), paths, strict=False):
                    yield InputFile(path, self._location(file, image))

    def _location(self, file: str, image: Any) -> FileLocation:
        data, path = (image.get("bytes"), image.get("path")) if isinstance(image, dict) else (image, None)
        try:
            if data is not None:
                check_size(len(data))
                return InMemory(data)
            if path is None:
                raise ImageError("empty", "the row holds no image")
            if (beside := symlink_target(file, path)) is None:
                raise ImageError("unreadable", f"the row holds only a path out of the source, {path}")
        except ImageError as error:
            return Rejected(error)
        return OnDisk(str(_folder(self.source) / beside))


def read_parquet(source: Path, files: Sequence[str], group_by: str | None = None) -> ParquetImages:
    """The images in the Parquet `files` of a source. Their splits are read from the names of files and folders, and
    `group_by` is a column, or a regular expression on paths.

    Raises ConvlineError for a file that is damaged or lacks a column, a row without a label, and for files of which
    only some are named like a split.
    """
    splits = _splits(source, files)
    with _open(source, files[0]) as opened:
        group = group_column(opened.schema_arrow.names, group_by)
    images: list[LabelledImage] = []
    names: list[str] = []  # by their structs
    for file, split in splits.items():
        for name, image in _labelled_rows(source, file, split, group):
            names.append(name)
            images.append(image)
    if not all(names) or len(set(names)) < len(names):
        paths = [f"{image.path}/{name.lstrip('/')}".rstrip("/") for name, image in zip(names, images, strict=True)]
    else:
        paths = names
    images = [replace(image, path=path) for path, image in zip(paths, images, strict=True)]
    layout = layout_of(source, str(source), images, group_by if group is None else None)
    return ParquetImages(source, list(splits), paths, replace(layout, names=dict(zip(paths, names, strict=True))))


def _labelled_rows(source: Path, file: str, split: str, group: str | None) -> Iterator[tuple[str, LabelledImage]]:
    """The images of a file, with `file/row` as their paths, and the paths in their structs, "" for none."""
    with _open(source, file) as opened:
        shown, schema = str(_folder(source) / file), opened.schema_arrow
        columns = _find_columns(shown, schema)
        if group is not None and group not in schema.names:
            raise ConvlineError(
                f"{shown} has no column {group!r} to group by; its columns are {', '.join(schema.names)}"
            )
        names = class_names(shown, schema).get(columns.label)
        read = [columns.label, *([group] if group else []), *([f"{columns.image}.path"] if columns.has_paths else [])]
        for row, values in enumerate(read_rows(opened, read)):
            where = f"{shown}, row {row}"
            of_column = dict(zip(read, values, strict=True))
            label = as_text(of_column[columns.label], where, names)
            group_name = as_text(of_column[group], where) if group else ""
            name = (of_column.get(f"{columns.image}.path") or {}).get("path") or ""
            yield name, LabelledImage(where, f"{file}/{row}", label, split, group_name)


@dataclass(frozen=True)
class _Columns:
    """`has_paths`: the images are structs with a field `path`."""

    image: str
    label: str
    has_paths: bool


def _find_columns(file: str, schema: Any) -> _Columns:
    """The columns with the images and the labels: those of the usual names, else the only ones that can be."""
    image = _only(file, "image", IMAGE_COLUMNS, [field.name for field in schema if _may_be_image(field.type)], schema)
    labels = [name for name in schema.names if name.lower() in LABEL_COLUMNS] or list(class_names(file, schema))
    label = _only(file, "label", LABEL_COLUMNS, labels, schema)
    return _Columns(image, label, has_paths="path" in _fields(schema.field(image).type))


def _only(file: str, what: str, usual: Sequence[str], possible: list[str], schema: Any) -> str:
    found = [name for name in possible if name.lower() in usual] or possible
    if len(found) == 1:
        return found[0]
    problem = f"could take {', '.join(found)} for the {what}" if found else f"has no column for the {what}"
    raise ConvlineError(f"{file} {problem}; name one {usual[0]!r}; its columns are {', '.join(schema.names)}")


def _may_be_image(kind: Any) -> bool:
    """Whether a column holds bytes, or structs of bytes and path."""
    fields = _fields(kind)
    return str(kind) in BINARY or (
        not fields.keys().isdisjoint(("bytes", "path"))
        and fields.get("bytes", "null") in (*BINARY, "null")
        and fields.get("path", "null") in (*TEXT, "null")
    )


def _fields(kind: Any) -> dict[str, str]:
    """The types of a struct's fields, by name."""
    if not str(kind).startswith("struct<"):
        return {}
    return {kind.field(number).name: str(kind.field(number).type) for number in range(kind.num_fields)}


def _splits(source: Path, files: Sequence[str]) -> dict[str, SplitKind]:
    """The split of each file by its name or a folder's; all are train where none has one. Raises ConvlineError where
    only some have."""
    found = {file: split_of_file(file) for file in files}
    without = [file for file, split in found.items() if split is None]
    if without and len(without) < len(files):
        raise ConvlineError(
            f"{source}: neither the name of {escape_unprintable(without[0])} nor its folder says train, validation or "
            "test, as those of others do; rename it or move it away"
        )
    unlabelled = [file for file, split in found.items() if split == "unlabelled"]
    log_skipped(unlabelled, "named like files of unlabelled images")
    return {file: split or "train" for file, split in found.items() if file not in unlabelled}


def _open(source: Path, file: str) -> AbstractContextManager[Any]:
    path = _folder(source) / file
    return open_parquet(str(path), path)


def _folder(source: Path) -> Path:
    return source if source.is_dir() else source.parent
