"""How batches of files become entries: on processes that decode, and, on a CPU, run the model as well.

On a CPU each process runs the model on its batch, on one thread: nothing but names and results passes between them,
and no thread waits for another. Before an accelerator they decode into shared memory, and this one runs the model. So
they do for the few files of a single batch, which they share.
"""

from __future__ import annotations

import math
import mmap
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

from convline.errors import ImageError
from convline.images import ImageSpec
from convline.inputs.input_file import InputFile
from convline.inputs.remote_files import RemoteFile
from convline.process_pool import Finish, Pool, Work, open_pool
from convline.time_limit import SECONDS
from serving.classifier import Classifier, batched, pack, try_decode
from serving.records import Entry

CONNECTIONS = 16  # files that a process fetches at once from behind URLs

Predict = Callable[[Iterator[list[InputFile]]], Iterator[list[Entry]]]


@contextmanager
def predictor(
    classifier: Classifier, top_k: int, processes: int, shares_batches: bool = False, limit: float = SECONDS
) -> Iterator[Predict]:
    """What turns batches of files into their entries, in order; on threads of this process if `processes` is 0.

    The processes are copies of this one: `classifier` must run on one thread, unless they share each batch. An image
    that takes longer than `limit` seconds to decode becomes a Reject.
    """
    if processes == 0:
        yield lambda batches: classifier.classify_batches(batches, top_k)
        return

    def try_out(files: list[InputFile]) -> None:
        for file in files:
            try_decode(file, classifier.spec)

    if shares_batches:
        parts = _shared(classifier, -(-classifier.batch_size // processes), processes)
        with open_pool(processes, _decoder(classifier, parts), try_out, limit) as workers:
            yield lambda batches: (_together(classifier, workers, parts, batch, top_k) for batch in batches)
        return
    runs_there = classifier.provider == "cpu"
    work, finish = _on_cpu(classifier, top_k) if runs_there else _on_accelerator(classifier, top_k, processes)
    with open_pool(processes, work, try_out, limit) as workers:
        yield lambda batches: workers.map(batches, finish)


Steps = tuple[Work, Finish]  # of the processes, and of this one


def _on_cpu(classifier: Classifier, top_k: int) -> Steps:
    own = threading.local()  # a buffer per process, or per thread where there is no fork

    def work(files: list[InputFile], _: int) -> list[Entry]:
        if not hasattr(own, "pixels"):
            own.pixels = classifier.buffer()
        problems = pack(decoded(files, classifier.spec), own.pixels)
        return classifier.label(files, own.pixels, problems, top_k)

    return work, lambda _files, entries, _buffer: entries


def _on_accelerator(classifier: Classifier, top_k: int, processes: int) -> Steps:
    pixels = _shared(classifier, classifier.batch_size, processes)

    def finish(files: list[InputFile], problems: list[ImageError | None], buffer: int) -> list[Entry]:
        return classifier.label(files, pixels[buffer], problems, top_k)

    return _decoder(classifier, pixels), finish


def _decoder(classifier: Classifier, pixels: NDArray[np.uint8]) -> Work:
    return lambda files, buffer: pack(decoded(files, classifier.spec), pixels[buffer])


def _together(
    classifier: Classifier, workers: Pool, parts: NDArray[np.uint8], batch: list[InputFile], top_k: int
) -> list[Entry]:
    """The entries of one batch, of which each process decodes a part."""

    def finish(
        _: list[InputFile], problems: list[ImageError | None], buffer: int
    ) -> list[NDArray[np.uint8] | ImageError]:
        images = iter(parts[buffer].copy())
        return [problem or next(images) for problem in problems]

    pixels = classifier.buffer()
    size = -(-len(batch) // (len(parts) // 2))
    problems = pack((image for part in workers.map(batched(batch, size), finish) for image in part), pixels)
    return classifier.label(batch, pixels, problems, top_k)


def _shared(classifier: Classifier, images: int, processes: int) -> NDArray[np.uint8]:
    """Room for the pixels of so many images in each buffer of the processes, which all of them and this one see."""
    shape = (2 * processes, images, *classifier.buffer().shape[1:])
    return np.frombuffer(mmap.mmap(-1, math.prod(shape)), np.uint8).reshape(shape)


def decoded(files: Sequence[InputFile], spec: ImageSpec) -> Iterable[NDArray[np.uint8] | ImageError]:
    """The pixels of each file, or why it has none; what has to be fetched is fetched at once."""
    if not any(isinstance(file.location, RemoteFile) for file in files):
        return (try_decode(file, spec) for file in files)
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        return list(pool.map(lambda file: try_decode(file, spec), files))
