"""The result of a parity check: differences in logits, probabilities, predictions and precision @ 1 of two models.

What parity.json holds, and what `pipeline export` and `pipeline parity` print.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.exporting.any_size_proof import AnySizeProof
from pipeline.exporting.tolerances import LEAST_RANGE, TIE, Tolerance
from pipeline.exporting.unfamiliar_proof import UnfamiliarProof
from pipeline.metrics import Evaluation

LISTED_IMAGES, PRINTED_IMAGES = 20, 3  # of the images that differ, in parity.json and on the terminal
DISPLAY_NAMES = {"pytorch": "PyTorch", "onnx": "ONNX"}

Outputs = tuple[NDArray[np.float32], ...]  # as of `pipeline.network.Predict`


@dataclass(frozen=True)
class NamedBatch:
    """Images as stored, uint8 [n, height, width, channels], each with a name, and labels where they are known."""

    names: Sequence[str]
    images: NDArray[np.uint8]
    labels: NDArray[np.int64] | None = None


@dataclass
class Parity:
    """The differences between a reference and a candidate, which `model_names` name, over the batches added so far.

    `top1_differences` does not count ties. Of boundary images, only logits are compared. Labelled images count for
    precision @ 1, real ones (not the hostile) for the distribution of predictions. `any_size` is the proof of a
    candidate that resizes images itself, `unfamiliar` of one that tells how unfamiliar images are.
    """

    classes: list[str]
    tolerance: Tolerance
    provider: str = "cpu"
    threads: int = 1
    model_names: tuple[str, str] = ("pytorch", "onnx")
    images: int = 0
    boundary_images: int = 0
    top1_differences: int = 0
    real_top1_differences: int = 0
    differing_images: list[dict[str, Any]] = field(default_factory=list, repr=False)
    any_size: AnySizeProof | None = field(default=None, repr=False)
    unfamiliar: UnfamiliarProof | None = field(default=None, repr=False)
    reference_evaluation: Evaluation = field(init=False, repr=False)
    candidate_evaluation: Evaluation = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.reference_evaluation, self.candidate_evaluation = Evaluation(self.classes), Evaluation(self.classes)
        # int64 [2, classes]: how often each class was predicted for real images, by the reference and the candidate
        self._predictions = np.zeros((2, len(self.classes)), np.int64)
        self._logit_differences: list[NDArray[np.float32]] = []  # by image, the largest
        self._ranges: list[NDArray[np.float32]] = []  # of each image's logits, 0 included
        self._difference_sums = np.zeros(len(self.classes))  # by class, of the Δlogit of real images
        self._probability_differences: list[NDArray[np.float32]] = []  # by image, the largest

    def add(self, batch: NamedBatch, reference: Outputs, candidate: Outputs, is_real: bool = True) -> None:
        """Compare the outputs of the reference and the candidate for a batch."""
        (probability, logit, *unfamiliar), (candidate_probability, candidate_logit, *found) = reference, candidate
        if self.unfamiliar is not None:
            self.unfamiliar.add(unfamiliar[0], found[0], is_real)
        self.images += len(logit)
        self._add_logits(logit, candidate_logit)
        self._probability_differences.append(np.abs(probability - candidate_probability).max(1))
        predicted, candidate_predicted = probability.argmax(1), candidate_probability.argmax(1)
        margin = probability.max(1) - np.take_along_axis(probability, candidate_predicted[:, None], 1)[:, 0]
        differing = np.flatnonzero(~(margin <= TIE))
        self.top1_differences += len(differing)
        for i in differing[: LISTED_IMAGES - len(self.differing_images)]:
            answers = ((predicted[i], probability[i]), (candidate_predicted[i], candidate_probability[i]))
            described = {
                model_name: {"label": self.classes[label], "probability": _json(row[label])}
                for model_name, (label, row) in zip(self.model_names, answers, strict=True)
            }
            self.differing_images.append({"image": batch.names[i], **described})
        if is_real:
            self.real_top1_differences += len(differing)
            self._difference_sums += (candidate_logit - logit).sum(0, dtype=np.float64)
            count = len(self.classes)
            self._predictions += [np.bincount(p, minlength=count) for p in (predicted, candidate_predicted)]
        if batch.labels is not None:
            self.reference_evaluation.add(logit, batch.labels)
            self.candidate_evaluation.add(candidate_logit, batch.labels)

    def add_boundary_images(self, logit: NDArray[np.float32], candidate_logit: NDArray[np.float32]) -> None:
        """Compare the logits of the reference and the candidate for images near the decision boundary."""
        self.boundary_images += len(logit)
        self._add_logits(logit, candidate_logit)

    def _add_logits(self, logit: NDArray[np.float32], candidate_logit: NDArray[np.float32]) -> None:
        # NaN - NaN is NaN, and max() of an array with a NaN is NaN: it fails every comparison
        self._logit_differences.append(np.abs(logit - candidate_logit).max(1))
        self._ranges.append(logit.max(1).clip(min=0) - logit.min(1).clip(max=0))

    @property
    def _median_range(self) -> float:
        return max(LEAST_RANGE, float(np.median(np.concatenate(self._ranges))))

    @property
    def _relative_logit_differences(self) -> NDArray[np.float32]:
        """For each image, the largest |Δlogit| as a share of the range of its logits, or of the median range if that is
        larger."""
        differences, ranges = np.concatenate(self._logit_differences), np.concatenate(self._ranges)
        with np.errstate(invalid="ignore"):  # infinity / infinity
            ratios: NDArray[np.float32] = differences / ranges.clip(self._median_range)
        return ratios

    @property
    def relative_logit_difference(self) -> float:
        """The largest |Δlogit| as a share of the range."""
        return float(self._relative_logit_differences.max())

    @property
    def mean_logit_difference(self) -> float:
        """The mean Δlogit over the real images, of the class where it is largest, as a share of the median range."""
        return float(np.abs(self._difference_sums).max() / max(1, self._real_images) / self._median_range)

    @property
    def _real_images(self) -> int:
        return int(self._predictions[0].sum())

    @property
    def largest_logit_difference(self) -> float:
        return float(np.concatenate(self._logit_differences).max())

    @property
    def largest_probability_difference(self) -> float:
        return float(np.concatenate(self._probability_differences).max())

    @property
    def mean_probability_difference(self) -> float:
        return float(np.concatenate(self._probability_differences).mean())

    @property
    def hits_lost(self) -> int:
        """How many more images the reference classifies correctly than the candidate."""
        return int(self.reference_evaluation.ranks[0] - self.candidate_evaluation.ranks[0])

    @property
    def predictions_moved(self) -> int:
        """By how many images the numbers of predictions of the classes shifted."""
        reference, candidate = self._predictions
        return int(np.abs(reference - candidate).sum()) // 2

    @property
    def problems(self) -> list[str]:
        """Why the candidate fails; empty if it passes."""
        if not np.isfinite(self.largest_logit_difference) or not np.isfinite(self.largest_probability_difference):
            return ["a value is not a finite number"]
        problems = [problem for proof in self._other_proofs() for problem in proof.problems]
        if self.tolerance.probability is not None:
            return problems + self._probability_problems(self.tolerance.probability) + self._logit_problems()
        return problems + self._prediction_problems()

    def _probability_problems(self, tolerance: float) -> list[str]:
        exceeds = self.largest_probability_difference > tolerance
        return [
            *([f"|Δprobability| exceeds {tolerance:g}"] if exceeds else []),
            *([f"{self.top1_differences} top-1 differ"] if self.top1_differences else []),
        ]

    def _logit_problems(self) -> list[str]:
        tolerance = self.tolerance.logit
        if tolerance is None:
            return []
        mean_tolerance = max(self.tolerance.mean_logit, tolerance / max(1, self._real_images) ** 0.5)
        mean = self.mean_logit_difference
        too_large = f"|Δlogit| exceeds {tolerance:g} of the logits' range"
        biased = f"the mean Δlogit of a class is {mean:.1e} of the range (allowed: {mean_tolerance:.1e})"
        return [
            *([too_large] if self.relative_logit_difference > tolerance else []),
            *([biased] if mean > mean_tolerance else []),
        ]

    def _prediction_problems(self) -> list[str]:
        count = self._real_images
        allowed = self.tolerance.allowed_losses(count)
        lost = f"precision @ 1 loses {self.hits_lost} of {count} images (allowed: {allowed:g})"
        moved = f"{self.predictions_moved} of {count} predictions moved to other classes (allowed: {2 * allowed:g})"
        differing = f"{self.real_top1_differences} of {count} top-1 differ (allowed: {4 * allowed:g})"
        is_labelled = self.reference_evaluation.count > 0
        return [
            *([lost] if self.hits_lost > allowed else []),
            *([moved] if self.predictions_moved > 2 * allowed else []),
            *([differing] if self.real_top1_differences > 4 * allowed and not is_labelled else []),
        ]

    @property
    def passed(self) -> bool:
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """The content of parity.json."""
        hits: dict[str, Any] = {}
        if self.reference_evaluation.count:
            precision = {name: evaluation.precision_at(1) for name, evaluation in self._evaluations()}
            hits = {"precision_at_1": precision, "hits_lost": self.hits_lost}
        spreads = {
            "relative_logit_difference": [self._relative_logit_differences],
            "logit_difference": self._logit_differences,
            "probability_difference": self._probability_differences,
        }
        figures = {key: {name: _json(v) for name, v in _spread(parts).items()} for key, parts in spreads.items()}
        return {
            "passed": self.passed,
            "problems": self.problems,
            "provider": self.provider,
            "threads": self.threads,
            "images": self.images,
            "blends": self.boundary_images,
            "tolerance": self.tolerance.probability,
            "logit_tolerance": self.tolerance.logit,
            "relative_logit_difference": figures["relative_logit_difference"],
            "mean_logit_difference": _json(self.mean_logit_difference),
            "logit_difference": figures["logit_difference"],
            "probability_difference": figures["probability_difference"],
            "top1_differences": self.top1_differences,
            "differing": self.differing_images,
            "predictions_moved": self.predictions_moved,
            **hits,
            **({"any_size": self.any_size.to_dict()} if self.any_size else {}),
            **({"unfamiliar": self.unfamiliar.to_dict()} if self.unfamiliar else {}),
        }

    def _other_proofs(self) -> list[AnySizeProof | UnfamiliarProof]:
        return [proof for proof in (self.any_size, self.unfamiliar) if proof is not None]

    def _evaluations(self) -> list[tuple[str, Evaluation]]:
        return list(zip(self.model_names, (self.reference_evaluation, self.candidate_evaluation), strict=True))

    def sentence(self) -> str:
        """The result in one line."""
        agreement = "every top-1 equal" if not self.top1_differences else f"{self.top1_differences} top-1 differ"
        precision = ""
        if self.reference_evaluation.count:
            parts = (f"{e.precision_at(1):.4f} {DISPLAY_NAMES.get(name, name)}" for name, e in self._evaluations())
            precision = f", precision @ 1 {', '.join(parts)}"
        others = "".join(f", {proof.sentence()}" for proof in self._other_proofs())
        boundary = f" and {self.boundary_images} boundary images" if self.boundary_images else ""
        return (
            f"parity {'passed' if self.passed else 'FAILED'}: {self.images} images{boundary}, "
            f"largest |Δlogit| {self.largest_logit_difference:.1e}, "
            f"|Δprobability| {self.largest_probability_difference:.1e}, {agreement}"
            f"{precision}{others} ({self.provider}){''.join(f'; {problem}' for problem in self.problems)}"
        )

    def table(self) -> str:
        """The differences as a table for the terminal, printed below the sentence."""
        lines = [f"{'':18}{'largest':>8}{'mean':>10}{'99.9%':>10}"]
        rows = {
            "|Δlogit|": self._logit_differences,
            "… of its range": [self._relative_logit_differences],
            "|Δprobability|": self._probability_differences,
        }
        for name, parts in rows.items():
            lines.append(f"{name:16}" + "".join(f"{value:10.1e}" for value in _spread(parts).values()))
        lines.insert(3, f"{'… by class, mean':16}{self.mean_logit_difference:10.1e}")
        for differing in self.differing_images[:PRINTED_IMAGES]:
            answers = (
                f"{differing[name]['label']} ({differing[name]['probability']}) by {DISPLAY_NAMES.get(name, name)}"
                for name in self.model_names
            )
            lines.append(f"differs: {differing['image']}: {', '.join(answers)}")
        if (rest := self.top1_differences - PRINTED_IMAGES) > 0:
            lines.append(f"and {rest} more that differ")
        return "\n".join(lines)


def _spread(parts: list[NDArray[np.float32]]) -> dict[str, float]:
    values = np.concatenate(parts)
    return {
        "largest": float(values.max()),
        "mean": float(values.mean()),
        "p99.9": float(np.quantile(values, 0.999)),
    }


def _json(value: float) -> float | None:
    """JSON has no NaN."""
    return float(str(value)) if np.isfinite(value) else None
