"""Decodes an image folder or archive (`--source`), with its options: --image-size, --channels, --fit, --resample, …"""

from __future__ import annotations

import hashlib
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from convline.console import log
from convline.errors import ConvlineError
from convline.files import sha256
from convline.images import Fit, ImageSpec, Resample
from convline.inputs.listing import find, folders, last_of_each_path
from convline.time_limit import SECONDS
from pipeline.preparing.decoded_source import DecodedSource, create_array
from pipeline.preparing.folder_layout import FolderLayout, read_layout
from pipeline.preparing.parallel_decoding import FileForRow, Files, decode_into, size_of_first_image
from pipeline.preparing.reduced_jpegs import compare_reduced

MAX_REJECTED = 0.01  # share of the files
SPLITS = ("train", "test", "validation")


@dataclass(frozen=True)
class ImageFolderOptions:
    """`size`: (height, width), or None where all images have one size, which is kept;
    `channels`: 1 (grey), 3 (RGB), or "auto", which is 1 only if every image is grey;
    `allow_rejects`: accept more than 1% of unusable files; `allow_leaks`: accept the same pixels in two splits;
    `fit`, `jpeg` and `resample`: as in `ImageSpec`."""

    size: tuple[int, int] | None = None
    channels: Literal["auto", "1", "3"] = "auto"
    fit: Fit = "crop"
    allow_rejects: bool = False
    jpeg: Literal["full", "reduced"] = "full"
    resample: Resample = "bilinear"
    allow_leaks: bool = False


def decode_folder(
    source: Path, folder: Path, options: ImageFolderOptions, time_limit: float = SECONDS
) -> DecodedSource:
    """Decode every image of `source` into an array below `folder`. An image that takes more than `time_limit` seconds,
    or crashes its decoder, is unusable.

    Raises ConvlineError for a source without class folders, for images of several sizes without `options.size`, for
    more unusable files than the options allow, and for JPEGs that differ too much at reduced size.
    """
    if options.jpeg == "reduced" and options.size is None:
        raise ConvlineError("--jpeg reduced needs --image-size: images that keep their size are not reduced")
    paths = [file.path for file in find([str(source)])]
    layout = read_layout(source, paths, folders(source))
    order = _sorted_paths(layout)
    files = _files_in_rows(source, order, Counter(paths))
    size = options.size or size_of_first_image(files(), time_limit)
    if size is None:
        raise ConvlineError(f"{source} holds no usable image")
    channels = 1 if options.channels == "1" else 3
    spec = ImageSpec(*size, channels, options.fit, options.resample, jpeg=options.jpeg)
    details: dict[str, Any] = {}
    if options.jpeg == "reduced":
        details["reduced_jpegs"] = compare_reduced(files, len(order), spec, time_limit)
    images = create_array(folder / "decoded.npy", (len(order), *size, channels))
    (folder / "decoded.npy").unlink()  # the memory map stays valid; its disk space is freed with it
    result = decode_into(images, files(), spec, keep_size=options.size is None, time_limit=time_limit)
    rejects = [
        {"path": order[row], "reason": problem.reason, "detail": problem.detail}
        for row, problem in sorted(result.rejects.items())
    ]
    _check_rejects(rejects, len(order), options)
    usable = np.delete(np.arange(len(order)), sorted(result.rejects))
    splits = np.array([layout.split_and_class[path][0] for path in order])
    index_of_class = {label: index for index, label in enumerate(layout.classes)}
    return DecodedSource(
        images=images,
        labels=np.array([index_of_class[layout.split_and_class[path][1]] for path in order]),
        rows={split: usable[splits[usable] == split] for split in SPLITS if split in splits},
        classes=layout.classes,
        spec=replace(spec, channels=1) if options.channels == "auto" and result.is_all_grey else spec,
        source={**details, "name": source.resolve().name, "sha256": _source_hash(source, order, result.digests)},
        rejects=rejects,
        paths=order,
    )


def _sorted_paths(layout: FolderLayout) -> list[str]:
    """The images by split, class and name, so that a folder and any archive of it give the same dataset."""

    def key(path: str) -> tuple[tuple[str, str], str, str]:
        return layout.split_and_class[path], unicodedata.normalize("NFC", path), path

    return sorted(layout.split_and_class, key=key)


def _files_in_rows(source: Path, order: list[str], path_counts: Counter[str]) -> Files:
    """The files of `order` with their rows, in the order of the source; the last one of those with the same path."""
    rows = {path: row for row, path in enumerate(order)}
    repeated = {path: count for path, count in path_counts.items() if count > 1 and path in rows}
    if repeated:
        log(f"{source} holds {len(repeated)} paths more than once, such as {min(repeated)}: the last files are used")

    def files() -> Iterator[FileForRow]:
        for file in last_of_each_path(find([str(source)]), repeated):
            if file.path in rows:
                yield FileForRow(file.path, file.location, row=rows[file.path])

    return files


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
