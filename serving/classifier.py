"""The Python API: images in, labels and probabilities out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from serving.errors import ConvlineError, ImageError
from serving.foreign import Foreign
from serving.images import ImageSpec, decode
from serving.listing import Found
from serving.model import Provider, open_model


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


class Classifier:
    """A served model: `with Classifier("model.onnx") as c: c.classify_files(["cat.jpg"])`.

    `model` is a file or a name in MLflow's registry (`models:/NAME@champion`); `foreign` says what a file made
    elsewhere does not. Opening validates and self-tests the file. Methods may be called from several threads.
    Raises ModelError as `open_model` does.
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
        return self.model.classes

    @property
    def spec(self) -> ImageSpec:
        return self.model.spec

    @property
    def provider(self) -> str:
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
        """One entry a path, in order: a Prediction, or a Reject where the file could not be used."""
        entries: list[Prediction | Reject] = []
        files = [Found(str(path), file=Path(path)) for path in paths]
        for start in range(0, len(files), self.batch_size):
            batch = files[start : start + self.batch_size]
            entries += self.label(batch, [try_decode(file, self.spec) for file in batch], top_k)
        return entries

    def label(
        self, files: Sequence[Found], decoded: Sequence[NDArray[np.uint8] | ImageError], top_k: int
    ) -> list[Prediction | Reject]:
        """Classify one batch of decoded files; a file that failed becomes a Reject in its own place."""
        usable = [pixels for pixels in decoded if not isinstance(pixels, ImageError)]
        rows = iter(self.classify_arrays(np.stack(usable)) if usable else ())
        return [
            Reject(file.path, pixels.reason, pixels.detail)
            if isinstance(pixels, ImageError)
            else self._prediction(file.path, next(rows), top_k)
            for file, pixels in zip(files, decoded, strict=True)
        ]

    def _prediction(self, path: str, probability: NDArray[np.float32], top_k: int) -> Prediction:
        best = np.argsort(-probability, kind="stable")[:top_k]  # ties: the earlier class first
        # str() of a float32 is its shortest exact form: 0.9987123, not 0.9987123012542725
        return Prediction(path, tuple(self.classes[i] for i in best), tuple(float(str(probability[i])) for i in best))

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
        return error
