"""PyTorch against onnxruntime, as serving runs it, on real and hostile images."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.dataset import Dataset, Split
from pipeline.engine.network import Predict, load_served, predictor
from pipeline.engine.run import Run
from pipeline.evaluate import Evaluation, batches
from serving.errors import ConvlineError
from serving.images import ImageSpec
from serving.model import open_model

SERVING_BATCH = 64
HOSTILE_BATCHES = (1, 2, 3, 17)
REAL_BESIDE_HOSTILE = 64
NOISE_SEED = 20151109

PROBABILITY_TOLERANCE = 1e-5

Outputs = tuple[NDArray[np.float32], NDArray[np.float32]]  # probability and logit


@dataclass
class Parity:
    """What two implementations of one model gave for the same images.

    `top1_differences` leaves out ties: classes whose probabilities are within the tolerance of each other.
    """

    classes: list[str]
    provider: str
    tolerance: float = PROBABILITY_TOLERANCE
    images: int = 0
    largest_logit: float = 0.0
    top1_differences: int = 0
    probability_differences: list[NDArray[np.float32]] = field(default_factory=list, repr=False)
    reference: Evaluation = field(init=False, repr=False)
    candidate: Evaluation = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.reference, self.candidate = Evaluation(self.classes), Evaluation(self.classes)

    def add(self, mine: Outputs, theirs: Outputs) -> None:
        """Take in (probability, logit) of a batch from the reference and from the candidate."""
        (p, logit), (other_p, other_logit) = mine, theirs
        self.images += len(p)
        # NaN - NaN is NaN, and max() of an array with a NaN is NaN: it fails every comparison below
        self.largest_logit = float(np.maximum(self.largest_logit, np.abs(logit - other_logit).max()))
        self.probability_differences.append(np.abs(p - other_p).max(1))
        chosen = other_p.argmax(1)
        behind = p.max(1) - np.take_along_axis(p, chosen[:, None], 1)[:, 0]
        self.top1_differences += int((~(behind <= self.tolerance)).sum())

    @property
    def largest_probability(self) -> float:
        return float(np.concatenate(self.probability_differences).max())

    @property
    def passed(self) -> bool:
        return self.largest_probability <= self.tolerance and self.top1_differences == 0

    def to_dict(self) -> dict[str, Any]:
        differences = np.concatenate(self.probability_differences)
        return {
            "passed": self.passed,
            "provider": self.provider,
            "images": self.images,
            "tolerance": self.tolerance,
            "logit_difference": {"largest": self.largest_logit},
            "probability_difference": {
                "largest": self.largest_probability,
                "mean": float(differences.mean()),
                "p99.9": float(np.quantile(differences, 0.999)),
            },
            "top1_differences": self.top1_differences,
            "precision_at_1": {"pytorch": self.reference.precision_at(1), "onnx": self.candidate.precision_at(1)},
        }

    def sentence(self) -> str:
        agreement = "every top-1 equal" if not self.top1_differences else f"{self.top1_differences} top-1 differ"
        return (
            f"parity {'passed' if self.passed else 'FAILED'}: {self.images} images, largest |Δlogit| "
            f"{self.largest_logit:.1e}, |Δprobability| {self.largest_probability:.1e}, {agreement}, precision @ 1 "
            f"{self.reference.precision_at(1):.4f} PyTorch, {self.candidate.precision_at(1):.4f} ONNX ({self.provider})"
        )


def prove(reference: Predict, path: Path, run: Run, dataset: Dataset) -> Parity:
    """Compare an ONNX file, opened as serving opens it, with its reference, on the test split.

    Raises ConvlineError where they differ.
    """
    model = open_model(path, "cpu")
    if list(model.classes) != run.classes or model.spec != run.spec:
        raise ConvlineError(f"{path} has other classes or images than {run.folder}; it is not this run's model")
    parity = compare(reference, model.run, dataset.split("test"), run.classes, run.spec, model.provider)
    if not parity.passed:
        raise ConvlineError(f"{parity.sentence()}: {path} is not the model that was trained")
    return parity


def prove_again(name: str | None, runs_dir: Path, data_dir: Path) -> Parity:
    """Prove a published file, named by its run or its path, against the checkpoint it came from.

    Raises ConvlineError where the run is not there, has trained on since, or the proof fails.
    """
    if name is not None and name.endswith(".onnx"):
        path = Path(name)
        run = _run_of(open_model(path, "cpu").metadata["run"]["id"], path, runs_dir)
    else:
        run = Run.find(runs_dir, name)
        path = run.model
    served, step = load_served(run)
    exported = open_model(path, "cpu").metadata["run"]["step"]
    if exported != step:
        raise ConvlineError(
            f"{path} holds step {exported}, the newest checkpoint of {run.folder} is step {step}; export again"
        )
    return prove(predictor(served, torch.device("cpu")), path, run, run.dataset(data_dir))


def _run_of(identity: str, path: Path, runs_dir: Path) -> Run:
    for candidate in (path.parent, *sorted(folder.parent for folder in runs_dir.glob("*/run.json"))):
        if (candidate / "run.json").exists() and (run := Run.open(candidate)).info["id"] == identity:
            return run
    raise ConvlineError(f"the run that {path} was exported from is not in {runs_dir}; give its --runs-dir")


def compare(
    reference: Predict, candidate: Predict, split: Split, classes: list[str], spec: ImageSpec, provider: str
) -> Parity:
    """Both models over the whole split at the serving batch, and 64 of its images with hostile ones in
    batches of 1, 2, 3 and 17."""
    parity = Parity(classes, provider)
    for images, labels in batches(split, SERVING_BATCH):
        mine, theirs = reference(images), candidate(images)
        parity.add(mine, theirs)
        parity.reference.add(mine[1], labels)
        parity.candidate.add(theirs[1], labels)
    mixed = np.concatenate([split.first(REAL_BESIDE_HOSTILE).batch(0, REAL_BESIDE_HOSTILE)[0], hostile_images(spec)])
    for size in HOSTILE_BATCHES:
        for images in _chunks(mixed, size):
            parity.add(reference(images), candidate(images))
    return parity


def hostile_images(spec: ImageSpec) -> NDArray[np.uint8]:
    """Black, white, noise and one hot pixel, uint8 [4, height, width, channels]."""
    assert spec.height and spec.width
    images = np.zeros((4, spec.height, spec.width, spec.channels), np.uint8)
    images[1] = 255
    images[2] = np.random.default_rng(NOISE_SEED).integers(0, 256, images[2].shape)
    images[3, spec.height // 2, spec.width // 2] = 255
    return images


def _chunks(images: NDArray[np.uint8], size: int) -> Iterator[NDArray[np.uint8]]:
    starts: Iterable[int] = range(0, len(images), size)
    return (images[start : start + size] for start in starts)
