"""The Python API: images in, labels and probabilities out."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from serving.errors import ConvlineError, ImageError
from serving.foreign import Foreign
from serving.found import Found, OnDisk
from serving.images import ImageSpec, decode
from serving.machine import usable_cpus
from serving.model import Provider, open_model

BATCHES_AHEAD = 2


@dataclass(frozen=True)
class Prediction:
    """The k most probable classes of one file, most probable first."""

    path: str
    labels: tuple[str, ...]
    probabilities: tuple[float, ...]


@dataclass(frozen=True)
class Reject:
    """A file that could not be used, with its reason code."""

    path: str
    reason: str
    detail: str


Entry = Prediction | Reject


class Classifier:
    """A served model: `with Classifier("model.onnx") as c: c.classify_files(["cat.jpg"])`.

    `model` is a file or a name in MLflow's registry (`models:/NAME@champion`); `foreign` says what a file made
    elsewhere does not; `threads` defaults to all usable CPUs. Opening validates and self-tests the file. All methods
    may be called from several threads at once. Raises ModelError as `open_model` does.
    """

    def __init__(
        self,
        model: Path | str,
        provider: Provider = "auto",
        threads: int | None = None,
        batch_size: int = 64,
        foreign: Foreign | None = None,
    ) -> None:
        if batch_size < 1:
            raise ConvlineError(f"batch size {batch_size} is not a size; use 1 or more")
        self.model = open_model(model, provider, threads, foreign)
        self.batch_size = self.model.batch or batch_size

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes, in the order of `classify_arrays`' columns."""
        return self.model.classes

    @property
    def spec(self) -> ImageSpec:
        """How files become the pixels that the model takes."""
        return self.model.spec

    @property
    def provider(self) -> str:
        """What the model really runs on: "cpu", "cuda" or "tensorrt"."""
        return self.model.provider

    def classify_arrays(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Probabilities, float32 [n, classes], of uint8 images [n, height, width, channels].

        Raises ConvlineError for another dtype or shape.
        """
        expected = (self.spec.height, self.spec.width, self.spec.channels)
        if images.dtype != np.uint8 or images.shape[1:] != expected:
            raise ConvlineError(
                f"this model takes uint8 [n, {', '.join(map(str, expected))}], not {images.dtype} {list(images.shape)}"
            )
        if not len(images):
            return np.zeros((0, len(self.classes)), np.float32)
        batches = (images[i : i + self.batch_size] for i in range(0, len(images), self.batch_size))
        return np.concatenate([self.model.run_padded(batch, self.batch_size)[0] for batch in batches])

    def classify_files(self, paths: Iterable[Path | str], top_k: int = 1) -> list[Prediction | Reject]:
        """One entry a path, in order: a Prediction, or a Reject where the file could not be used.

        Files are decoded on threads while the model runs. Raises ConvlineError for more classes than there are.
        """
        self.check_top_k(top_k)
        files = (Found(str(path), OnDisk(str(path))) for path in paths)
        return [entry for entries in self.classify_batches(batched(files, self.batch_size), top_k) for entry in entries]

    def classify_batches(self, batches: Iterable[Sequence[Found]], top_k: int = 1) -> Iterator[list[Entry]]:
        """The entries of batches of at most `batch_size` files, in order; the next ones are decoded meanwhile."""
        ahead: deque[tuple[Sequence[Found], list[Future[NDArray[np.uint8] | ImageError]]]] = deque()
        with ThreadPoolExecutor(usable_cpus()) as pool:
            for batch in batches:
                ahead.append((batch, [pool.submit(try_decode, file, self.spec) for file in batch]))
                if len(ahead) > BATCHES_AHEAD:
                    files, decoded = ahead.popleft()
                    yield self._label(files, [future.result() for future in decoded], top_k)
            for files, decoded in ahead:
                yield self._label(files, [future.result() for future in decoded], top_k)

    def _label(
        self, files: Sequence[Found], decoded: Sequence[NDArray[np.uint8] | ImageError], top_k: int
    ) -> list[Entry]:
        pixels = self.buffer()
        problems = pack(decoded, pixels)
        return self.label(files, pixels, problems, top_k)

    def buffer(self) -> NDArray[np.uint8]:
        """Room for the pixels of one batch: uint8 [batch, height, width, channels], all 0."""
        return np.zeros((self.batch_size, self.spec.height or 0, self.spec.width or 0, self.spec.channels), np.uint8)

    def label(
        self, files: Sequence[Found], pixels: NDArray[np.uint8], problems: Sequence[ImageError | None], top_k: int
    ) -> list[Entry]:
        """The entries of one batch as `pack` left it; a file that failed becomes a Reject in its own place."""
        usable = sum(problem is None for problem in problems)
        probability = self.model.run(pixels)[0][:usable] if usable else np.zeros((0, len(self.classes)), np.float32)
        # ties: the earlier class first
        best = probability.argmax(1)[:, None] if top_k == 1 else np.argsort(-probability, 1, "stable")[:, :top_k]
        rows = zip(best.tolist(), np.take_along_axis(probability, best, 1), strict=True)
        return [
            Reject(file.path, problem.reason, problem.detail) if problem else self._prediction(file.path, *next(rows))
            for file, problem in zip(files, problems, strict=True)
        ]

    def _prediction(self, path: str, best: list[int], probabilities: NDArray[np.float32]) -> Prediction:
        # str() of a float32 is its shortest exact form: 0.9987123, not 0.9987123012542725
        return Prediction(path, tuple(self.classes[i] for i in best), tuple(float(str(p)) for p in probabilities))

    def check_top_k(self, top_k: int) -> None:
        """Raises ConvlineError for less than one class, or more than there are."""
        if not 1 <= top_k <= len(self.classes):
            raise ConvlineError(
                f"--top-k {top_k}: the model knows {len(self.classes)} classes; ask for 1 to {len(self.classes)}"
            )

    def __enter__(self) -> Classifier:
        return self

    def __exit__(self, *_: object) -> None:
        """Release the session, its threads and its memory."""
        del self.model


def try_decode(file: Found, spec: ImageSpec) -> NDArray[np.uint8] | ImageError:
    """The file's pixels, or why it has none."""
    try:
        return decode(file.read(), spec)
    except ImageError as error:
        return error.to_keep()


def pack(decoded: Iterable[NDArray[np.uint8] | ImageError], pixels: NDArray[np.uint8]) -> list[ImageError | None]:
    """Put what was decoded, as it comes, into the first rows of `pixels`; the rest becomes 0. Returns the failures."""
    problems: list[ImageError | None] = []
    usable = 0
    for image in decoded:
        if isinstance(image, ImageError):
            problems.append(image)
        else:
            pixels[usable] = image
            problems.append(None)
            usable += 1
    pixels[usable:] = 0
    return problems


def batched(files: Iterable[Found], size: int) -> Iterator[list[Found]]:
    """Lists of `size` files, the last one of what is left."""
    files = iter(files)
    while batch := list(islice(files, size)):
        yield batch
