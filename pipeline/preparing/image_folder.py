"""Decodes image folders, archives and Parquet files: to prepare (`--source`), with their options, or to evaluate."""

from __future__ import annotations

import hashlib
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from importlib.metadata import distributions, version
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from convline.console import log
from convline.errors import ConvlineError, ImageError
from convline.files import sha256
from convline.images import Fit, ImageSpec, Resample
from convline.inputs.input_file import FileVersion, InputFile, OnDisk
from convline.inputs.listing import find, folders, last_of_each_path
from convline.time_limit import SECONDS
from pipeline.preparing.decoded_source import DecodedSource, create_array
from pipeline.preparing.decoding_journal import DECODED, decoding_journal
from pipeline.preparing.folder_layout import FolderLayout, has_class_folders, read_layout
from pipeline.preparing.image_groups import groups_by_pattern
from pipeline.preparing.label_files import is_metadata, read_labels, read_metadata
from pipeline.preparing.parallel_decoding import DecodingResult, FileForRow, Files, decode_into, size_of_first_image
from pipeline.preparing.parquet_images import parquet_files, read_parquet
from pipeline.preparing.reduced_jpegs import compare_reduced
from pipeline.preparing.skipped_files import escape_unprintable, is_skipped

MAX_REJECTED = 0.01  # share of the files
Listing = Callable[[], Iterator[InputFile]]  # lists the files of a source, from the first one each time
SPLITS = ("train", "test", "validation")


@dataclass(frozen=True)
class ImageFolderOptions:
    """`size`: (height, width), or None where all images have one size, which is kept;
    `channels`: 1 (grey), 3 (RGB), or "auto", which is 1 only if every image is grey;
    `allow_rejects`: accept more than 1% of unusable files;
    `allow_leaks`: accept the same pixels, or images of one group, in two splits;
    `labels`: a table with the classes (see `read_labels`);
    `group_by`: a regular expression on paths (see `groups_by_pattern`), or a column of the table or of the
    Parquet files;
    `fit`, `jpeg` and `resample`: as in `ImageSpec`."""

    size: tuple[int, int] | None = None
    channels: Literal["auto", "1", "3"] = "auto"
    fit: Fit = "crop"
    allow_rejects: bool = False
    jpeg: Literal["full", "reduced"] = "full"
    resample: Resample = "bilinear"
    allow_leaks: bool = False
    labels: Path | None = None
    group_by: str | None = None


def decode_folder(
    source: Path, folder: Path, options: ImageFolderOptions, time_limit: float = SECONDS
) -> DecodedSource:
    """Decode every image of `source` into an array below `folder`; what an interrupted call with the same arguments has
    left there is not decoded again. An image that takes more than `time_limit` seconds, or crashes its decoder, is
    unusable.

    Raises ConvlineError for a source without class folders, for images of several sizes without `options.size`, for
    more unusable files than the options allow, and for JPEGs that differ too much at reduced size.
    """
    if options.jpeg == "reduced" and options.size is None:
        raise ConvlineError("--jpeg reduced needs --image-size: images that keep their size are not reduced")
    layout, listed, tables = _read_source(source, options)
    order = _sorted_paths(layout)
    files = _files_in_rows(order, listed)
    size = options.size or size_of_first_image(files(), time_limit)
    if size is None:
        raise ConvlineError(f"{source} holds no usable image")
    channels = 1 if options.channels == "1" else 3
    spec = ImageSpec(*size, channels, options.fit, options.resample, jpeg=options.jpeg)
    details: dict[str, Any] = {}
    if options.labels is not None:
        details["labels"] = {"name": options.labels.name, "sha256": sha256(options.labels)}
    if options.jpeg == "reduced":
        details["reduced_jpegs"] = compare_reduced(files, len(order), spec, time_limit)
    keep_size = options.size is None
    versions = _versions(source, tables, files)
    inputs = _inputs_of_decoding(versions, order, {**spec.to_dict(), "keep_size": keep_size})
    with decoding_journal(folder, (len(order), *size, channels), inputs) as journal:
        images = journal.images
        result = decode_into(images, files(), spec, keep_size, time_limit, journal.done, journal.add)
    rejects = _listed_rejects(result, order)
    _check_rejects(rejects, len(order), options)
    usable = np.delete(np.arange(len(order)), sorted(result.rejects))
    splits = np.array([layout.split_and_class[path][0] for path in order])
    return DecodedSource(
        images=images,
        labels=_labels(layout, order),
        rows={split: usable[splits[usable] == split] for split in SPLITS if split in splits},
        classes=layout.classes,
        spec=replace(spec, channels=1) if options.channels == "auto" and result.is_all_grey else spec,
        source={**details, "name": source.resolve().name, "sha256": _source_hash(source, order, result.digests)},
        rejects=rejects,
        paths=order,
        groups=_groups(layout, order, result),
        file=folder / DECODED,
        sizes=result.sizes,
        location=source,
    )


def _versions(source: Path, tables: list[str], files: Files) -> Iterator[tuple[str, FileVersion | None]]:
    """What changes whenever an archive, a Parquet file (`tables`) or an image does, with its path."""
    if source.is_file():
        yield source.name, OnDisk(str(source)).version()
    elif tables:
        yield from ((table, OnDisk(str(source / table)).version()) for table in tables)
    else:
        yield from ((file.path, file.location.version()) for file in files())


def _inputs_of_decoding(
    versions: Iterable[tuple[str, FileVersion | None]], order: list[str], options: dict[str, Any]
) -> dict[str, Any]:
    """What decoded pixels depend on: if it is the same after an interruption, decoding goes on."""
    digest = hashlib.sha256()
    for version_of_file in versions:
        digest.update(repr(version_of_file).encode("utf-8", "backslashreplace"))
    return {
        "the source": digest.hexdigest(),
        "the options": {**options, "rows": hashlib.sha256(repr(order).encode("utf-8", "backslashreplace")).hexdigest()},
        "a package that decodes": {
            package: version(package)
            for package in ("convline", "pillow", "pi-heif")
            if next(iter(distributions(name=package)), None)
        },
    }


def _labels(layout: FolderLayout, order: list[str]) -> NDArray[np.int64]:
    index_of_class = {label: index for index, label in enumerate(layout.classes)}
    return np.array([index_of_class[layout.split_and_class[path][1]] for path in order])


def _groups(layout: FolderLayout, order: list[str], result: DecodingResult) -> list[str]:
    """The group of each image, "" for none and for rejects; empty where no image has one."""
    if not layout.groups:
        return []
    return ["" if row in result.rejects else layout.groups.get(path, "") for row, path in enumerate(order)]


def _read_source(source: Path, options: ImageFolderOptions) -> tuple[FolderLayout, Listing, list[str]]:
    """The layout of the images, how they are listed, and the Parquet files that hold them, if any do."""
    paths = [file.path for file in find([str(source)])]
    if tables := parquet_files(source, paths):
        images = read_parquet(source, tables, options.group_by if options.labels is None else None)
        layout = images.layout
        if options.labels is not None:
            names = layout.names
            layout = replace(read_labels(options.labels, source, images.paths, options.group_by), names=names)
        return layout, images.read, tables
    layout = _layout(source, paths, options)
    return layout, _listed_once(source, paths, layout.split_and_class), []


def _layout(source: Path, paths: list[str], options: ImageFolderOptions) -> FolderLayout:
    if options.labels is not None:
        return read_labels(options.labels, source, paths, options.group_by)
    if metadata := [path for path in paths if is_metadata(path)]:
        if not has_class_folders(paths):
            return read_metadata(source, _contents(source, metadata), paths, options.group_by)
        log(f"{source} has class folders: {metadata[0]} is not read; --labels takes classes from such a table")
    layout = read_layout(source, paths, folders(source))
    if options.group_by is None:
        return layout
    return replace(layout, groups=groups_by_pattern(layout.split_and_class, options.group_by))


def _contents(source: Path, paths: Collection[str]) -> dict[str, bytes]:
    """The bytes of files of a source, by path. Raises ConvlineError for one that cannot be read."""
    contents = {}
    for file in find([str(source)]):
        if file.path in paths:
            try:
                contents[file.path] = file.read()
            except ImageError as error:
                raise ConvlineError(f"cannot read {source / file.path} ({error.detail}); mend or remove it") from error
    return contents


def decode_labelled(
    source: Path, folder: Path, classes: list[str], spec: ImageSpec, time_limit: float = SECONDS
) -> DecodedSource:
    """Decode the images of `source` by `spec`, into an array below `folder`, as a test split. The class of an image is
    the innermost folder around it that is named like one of `classes`, which may be `source` itself.

    Raises ConvlineError for an image around which there is none, for a source without images, and where more than 1% of
    the files are unusable.
    """
    paths = [file.path for file in find([str(source)])]
    around = source.resolve().name if source.is_dir() else ""  # may be a class itself
    class_of = {path: _innermost_class(f"{around}/{path}", classes) for path in paths if not is_skipped(path)}
    if outside := [path for path, label in class_of.items() if label is None]:
        raise ConvlineError(
            f"{source}: {len(outside)} images are in no folder that is named like a class, such as "
            f"{escape_unprintable(outside[0])}; the classes are {', '.join(classes[:5])}{', …' * (len(classes) > 5)}"
        )
    if not class_of:
        raise ConvlineError(f"{source} holds no images; expected <class>/<image>")
    layout = FolderLayout(classes, {path: ("test", str(label)) for path, label in class_of.items()})
    order = _sorted_paths(layout)
    assert spec.height and spec.width
    images = create_array(folder / "decoded.npy", (len(order), spec.height, spec.width, spec.channels))
    files = _files_in_rows(order, _listed_once(source, paths, layout.split_and_class))
    result = decode_into(images, files(), spec, keep_size=False, time_limit=time_limit)
    rejects = _listed_rejects(result, order)
    _check_rejects(rejects, len(order), ImageFolderOptions())
    return DecodedSource(
        images=images,
        labels=_labels(layout, order),
        rows={"test": np.delete(np.arange(len(order)), sorted(result.rejects))},
        classes=classes,
        spec=spec,
        source={"name": source.resolve().name},
        rejects=rejects,
        paths=order,
    )


def _innermost_class(path: str, classes: Collection[str]) -> str | None:
    folders = [unicodedata.normalize("NFC", name) for name in path.split("/")[:-1]]
    return next((name for name in reversed(folders) if name in classes), None)


def _listed_rejects(result: DecodingResult, order: list[str]) -> list[dict[str, str]]:
    return [
        {"path": order[row], "reason": problem.reason, "detail": problem.detail}
        for row, problem in sorted(result.rejects.items())
    ]


def _sorted_paths(layout: FolderLayout) -> list[str]:
    """The images by split, class and name, so that a folder, any archive of it and its Parquet files give the same
    dataset."""

    def key(path: str) -> tuple[tuple[str, str], str, str]:
        name = layout.names.get(path, path)
        return layout.split_and_class[path], unicodedata.normalize("NFC", name), name

    return sorted(layout.split_and_class, key=key)


def _files_in_rows(order: list[str], listed: Listing) -> Files:
    """The files of `order` with their rows, in the order of the source."""
    rows = {path: row for row, path in enumerate(order)}

    def files() -> Iterator[FileForRow]:
        for file in listed():
            if file.path in rows:
                yield FileForRow(file.path, file.location, row=rows[file.path])

    return files


def _listed_once(source: Path, paths: Iterable[str], used: Collection[str]) -> Listing:
    """The files of a source; the last one of those with the same path."""
    repeated = {path: count for path, count in Counter(paths).items() if count > 1 and path in used}
    if repeated:
        log(f"{source} holds {len(repeated)} paths more than once, such as {min(repeated)}: the last files are used")
    return lambda: last_of_each_path(find([str(source)]), repeated)


def _check_rejects(rejects: list[dict[str, str]], total: int, options: ImageFolderOptions) -> None:
    """Log the unusable files. Raises ConvlineError where there are too many."""
    for reject in rejects:
        log(f"rejected {reject['path']}: {reject['reason']} ({reject['detail']})")
    if rejects:
        log(f"{len(rejects)} of {total} files are unusable")
    if len(rejects) > MAX_REJECTED * total and not options.allow_rejects:
        raise ConvlineError(
            f"{len(rejects)} of {total} files are unusable, more than {MAX_REJECTED:.0%}, such as "
            f"{rejects[0]['path']} ({rejects[0]['reason']}); repair or remove them, or give --allow-rejects"
        )


def _source_hash(source: Path, order: list[str], digests: dict[int, bytes]) -> str:
    """SHA-256 of an archive, or over the names and contents of a folder's files."""
    if source.is_file():
        return sha256(source)
    digest = hashlib.sha256()
    for row, path in enumerate(order):
        digest.update(path.encode("utf-8", "surrogateescape") + b"\0" + digests[row])
    return digest.hexdigest()
