"""Work on images in processes, as many as there are CPUs, that a broken file may kill or hold up."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from convline.console import progress
from convline.cpus import usable_cpus
from convline.errors import ConvlineError, ImageError
from convline.images import ImageSpec, decode
from convline.inputs.input_file import InputFile
from convline.process_pool import ProcessPool, can_fork
from convline.time_limit import SECONDS

BATCH = 64  # files that a process gets at once
DIED = "while images were decoded, though no file alone ends it; give it more memory"

Result = TypeVar("Result")


@dataclass
class Placed(InputFile):
    """A file, and the row of its image."""

    row: int = 0


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


def on_all_cpus(
    work: Callable[[list[InputFile]], Result],
    files: Iterator[Placed],
    total: int,
    size: int = BATCH,
    limit: float = SECONDS,
) -> Generator[Result, None, None]:
    """What `work` makes of batches of `size` of the `total` files, in their order.

    Each is done by another process than this one. A file that kills its process, or takes more than `limit` seconds
    to decode, is given to `work` again as one that cannot be read. What `work` raises is raised here.
    """
    batches: Iterator[list[InputFile]] = iter(lambda: list(islice(files, size)), [])
    processes = max(1, min(usable_cpus(), -(-total // size)))
    if not can_fork():
        with ThreadPoolExecutor(processes) as pool:
            while some := list(islice(batches, processes)):
                yield from pool.map(work, some)
        return
    with ProcessPool(processes, lambda batch, _: work(batch), work, limit, DIED) as workers:
        yield from workers.map(batches, lambda _files, result, _buffer: result)


def first_size(files: Iterator[Placed], limit: float = SECONDS) -> tuple[int, int] | None:
    """Height and width of the first image that can be decoded; None where there is none."""

    def size_of(batch: list[InputFile]) -> list[tuple[int, int]]:
        try:
            height, width, _ = decode(batch[0].read(), ImageSpec(None, None, 3)).shape
        except ImageError:
            return []
        return [(height, width)]

    with closing(on_all_cpus(size_of, files, total=1, size=1, limit=limit)) as sizes:
        return next(chain.from_iterable(sizes), None)


def decode_into(
    images: NDArray[np.uint8], files: Iterator[Placed], spec: ImageSpec, native: bool, limit: float = SECONDS
) -> Decoded:
    """Decode files into their rows of `images`, which is memory that processes share (a memory map); `native`: all
    must have the size of `spec` already.

    Raises ConvlineError for one that has another.
    """

    def work(batch: list[InputFile]) -> Decoded:
        decoded = Decoded()
        for file in batch:
            assert isinstance(file, Placed)
            decoded.digests[file.row] = b""
            try:
                data = file.read()
                decoded.digests[file.row] = hashlib.sha256(data).digest()
                pixels = decode(data, replace(spec, height=None, width=None) if native else spec)
            except ImageError as problem:
                decoded.rejects[file.row] = problem.without_traceback()
                continue
            if pixels.shape != images.shape[1:]:
                sizes = f"{spec.height}x{spec.width}, {file.path} is {pixels.shape[0]}x{pixels.shape[1]}"
                raise ConvlineError(f"the images differ in size (the first is {sizes}); give --image-size HxW")
            decoded.all_grey &= bool((pixels == pixels[..., :1]).all())
            images[file.row] = pixels
        return decoded

    whole = Decoded()
    with progress("decode", len(images)) as bar:
        for part in on_all_cpus(work, files, len(images), limit=limit):
            whole.add(part)
            bar.advance(bar.task_ids[0], len(part.digests))
    for row in set(range(len(images))) - whole.digests.keys():
        whole.rejects[row] = ImageError("unreadable", "it was there at first, and gone when it was its turn")
        whole.digests[row] = b""
    return whole
