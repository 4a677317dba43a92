"""Decodes image files in parallel, in a pool of processes; a file that crashes or hangs its decoder is rejected."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from convline.console import progress
from convline.cpus import usable_cpus
from convline.errors import ConvlineError, ImageError
from convline.images import ImageSpec, decode, decode_with_size
from convline.inputs.input_file import InMemory, InputFile
from convline.process_pool import open_pool
from convline.time_limit import SECONDS
from pipeline.preparing.mapped_arrays import release_memory

FILES_PER_TASK = 64
BYTES_PER_TASK = 2**24  # of contents that are sent to a process, which copies them twice
ADVICE = "while decoding images, though each of them can be decoded alone; give it more memory"

Result = TypeVar("Result")


@dataclass
class FileForRow(InputFile):
    """A file, and the row of the image array that its pixels go to."""

    row: int = 0


Files = Callable[[], Iterator[FileForRow]]  # iterates over the files of a source, from the first one each time


@dataclass
class DecodingResult:
    """By row, the rejects, the SHA-256 of each file and the size of each image, (height, width), upright and before it
    was resized; and whether every image was grey."""

    rejects: dict[int, ImageError] = field(default_factory=dict)
    is_all_grey: bool = True
    digests: dict[int, bytes] = field(default_factory=dict)
    sizes: dict[int, tuple[int, int]] = field(default_factory=dict)

    def add(self, other: DecodingResult) -> None:
        self.rejects |= other.rejects
        self.is_all_grey &= other.is_all_grey
        self.digests |= other.digests
        self.sizes |= other.sizes


def map_in_processes(
    work: Callable[[list[InputFile]], Result],
    files: Iterator[FileForRow],
    count: int,
    files_per_task: int = FILES_PER_TASK,
    time_limit: float = SECONDS,
) -> Generator[Result, None, None]:
    """The results of `work` for lists of up to `files_per_task` files, `count` files in all, in order.

    `work` runs in other processes, one per CPU (in threads where processes cannot be forked). A list with a file that
    ends its process, or takes more than `time_limit` seconds to decode, is given to `work` again, with that file
    replaced by one that raises ImageError when read. Exceptions that `work` raises are raised here.
    """
    batches = _batches(files, files_per_task)
    processes = max(1, min(usable_cpus(), -(-count // files_per_task)))
    with open_pool(processes, lambda batch, _: work(batch), work, time_limit, ADVICE) as pool:
        yield from pool.map(batches, lambda _files, result, _buffer: result)


def _batches(files: Iterator[FileForRow], files_per_task: int) -> Iterator[list[InputFile]]:
    batch: list[InputFile] = []
    content = 0
    for file in files:
        batch.append(file)
        content += len(file.location.data) if isinstance(file.location, InMemory) else 0
        if len(batch) == files_per_task or content > BYTES_PER_TASK:
            yield batch
            batch, content = [], 0
    if batch:
        yield batch


def size_of_first_image(files: Iterator[FileForRow], time_limit: float = SECONDS) -> tuple[int, int] | None:
    """Height and width of the first image that can be decoded; None where there is none."""

    def size_of(batch: list[InputFile]) -> list[tuple[int, int]]:
        try:
            height, width, _ = decode(batch[0].read(), ImageSpec(None, None, 3)).shape
        except ImageError:
            return []
        return [(height, width)]

    with closing(map_in_processes(size_of, files, count=1, files_per_task=1, time_limit=time_limit)) as sizes:
        return next(chain.from_iterable(sizes), None)


def decode_into(
    images: NDArray[np.uint8],
    files: Iterator[FileForRow],
    spec: ImageSpec,
    keep_size: bool,
    time_limit: float = SECONDS,
    done: DecodingResult | None = None,
    record: Callable[[DecodingResult], None] = lambda _: None,
) -> DecodingResult:
    """Decode files into their rows of `images`, which must be memory that processes share (a memory map).

    With `keep_size` images are not resized; ConvlineError is raised for one that does not have the size of `spec`.
    The rows of `done` are left as they are. `record` is called with the result of each batch, once it is in `images`.
    """

    def decode_batch(batch: list[InputFile]) -> DecodingResult:
        result = DecodingResult()
        for file in batch:
            assert isinstance(file, FileForRow)
            result.digests[file.row] = b""
            try:
                data = file.read()
                result.digests[file.row] = hashlib.sha256(data).digest()
                pixels, size = decode_with_size(data, replace(spec, height=None, width=None) if keep_size else spec)
            except ImageError as problem:
                result.rejects[file.row] = problem.without_traceback()
                continue
            if pixels.shape != images.shape[1:]:
                sizes = f"{spec.height}x{spec.width}, {file.path} is {pixels.shape[0]}x{pixels.shape[1]}"
                raise ConvlineError(f"the images differ in size (the first is {sizes}); give --image-size HxW")
            result.is_all_grey &= bool((pixels == pixels[..., :1]).all())
            images[file.row] = pixels
            result.sizes[file.row] = size
        release_memory(images)
        return result

    total = done or DecodingResult()
    n_left = len(images) - len(total.digests)
    left = (file for file in files if file.row not in total.digests)
    results = map_in_processes(decode_batch, left, n_left, time_limit=time_limit)
    with closing(results), progress("decode", n_left) as bar:
        for result in results:
            record(result)
            total.add(result)
            bar.advance(bar.task_ids[0], len(result.digests))
    for row in set(range(len(images))) - total.digests.keys():
        total.rejects[row] = ImageError("unreadable", "it was removed after the source was listed")
        total.digests[row] = b""
    return total
