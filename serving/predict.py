"""How worker processes share the work of a classification: decoding images and running the model.

On a CPU each process takes a batch, decodes it and runs the model on it, on one thread: only names and results pass
between processes, and no thread waits for another. With an accelerator, the processes decode into shared memory and
this process runs the model (serving/bound_runs.py). A job of a single batch runs in a similar way: each process
decodes a part of the batch.
"""

from __future__ import annotations

import math
import mmap
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from convline.errors import ImageError
from convline.images import ImageSpec
from convline.inputs.input_file import InputFile
from convline.inputs.remote_files import RemoteFile
from convline.process_pool import Finish, Pool, Work, open_pool
from convline.time_limit import SECONDS
from serving.bound_runs import BoundRuns, Outputs, one_behind
from serving.classifier import Classifier, batched, pack, try_decode
from serving.model import probe_images
from serving.records import Entry

CONNECTIONS = 16  # files that a process downloads at once

BatchT = TypeVar("BatchT", bound=list[InputFile])


class PredictBatches(Protocol):
    """Classifies batches of files."""

    def __call__(self, batches: Iterator[BatchT], /) -> Iterator[tuple[BatchT, list[Entry]]]:
        """Each batch, in order, with the entries of its files."""


@contextmanager
def batch_predictor(
    classifier: Classifier, top_k: int, processes: int, shares_batches: bool = False, limit: float = SECONDS
) -> Iterator[PredictBatches]:
    """A function that classifies batches on `processes` processes; if there are none, on threads of this process.

    The processes are copies of this one, so `classifier` must run on one thread, unless `shares_batches` is True: then
    each process decodes a part of each batch, and the model runs here. An image that takes longer than `limit` seconds
    to decode becomes a Reject.
    """
    if processes == 0:
        yield lambda batches: classifier.label_batches(batches, top_k)
        return

    def try_out(files: list[InputFile]) -> None:
        for file in files:
            try_decode(file, classifier.spec)

    if shares_batches:
        buffers = _shared_buffers(classifier, -(-classifier.batch_size // processes), processes)
        with open_pool(processes, _decoder(classifier, buffers), try_out, limit) as workers:
            yield lambda batches: (
                (batch, _share_batch(classifier, workers, buffers, batch, top_k)) for batch in batches
            )
        return
    if classifier.provider == "cpu":
        work, finish = _on_cpu(classifier, top_k)
        with open_pool(processes, work, try_out, limit) as workers:
            yield lambda batches: workers.map(batches, finish)
        return
    buffers = _shared_buffers(classifier, classifier.batch_size, processes)
    with (
        _checked_runs(classifier) as runs,
        open_pool(processes, _decoder(classifier, buffers), try_out, limit) as workers,
    ):
        yield lambda batches: _on_accelerator(classifier, workers.map(batches, _starter(runs, buffers)), top_k)


Steps = tuple[Work, Finish]  # what a worker process does with a batch, and what this process does with the result


def _on_cpu(classifier: Classifier, top_k: int) -> Steps:
    local = threading.local()  # a buffer per process, or per thread where there is no fork

    def work(files: list[InputFile], _: int) -> list[Entry]:
        if not hasattr(local, "pixels"):
            local.pixels = classifier.buffer()
        problems = pack(decode_files(files, classifier.spec), local.pixels)
        return classifier.label(files, local.pixels, problems, top_k)

    return work, lambda batch, entries, _buffer: (batch, entries)


def _checked_runs(classifier: Classifier) -> BoundRuns:
    """Raises ModelError where they give other results than `classifier.run`."""
    shape = classifier.buffer().shape
    runs = BoundRuns(classifier.model.session, classifier.outputs, shape)
    images = np.resize(probe_images(classifier.spec), shape)
    runs.check(images, list(classifier.run(images)))
    return runs


Started = tuple[BatchT, list[ImageError | None], Future[Outputs] | None]  # files, their problems, the model's outputs


def _starter(runs: BoundRuns, buffers: NDArray[np.uint8]) -> Finish:
    """What starts the model on a decoded batch, unless no file of it is usable."""

    def start(batch: BatchT, problems: list[ImageError | None], buffer: int) -> Started[BatchT]:
        return batch, problems, runs.start(buffers[buffer]) if None in problems else None

    return start


def _on_accelerator(
    classifier: Classifier, started: Iterable[Started[BatchT]], top_k: int
) -> Iterator[tuple[BatchT, list[Entry]]]:
    """Each batch with its entries, which are made while the model runs on the next batch."""
    for batch, problems, outputs in one_behind(started):
        yield batch, classifier.entries(batch, problems, outputs.result() if outputs else (), top_k)


def _decoder(classifier: Classifier, buffers: NDArray[np.uint8]) -> Work:
    return lambda files, buffer: pack(decode_files(files, classifier.spec), buffers[buffer])


def _share_batch(
    classifier: Classifier, workers: Pool, buffers: NDArray[np.uint8], batch: list[InputFile], top_k: int
) -> list[Entry]:
    """The entries of one batch; each process decodes a part of it."""

    def finish(
        _: list[InputFile], problems: list[ImageError | None], buffer: int
    ) -> list[NDArray[np.uint8] | ImageError]:
        images = iter(buffers[buffer].copy())
        return [problem or next(images) for problem in problems]

    pixels = classifier.buffer()
    size = -(-len(batch) // (len(buffers) // 2))
    problems = pack((image for part in workers.map(batched(batch, size), finish) for image in part), pixels)
    return classifier.label(batch, pixels, problems, top_k)


def _shared_buffers(classifier: Classifier, images: int, processes: int) -> NDArray[np.uint8]:
    """Memory that all processes share: two buffers a process, each with the pixels of `images` images.

    uint8 [2 * processes, images, height, width, channels].
    """
    shape = (2 * processes, images, *classifier.buffer().shape[1:])
    return np.frombuffer(mmap.mmap(-1, math.prod(shape)), np.uint8).reshape(shape)


def decode_files(files: Sequence[InputFile], spec: ImageSpec) -> Iterable[NDArray[np.uint8] | ImageError]:
    """The pixels of each file, or the error that says why there are none; remote files are downloaded in parallel."""
    if not any(isinstance(file.location, RemoteFile) for file in files):
        return (try_decode(file, spec) for file in files)
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        return list(pool.map(lambda file: try_decode(file, spec), files))
