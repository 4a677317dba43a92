"""Decodes a folder of images, or an archive of one, into an array, on all CPUs."""

from __future__ import annotations

import hashlib
import multiprocessing
import signal
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.engine.layout import lay_out
from pipeline.engine.prepared import Prepared, create_array
from serving.console import log, progress
from serving.errors import ConvlineError, ImageError
from serving.files import sha256
from serving.found import Found
from serving.images import Fit, ImageSpec, Resample, decode
from serving.listing import find, folders, once_each
from serving.machine import usable_cpus

MAX_REJECTED = 0.01
COMPARED = 64  # images, when JPEGs are decoded at reduced size
MOST_DIFFERENT = 2.0  # of 255, the mean over an image
CHUNK = 256  # images a worker process decodes at once: passing them costs little then


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


@dataclass
class Decoded:
    """What decoding met: rejects by row, whether every image was grey, the SHA-256 of each file by row."""

    rejects: dict[int, ImageError] = field(default_factory=dict)
    all_grey: bool = True
    digests: dict[int, bytes] = field(default_factory=dict)

    def add(self, other: Decoded) -> None:
        self.rejects |= other.rejects
        self.all_grey &= other.all_grey
        self.digests |= other.digests


def decode_images(source: Path, folder: Path, options: Options) -> Prepared:
    """Decode every image of `source` into an array below `folder`.

    Raises ConvlineError for a source that is not laid out in classes, for images of several sizes without
    `options.size`, for more unusable files than `options` allow, and for JPEGs that differ too much at reduced size.
    """
    if options.jpeg == "reduced" and options.size is None:
        raise ConvlineError("--jpeg reduced needs --image-size: images that keep their size are not reduced")
    found = Counter(file.path for file in find([str(source)]))
    if repeated := [path for path, count in found.items() if count > 1]:
        log(f"{len(repeated)} paths stand more than once in {source}, such as {repeated[0]}; the last file is used")
    layout = lay_out(source, found, folders(source))
    # by split, class and name: a folder and any archive of it give the same dataset
    order = sorted(layout.places, key=lambda path: (layout.places[path], path.encode("utf-8", "surrogateescape")))
    rows = {path: row for row, path in enumerate(order)}
    height, width = options.size or _first_size(source, rows)
    kept = 1 if options.channels == "1" else 3
    spec = ImageSpec(height, width, kept, options.fit, options.resample, jpeg=options.jpeg)
    told: dict[str, Any] = {"reduced_jpegs": compare_reduced(source, rows, spec)} if options.jpeg == "reduced" else {}
    images = create_array(folder / "decoded.npy", (len(order), height, width, spec.channels))
    files = once_each(find([str(source)]), found)
    decoded = _decode_all(files, folder / "decoded.npy", rows, spec, native=options.size is None)
    (folder / "decoded.npy").unlink()  # the map keeps its pages for as long as it is used
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


def compare_reduced(source: Path, rows: dict[str, int], spec: ImageSpec) -> dict[str, float]:
    """How far JPEGs decoded at reduced size are from whole ones, over some of a source: the mean |difference| of an
    image's values, from 0 to 255, at most and on average.

    Raises ConvlineError where that is more than anyone would take for the same image.
    """
    stride = max(1, len(rows) // COMPARED)
    whole = replace(spec, jpeg="full")
    differences = {}
    for file in find([str(source)]):
        if rows.get(file.path, 1) % stride:
            continue
        with suppress(ImageError):  # rejected when all are decoded
            data = file.read()
            differences[file.path] = float(np.abs(decode(data, spec).astype(int) - decode(data, whole)).mean())
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


def _first_size(source: Path, rows: dict[str, int]) -> tuple[int, int]:
    """Height and width of the first usable image."""
    for file in find([str(source)]):
        if file.path in rows:
            try:
                height, width, _ = decode(file.read(), ImageSpec(None, None, 3)).shape
            except ImageError:
                continue
            return height, width
    raise ConvlineError(f"{source} holds no usable image")


def _decode_all(files: Iterable[Found], array: Path, rows: dict[str, int], spec: ImageSpec, native: bool) -> Decoded:
    decoded = Decoded()
    work = ((rows[file.path], file) for file in files if file.path in rows)
    with progress("decode", len(rows)) as bar:
        for part in _on_all_cpus(work, array, spec, native, len(rows)):
            decoded.add(part)
            bar.advance(bar.task_ids[0], len(part.digests))
    return decoded


def _on_all_cpus(
    work: Iterator[tuple[int, Found]], array: Path, spec: ImageSpec, native: bool, total: int
) -> Iterator[Decoded]:
    """Chunks of work on one process a CPU (threads would share Python's lock), few in flight."""
    chunks = iter(lambda: list(islice(work, CHUNK)), [])
    workers = min(usable_cpus(), total // CHUNK)
    if workers < 2:
        yield from (_decode_chunk(chunk, array, spec, native) for chunk in chunks)
        return
    running: deque[Future[Decoded]] = deque()
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _leave_ctrl_c_to_the_parent) as pool:
        for chunk in chunks:
            running.append(pool.submit(_decode_chunk, chunk, array, spec, native))
            if len(running) > 2 * workers:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()


def _leave_ctrl_c_to_the_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _decode_chunk(chunk: Iterable[tuple[int, Found]], array: Path, spec: ImageSpec, native: bool) -> Decoded:
    """Decode some files into their rows of `array`; `native`: all must have the size of `spec` already."""
    images = np.load(array, mmap_mode="r+")
    decoded = Decoded()
    for row, file in chunk:
        decoded.digests[row] = b""
        try:
            data = file.read()
            decoded.digests[row] = hashlib.sha256(data).digest()
            pixels = decode(data, replace(spec, height=None, width=None) if native else spec)
        except ImageError as problem:
            decoded.rejects[row] = problem.to_keep()
            continue
        if pixels.shape != images.shape[1:]:
            sizes = f"{spec.height}x{spec.width}, {file.path} is {pixels.shape[0]}x{pixels.shape[1]}"
            raise ConvlineError(f"the images differ in size (the first is {sizes}); give --image-size HxW")
        decoded.all_grey &= _is_grey(pixels)
        images[row] = pixels
    return decoded


def _is_grey(pixels: NDArray[np.uint8]) -> bool:
    return bool((pixels == pixels[..., :1]).all())


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
