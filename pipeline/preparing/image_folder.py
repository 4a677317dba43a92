"""Decodes a folder of images, or an archive of one, into an array."""

from __future__ import annotations

import hashlib
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from convline.console import log
from convline.errors import ConvlineError, ImageError
from convline.files import sha256
from convline.images import Fit, ImageSpec, Resample, decode
from convline.inputs.input_file import InputFile
from convline.inputs.listing import find, folders, last_of_each_path
from convline.time_limit import SECONDS
from pipeline.preparing.decoding import Placed, decode_into, first_size, on_all_cpus
from pipeline.preparing.folder_layout import Layout, lay_out
from pipeline.preparing.prepared import Prepared, create_array

MAX_REJECTED = 0.01
COMPARED = 64  # images, when JPEGs are decoded at reduced size
MOST_DIFFERENT = 2.0  # of 255, the mean over an image


@dataclass(frozen=True)
class Options:
    """`size` (height, width), None to keep the size that all images share; `channels` "auto" is 1 only
    if every image is grey; more than 1% of unusable files is an error unless `allow_rejects`; `fit`,
    `jpeg` and `resample` are as in `ImageSpec`."""

    size: tuple[int, int] | None = None
    channels: Literal["auto", "1", "3"] = "auto"
    fit: Fit = "crop"
    allow_rejects: bool = False
    jpeg: Literal["full", "reduced"] = "full"
    resample: Resample = "bilinear"


def decode_images(source: Path, folder: Path, options: Options, limit: float = SECONDS) -> Prepared:
    """Decode every image of `source` into an array below `folder`. One that takes more than `limit` seconds, or kills
    the process that decodes it, is unusable.

    Raises ConvlineError for a source that is not laid out in classes, for images of several sizes without
    `options.size`, for more unusable files than `options` allow, and for JPEGs that differ too much at reduced size.
    """
    if options.jpeg == "reduced" and options.size is None:
        raise ConvlineError("--jpeg reduced needs --image-size: images that keep their size are not reduced")
    paths = [file.path for file in find([str(source)])]
    layout = lay_out(source, paths, folders(source))
    order = _order(layout)
    files = _placed(source, order, Counter(paths))
    height, width = options.size or _first_size(source, files, limit)
    kept = 1 if options.channels == "1" else 3
    spec = ImageSpec(height, width, kept, options.fit, options.resample, jpeg=options.jpeg)
    told: dict[str, Any] = {}
    if options.jpeg == "reduced":
        told = {"reduced_jpegs": compare_reduced(files, len(order), spec, limit)}
    images = create_array(folder / "decoded.npy", (len(order), height, width, spec.channels))
    (folder / "decoded.npy").unlink()  # the map keeps its pages for as long as it is used
    decoded = decode_into(images, files(), spec, native=options.size is None, limit=limit)
    rejects = [
        {"path": order[row], "reason": problem.reason, "detail": problem.detail}
        for row, problem in sorted(decoded.rejects.items())
    ]
    _judge(rejects, len(order), options)
    usable = np.delete(np.arange(len(order)), sorted(decoded.rejects))
    splits = np.array([layout.places[path][0] for path in order])
    number = {label: index for index, label in enumerate(layout.classes)}
    return Prepared(
        images=images,
        labels=np.array([number[layout.places[path][1]] for path in order]),
        rows={split: usable[splits[usable] == split] for split in ("train", "test") if split in splits},
        classes=layout.classes,
        spec=replace(spec, channels=1) if options.channels == "auto" and decoded.all_grey else spec,
        source={**told, "name": source.resolve().name, "sha256": _source_hash(source, order, decoded.digests)},
        rejects=rejects,
    )


Files = Callable[[], Iterator[Placed]]  # the source's files, from the first one on


def _order(layout: Layout) -> list[str]:
    """The images by split, class and name, so that a folder and any archive of it give the same dataset."""

    def key(path: str) -> tuple[tuple[str, str], str, str]:
        return layout.places[path], unicodedata.normalize("NFC", path), path

    return sorted(layout.places, key=key)


def _placed(source: Path, order: list[str], times: Counter[str]) -> Files:
    """The images of `order`, as the source has them; of those that an archive holds several times, the last one."""
    rows = {path: row for row, path in enumerate(order)}
    several = {path: count for path, count in times.items() if count > 1 and path in rows}
    if several:
        log(f"{len(several)} files are in {source} more than once: the last ones are used, such as {min(several)}")

    def files() -> Iterator[Placed]:
        for file in last_of_each_path(find([str(source)]), several):
            if file.path in rows:
                yield Placed(file.path, file.location, row=rows[file.path])

    return files


def _first_size(source: Path, files: Files, limit: float) -> tuple[int, int]:
    size = first_size(files(), limit)
    if size is None:
        raise ConvlineError(f"{source} holds no usable image")
    return size


def compare_reduced(files: Files, total: int, spec: ImageSpec, limit: float = SECONDS) -> dict[str, float]:
    """How far JPEGs decoded at reduced size are from whole ones, over some of a source: the mean |difference| of an
    image's values, from 0 to 255, at most and on average.

    Raises ConvlineError where that is more than anyone would take for the same image.
    """
    stride = max(1, total // COMPARED)
    whole = replace(spec, jpeg="full")

    def difference(batch: list[InputFile]) -> dict[str, float]:
        try:
            data = batch[0].read()
            difference = np.abs(decode(data, spec).astype(int) - decode(data, whole)).mean()
        except ImageError:  # rejected when all are decoded
            return {}
        return {batch[0].path: float(difference)}

    differences: dict[str, float] = {}
    some = (file for file in files() if file.row % stride == 0)
    for one in on_all_cpus(difference, some, -(-total // stride), size=1, limit=limit):
        differences |= one
    if not differences:
        return {"images": 0}
    worst = max(differences, key=lambda path: differences[path])
    if differences[worst] > MOST_DIFFERENT:
        raise ConvlineError(
            f"{worst} decoded at reduced size differs by {differences[worst]:.1f} of 255 on average, more than "
            f"{MOST_DIFFERENT}; leave out --jpeg reduced"
        )
    mean = sum(differences.values()) / len(differences)
    log(f"reduced JPEGs: {len(differences)} images differ by {mean:.2f} of 255, at most by {differences[worst]:.2f}")
    return {"images": len(differences), "mean": mean, "largest": differences[worst]}


def _judge(rejects: list[dict[str, str]], total: int, options: Options) -> None:
    """List the unusable files; stop where they are too many."""
    for reject in rejects:
        log(f"rejected {reject['path']}: {reject['reason']} ({reject['detail']})")
    if rejects:
        log(f"{len(rejects)} of {total} files are unusable")
    if len(rejects) > MAX_REJECTED * total and not options.allow_rejects:
        raise ConvlineError(
            f"{len(rejects)} of {total} files are unusable, more than {MAX_REJECTED:.0%}, such as "
            f"{rejects[0]['path']} ({rejects[0]['reason']}); mend them, or accept it with --allow-rejects"
        )


def _source_hash(source: Path, order: list[str], digests: dict[int, bytes]) -> str:
    """An archive's SHA-256, or one over the names and contents of a folder's files."""
    if source.is_file():
        return sha256(source)
    whole = hashlib.sha256()
    for row, path in enumerate(order):
        whole.update(path.encode("utf-8", "surrogateescape") + b"\0" + digests[row])
    return whole.hexdigest()
