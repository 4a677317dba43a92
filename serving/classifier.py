"""`Classifier`, the Python API: images in, labels and probabilities out."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from convline.cpus import usable_cpus
from convline.errors import ConvlineError, ImageError
from convline.images import ImageSpec, decode, fit_pixels
from convline.inputs.input_file import InputFile
from serving.batch_size import SERVING_BATCH
from serving.external_model import ExternalModel
from serving.image_inputs import DecodedImage, ImageInput, as_input_files
from serving.model import open_model
from serving.records import UNSURE, Entry, Prediction, Reject, decide
from serving.session import OUTPUTS, UNFAMILIAR, Provider
from serving.tables import optional_columns

BATCHES_AHEAD = 2
MAX_LISTED = 10  # images that an error message lists
NOT_FINITE = ImageError("not-finite", "the model gives scores for it that are not finite")

BatchT = TypeVar("BatchT", bound=Sequence[InputFile])


class Classifier:
    """A served model: `with Classifier("model.onnx") as c: c.classify(["cat.jpg"])`.

    `model` is a file or a name in MLflow's registry (`models:/NAME@champion`); `external` describes an ONNX file of
    another tool; `threads` defaults to all usable CPUs. `threshold`, by default that of the file if it has one, is the
    probability below which a prediction's `decision` is "unsure". With `unfamiliar`, predictions tell how far an image
    is from the training images; the file must have been exported with that. Opening validates and self-tests the file.
    All methods may be called from several threads at once. Raises ModelError as `open_model` does.
    """

    def __init__(
        self,
        model: Path | str,
        provider: Provider = "auto",
        threads: int | None = None,
        batch_size: int = SERVING_BATCH,
        external: ExternalModel | None = None,
        threshold: float | None = None,
        unfamiliar: bool = False,
    ) -> None:
        if batch_size < 1:
            raise ConvlineError(f"batch size {batch_size} is not a size; use 1 or more")
        if threshold is not None and not 0 <= threshold <= 1:
            raise ConvlineError(f"threshold {threshold:g} is not a probability; use a number from 0 to 1")
        self.model = open_model(model, provider, threads, external)
        self.batch_size = self.model.batch or batch_size
        self.threshold = self.model.threshold if threshold is None else threshold
        self.unfamiliar = unfamiliar
        if unfamiliar and not self.model.tells_unfamiliar:
            raise ConvlineError(
                f"{model} does not tell how unfamiliar images are; export it again with `pipeline export --unfamiliar`"
            )
        if self.threshold is not None and UNSURE in self.classes:
            raise ConvlineError(
                f"{model} has a class named {UNSURE}, which is also the decision below a threshold; give the class "
                "another name, or classify without a threshold"
            )

    @property
    def optional_columns(self) -> tuple[str, ...]:
        """Those of OPTIONAL_COLUMNS for which predictions have a value."""
        return optional_columns(self.threshold, self.unfamiliar)

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes, in the order of `classify_arrays`' columns."""
        return self.model.classes

    @property
    def spec(self) -> ImageSpec:
        """How files are decoded to the pixels that the model takes."""
        return self.model.spec

    @property
    def provider(self) -> str:
        """The provider that the model runs on: "cpu", "cuda" or "tensorrt"."""
        return self.model.provider

    def classify_arrays(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Probabilities, float32 [n, classes], of uint8 images [n, height, width, channels] of the model's own size.

        Raises ConvlineError for another dtype or shape, and for images whose scores are not finite; the message lists
        them.
        """
        expected = (self.spec.height, self.spec.width, self.spec.channels)
        if images.dtype != np.uint8 or images.shape[1:] != expected:
            raise ConvlineError(
                f"this model takes uint8 [n, {', '.join(map(str, expected))}], not {images.dtype} {list(images.shape)}"
            )
        if not len(images):
            return np.zeros((0, len(self.classes)), np.float32)
        batches = (images[i : i + self.batch_size] for i in range(0, len(images), self.batch_size))
        results = [self.model.run_padded(batch, self.batch_size) for batch in batches]
        if wrong := np.flatnonzero(~np.concatenate([_finite(*result) for result in results])).tolist():
            listed = ", ".join(map(str, wrong[:MAX_LISTED])) + (", …" if len(wrong) > MAX_LISTED else "")
            raise ConvlineError(f"the model gives scores that are not finite for {len(wrong)} images: {listed}")
        return np.concatenate([probability for probability, _ in results])

    def classify(self, images: Iterable[ImageInput], top_k: int = 1) -> list[Prediction | Reject]:
        """One entry per image, in order: a Prediction, or a Reject for an image that cannot be used.

        A `str` or `Path` is the path of a file, `bytes` are an encoded file; a Pillow image and a uint8 array
        ([height, width] grey, or [height, width, 1, 3 or 4]: grey, RGB, RGBA) are pixels of any size. An image without
        a path is named by its index, from 0: "image 3". Files are decoded on threads while the model runs. Raises
        TypeError for anything else, also for a single image, and ConvlineError if `top_k` exceeds the number of
        classes.
        """
        self.check_top_k(top_k)
        files = as_input_files(images)
        return [entry for entries in self.classify_batches(batched(files, self.batch_size), top_k) for entry in entries]

    def classify_files(self, paths: Iterable[ImageInput], top_k: int = 1) -> list[Prediction | Reject]:
        """The same as `classify`."""
        return self.classify(paths, top_k)

    def classify_batches(self, batches: Iterable[Sequence[InputFile]], top_k: int = 1) -> Iterator[list[Entry]]:
        """The entries of batches of at most `batch_size` files, in order; the next batches are decoded meanwhile."""
        for _, entries in self.label_batches(batches, top_k):
            yield entries

    def label_batches(self, batches: Iterable[BatchT], top_k: int = 1) -> Iterator[tuple[BatchT, list[Entry]]]:
        """As `classify_batches`, each batch together with its entries."""
        ahead: deque[tuple[BatchT, list[Future[NDArray[np.uint8] | ImageError]]]] = deque()
        with ThreadPoolExecutor(usable_cpus()) as pool:
            for batch in batches:
                ahead.append((batch, [pool.submit(try_decode, file, self.spec) for file in batch]))
                if len(ahead) > BATCHES_AHEAD:
                    yield self._label_decoded(*ahead.popleft(), top_k)
            while ahead:
                yield self._label_decoded(*ahead.popleft(), top_k)

    def _label_decoded(
        self, batch: BatchT, decoded: Sequence[Future[NDArray[np.uint8] | ImageError]], top_k: int
    ) -> tuple[BatchT, list[Entry]]:
        pixels = self.buffer()
        problems = pack([future.result() for future in decoded], pixels)
        return batch, self.label(batch, pixels, problems, top_k)

    def buffer(self) -> NDArray[np.uint8]:
        """A buffer for the pixels of one batch: uint8 [batch, height, width, channels], all 0."""
        return np.zeros((self.batch_size, self.spec.height or 0, self.spec.width or 0, self.spec.channels), np.uint8)

    def label(
        self, files: Sequence[InputFile], pixels: NDArray[np.uint8], problems: Sequence[ImageError | None], top_k: int
    ) -> list[Entry]:
        """The entries of one batch, of what `pack` filled in and returned; a file with a problem becomes a Reject in
        its own place.
        """
        return self.entries(files, problems, self.run(pixels) if None in problems else (), top_k)

    def run(self, pixels: NDArray[np.uint8]) -> Sequence[NDArray[np.float32]]:
        """The outputs of the model that predictions need, `outputs`, for a batch."""
        return self.model.run_all(pixels) if self.unfamiliar else self.model.run(pixels)

    @property
    def outputs(self) -> list[str]:
        """The names of the outputs of the model that predictions need."""
        return [*OUTPUTS, UNFAMILIAR] if self.unfamiliar else OUTPUTS

    def entries(
        self,
        files: Sequence[InputFile],
        problems: Sequence[ImageError | None],
        outputs: Sequence[NDArray[np.float32]],
        top_k: int,
    ) -> list[Entry]:
        """As `label`, of the `outputs` for the pixels; they are not needed where no file is usable."""
        usable = sum(problem is None for problem in problems)
        rows = self._rows(outputs, usable, top_k) if usable else iter(())
        entries: list[Entry] = []
        for file, problem in zip(files, problems, strict=True):
            row = next(rows) if problem is None else None
            if problem is not None:
                entries.append(Reject(file.path, problem.reason, problem.detail))
            elif row is None:
                entries.append(Reject(file.path, NOT_FINITE.reason, NOT_FINITE.detail))
            else:
                labels, probabilities, unfamiliar = row
                decision = decide(labels[0], probabilities[0], self.threshold)
                entries.append(Prediction(file.path, labels, probabilities, decision, unfamiliar))
        return entries

    def _rows(
        self, outputs: Sequence[NDArray[np.float32]], usable: int, top_k: int
    ) -> Iterator[tuple[tuple[str, ...], tuple[float, ...], float | None] | None]:
        """Labels and probabilities, most probable first, of the first `usable` images, and how unfamiliar these are;
        None if a number is not finite."""
        probability, logit, *others = (values[:usable] for values in outputs)
        is_finite = _finite(probability, logit, *(values[:, None] for values in others))
        # ties: the earlier class first
        best = probability.argmax(1)[:, None] if top_k == 1 else np.argsort(-probability, 1, "stable")[:, :top_k]
        highest = np.take_along_axis(probability, best, 1)
        for i, (indices, values) in enumerate(zip(best.tolist(), highest, strict=True)):
            # str() of a float32 is its shortest exact form: 0.9987123, not 0.9987123012542725
            labels, probabilities = tuple(self.classes[k] for k in indices), tuple(float(str(p)) for p in values)
            unfamiliar = float(str(others[0][i])) if others else None
            yield (labels, probabilities, unfamiliar) if is_finite[i] else None

    def check_top_k(self, top_k: int) -> None:
        """Raises ConvlineError unless `top_k` is from 1 to the number of classes."""
        if not 1 <= top_k <= len(self.classes):
            raise ConvlineError(
                f"--top-k {top_k}: the model knows {len(self.classes)} classes; ask for 1 to {len(self.classes)}"
            )

    def __enter__(self) -> Classifier:
        return self

    def __exit__(self, *_: object) -> None:
        """Release the session, its threads and its memory."""
        del self.model


def _finite(*outputs: NDArray[np.float32]) -> NDArray[np.bool_]:
    """For which images all values, each [batch, n], are finite: bool [batch]."""
    return np.asarray(np.isfinite(np.concatenate(outputs, axis=1)).all(axis=1))


def try_decode(file: InputFile, spec: ImageSpec) -> NDArray[np.uint8] | ImageError:
    """The file's pixels, or the error that says why there are none."""
    try:
        if isinstance(file.location, DecodedImage):
            return fit_pixels(file.location.image, spec)
        return decode(file.read(), spec)
    except ImageError as error:
        return error.without_traceback()


def pack(decoded: Iterable[NDArray[np.uint8] | ImageError], pixels: NDArray[np.uint8]) -> list[ImageError | None]:
    """Write the decoded images into the first rows of `pixels`, and 0 into the rest.

    Returns, for each file, None or the error that says why it has no pixels.
    """
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


def batched(files: Iterable[InputFile], size: int) -> Iterator[list[InputFile]]:
    """Lists of `size` files; the last one may be shorter."""
    files = iter(files)
    while batch := list(islice(files, size)):
        yield batch
