"""How batches of files become entries: on processes that decode, and, on a CPU, run the model as well.

On a CPU each process runs the model on its batch, on one thread: nothing but names and results passes between them,
and no thread waits for another. Before an accelerator they decode into shared memory, and this one runs the model.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

from serving.classifier import Classifier, Entry, pack, try_decode
from serving.errors import ImageError
from serving.found import Found
from serving.images import ImageSpec
from serving.remote import Remote
from serving.workers import Finish, Work, Workers, can_fork

CONNECTIONS = 16  # files that a process fetches at once from behind URLs

Predict = Callable[[Iterator[list[Found]]], Iterator[list[Entry]]]


@contextmanager
def predictor(classifier: Classifier, top_k: int, processes: int) -> Iterator[Predict]:
    """What turns batches of files into their entries, in order; with 0 processes on threads of this one.

    The processes are copies of this one: `classifier` must run on one thread.
    """
    if processes == 0 or not can_fork():
        yield lambda batches: classifier.classify_batches(batches, top_k)
        return
    runs_there = classifier.provider == "cpu"
    work, finish = _on_cpu(classifier, top_k) if runs_there else _on_accelerator(classifier, top_k, processes)

    def try_out(files: list[Found]) -> None:
        for file in files:
            try_decode(file, classifier.spec)

    with Workers(processes, work, try_out) as workers:
        yield lambda batches: workers.map(batches, finish)


Steps = tuple[Work, Finish]  # of the processes, and of this one


def _on_cpu(classifier: Classifier, top_k: int) -> Steps:
    pixels = classifier.buffer()  # each process has its own copy

    def work(files: list[Found], _: int) -> list[Entry]:
        problems = pack(decoded(files, classifier.spec), pixels)
        return classifier.label(files, pixels, problems, top_k)

    return work, lambda _files, entries, _buffer: entries


def _on_accelerator(classifier: Classifier, top_k: int, processes: int) -> Steps:
    room = classifier.buffer()
    shared = mmap.mmap(-1, 2 * processes * room.nbytes)
    pixels = np.frombuffer(shared, np.uint8).reshape(2 * processes, *room.shape)

    def work(files: list[Found], buffer: int) -> list[ImageError | None]:
        return pack(decoded(files, classifier.spec), pixels[buffer])

    def finish(files: list[Found], problems: list[ImageError | None], buffer: int) -> list[Entry]:
        return classifier.label(files, pixels[buffer], problems, top_k)

    return work, finish


def decoded(files: Sequence[Found], spec: ImageSpec) -> Iterable[NDArray[np.uint8] | ImageError]:
    """The pixels of each file, or why it has none; what has to be fetched is fetched at once."""
    if not any(isinstance(file.content, Remote) for file in files):
        return (try_decode(file, spec) for file in files)
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        return list(pool.map(lambda file: try_decode(file, spec), files))
