"""What two implementations of one model gave for the same images, and what they may differ by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from pipeline.engine.counts import Evaluation

Precision = Literal["fp32", "fp16", "int8"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)

TIE = 1e-5  # classes whose probabilities are as close as this are equally probable
LISTED, SHOWN = 20, 3  # of the images that differ, in the file and on the terminal
NAMES = {"pytorch": "PyTorch", "onnx": "ONNX"}

Outputs = tuple[NDArray[np.float32], NDArray[np.float32]]  # probability and logit, float32 [n, classes]


@dataclass(frozen=True)
class Gate:
    """What a file of one precision may differ by. NaN and infinity pass nowhere.

    With `probability`, the largest |Δprobability|, every top-1 must be equal, but for ties. Without, precision @ 1 may
    lose max(`share` of the images, `images`) hits, and the numbers of predictions of the classes may shift by twice as
    many images in all (half the sum of their absolute differences): a file can keep its precision and favour a class.
    Where images have no labels, four times as many may have another top-1 (of those of cifar10, int8 changes 1.6%).
    """

    probability: float | None = None
    share: float = 0.0
    images: int = 0

    def losable(self, count: int) -> float:
        """How many hits of `count` images may be lost."""
        return max(self.share * count, self.images)


GATES: dict[Precision, Gate] = {
    "fp32": Gate(probability=1e-5),
    "fp16": Gate(share=0.001, images=1),
    "int8": Gate(share=0.005, images=2),
}


@dataclass(frozen=True)
class Batch:
    """Images as stored, uint8 [n, height, width, channels], with a name each and, where they are known, labels."""

    names: Sequence[str]
    images: NDArray[np.uint8]
    labels: NDArray[np.int64] | None = None


@dataclass
class Parity:
    """The differences found so far. `sides` name the reference and the candidate.

    `top1_differences` leaves out ties. Labelled images count for precision @ 1, real ones (not the hostile) for the
    distribution of predictions.
    """

    classes: list[str]
    gate: Gate
    provider: str = "cpu"
    threads: int = 1
    sides: tuple[str, str] = ("pytorch", "onnx")
    images: int = 0
    top1_differences: int = 0
    real_differences: int = 0
    differing: list[dict[str, Any]] = field(default_factory=list, repr=False)
    reference: Evaluation = field(init=False, repr=False)
    candidate: Evaluation = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.reference, self.candidate = Evaluation(self.classes), Evaluation(self.classes)
        self._predictions = np.zeros((2, len(self.classes)), np.int64)
        self._logits: list[NDArray[np.float32]] = []
        self._probabilities: list[NDArray[np.float32]] = []

    def add(self, batch: Batch, mine: Outputs, theirs: Outputs, is_real: bool = True) -> None:
        """Take in what the reference and the candidate gave for a batch."""
        (p, logit), (other_p, other_logit) = mine, theirs
        self.images += len(p)
        # NaN - NaN is NaN, and max() of an array with a NaN is NaN: it fails every comparison
        self._logits.append(np.abs(logit - other_logit).max(1))
        self._probabilities.append(np.abs(p - other_p).max(1))
        chosen, other = p.argmax(1), other_p.argmax(1)
        behind = p.max(1) - np.take_along_axis(p, other[:, None], 1)[:, 0]
        differs = np.flatnonzero(~(behind <= TIE))
        self.top1_differences += len(differs)
        for i in differs[: LISTED - len(self.differing)]:
            told = ((chosen[i], p[i]), (other[i], other_p[i]))
            sides = zip(self.sides, told, strict=True)
            answers = {side: {"label": self.classes[c], "probability": _json(row[c])} for side, (c, row) in sides}
            self.differing.append({"image": batch.names[i], **answers})
        if is_real:
            self.real_differences += len(differs)
            self._predictions += [np.bincount(side, minlength=len(self.classes)) for side in (chosen, other)]
        if batch.labels is not None:
            self.reference.add(logit, batch.labels)
            self.candidate.add(other_logit, batch.labels)

    @property
    def largest_logit(self) -> float:
        return float(np.concatenate(self._logits).max())

    @property
    def largest_probability(self) -> float:
        return float(np.concatenate(self._probabilities).max())

    @property
    def mean_probability(self) -> float:
        return float(np.concatenate(self._probabilities).mean())

    @property
    def lost(self) -> int:
        """Hits of the reference that the candidate lacks, in all."""
        return int(self.reference.ranks[0] - self.candidate.ranks[0])

    @property
    def moved(self) -> int:
        """Images by which the predictions of the classes shifted."""
        mine, theirs = self._predictions
        return int(np.abs(mine - theirs).sum()) // 2

    @property
    def problems(self) -> list[str]:
        """Why it fails; nothing where it passes."""
        gate, count = self.gate, int(self._predictions[0].sum())
        if not np.isfinite(self.largest_logit) or not np.isfinite(self.largest_probability):
            return ["a value is not a finite number"]
        if gate.probability is not None:
            exceeds = self.largest_probability > gate.probability
            told = [f"|Δprobability| may be {gate.probability:g}"] if exceeds else []
            return told + ([f"{self.top1_differences} top-1 differ"] if self.top1_differences else [])
        losable = gate.losable(count)
        told = [f"precision @ 1 loses {self.lost} of {count} images, it may lose {losable:g}"]
        shifted = [f"{self.moved} of {count} predictions moved to other classes, {2 * losable:g} may"]
        others = [f"{self.real_differences} of {count} top-1 differ, {4 * losable:g} may"]
        return [
            *(told if self.lost > losable else []),
            *(shifted if self.moved > 2 * losable else []),
            *(others if self.real_differences > 4 * losable and not self.reference.count else []),
        ]

    @property
    def passed(self) -> bool:
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        hits: dict[str, Any] = {}
        if self.reference.count:
            precision = {side: e.precision_at(1) for side, e in zip(self.sides, self._evaluations, strict=True)}
            hits = {"precision_at_1": precision, "hits_lost": self.lost}
        return {
            "passed": self.passed,
            "problems": self.problems,
            "provider": self.provider,
            "threads": self.threads,
            "images": self.images,
            "tolerance": self.gate.probability,
            "logit_difference": {name: _json(value) for name, value in _spread(self._logits).items()},
            "probability_difference": {name: _json(value) for name, value in _spread(self._probabilities).items()},
            "top1_differences": self.top1_differences,
            "differing": self.differing,
            "predictions_moved": self.moved,
            **hits,
        }

    @property
    def _evaluations(self) -> tuple[Evaluation, Evaluation]:
        return self.reference, self.candidate

    def sentence(self) -> str:
        """The proof in a line."""
        agreement = "every top-1 equal" if not self.top1_differences else f"{self.top1_differences} top-1 differ"
        figures = ""
        if self.reference.count:
            sides = zip(self._evaluations, self.sides, strict=True)
            told = ", ".join(f"{counts.precision_at(1):.4f} {NAMES.get(side, side)}" for counts, side in sides)
            figures = f", precision @ 1 {told}"
        return (
            f"parity {'passed' if self.passed else 'FAILED'}: {self.images} images, largest |Δlogit| "
            f"{self.largest_logit:.1e}, |Δprobability| {self.largest_probability:.1e}, {agreement}"
            f"{figures} ({self.provider}){''.join(f'; {problem}' for problem in self.problems)}"
        )

    def table(self) -> str:
        """The proof for a person, below its sentence."""
        lines = [f"{'':16}{'largest':>10}{'mean':>10}{'99.9%':>10}"]
        for name, parts in (("|Δlogit|", self._logits), ("|Δprobability|", self._probabilities)):
            lines.append(f"{name:16}" + "".join(f"{value:10.1e}" for value in _spread(parts).values()))
        for told in self.differing[:SHOWN]:
            sides = (f"{told[s]['label']} ({told[s]['probability']}) by {NAMES.get(s, s)}" for s in self.sides)
            lines.append(f"differs: {told['image']}: {', '.join(sides)}")
        if (rest := self.top1_differences - SHOWN) > 0:
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
