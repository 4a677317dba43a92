"""What two implementations of one model gave for the same images, and what they may differ by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from pipeline.metrics import Evaluation

Precision = Literal["fp32", "fp16", "int8"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)

TIE = 1e-5  # classes whose probabilities are as close as this are equally probable
# logits may differ by as much as if their range were this: 2e-5 changes no probability by more than 1e-5
LEAST_RANGE = 1.0
LISTED, SHOWN = 20, 3  # of the images that differ, in the file and on the terminal
NAMES = {"pytorch": "PyTorch", "onnx": "ONNX"}

Outputs = tuple[NDArray[np.float32], NDArray[np.float32]]  # probability and logit, float32 [n, classes]


@dataclass(frozen=True)
class Tolerance:
    """What a file of one precision may differ by. NaN and infinity pass nowhere.

    With `probability`, the largest |Δprobability|, every top-1 must be equal, but for ties; and every |Δlogit| is at
    most `logit` of the range of its image's logits, 0 included (of the median range, where that is larger). Rounding
    errors have either sign and those of a wrong weight or bias do not: the mean of a class's Δlogit over n images is at
    most `logit` / √n of the median range, or `mean_logit` of it.

    Without `probability`, precision @ 1 may lose max(`share` of the images, `images`) hits, and the numbers of
    predictions of the classes may shift by twice as many images in all (half the sum of their absolute differences): a
    file can keep its precision and favour a class. Where images have no labels, four times as many may have another
    top-1 (of those of cifar10, int8 changes 1.6%).
    """

    probability: float | None = None
    logit: float | None = None
    mean_logit: float = 0.0
    share: float = 0.0
    images: int = 0

    def losable(self, count: int) -> float:
        """How many hits of `count` images may be lost."""
        return max(self.share * count, self.images)


TOLERANCES: dict[Precision, Tolerance] = {
    # between PyTorch and onnxruntime 5e-7 of the range was seen for digits (1e-8 in the mean over a class), 7e-7 (7e-8)
    # for cifar10, and, after a few steps on noise, 4e-6 (1e-7) for deep-mnist, 2e-6 (1e-7) for resnet50, 3e-7 (2e-7)
    # for efficientnet_b0, 8e-7 for convnext_tiny, 4e-7 for vit_b_16; less for the others. A bias that is wrong by 0.01
    # where logits range over 1,400 is 7e-6.
    "fp32": Tolerance(probability=1e-5, logit=2e-5, mean_logit=1e-6),
    "fp16": Tolerance(share=0.001, images=1),
    "int8": Tolerance(share=0.005, images=2),
}


@dataclass(frozen=True)
class Batch:
    """Images as stored, uint8 [n, height, width, channels], with a name each and, where they are known, labels."""

    names: Sequence[str]
    images: NDArray[np.uint8]
    labels: NDArray[np.int64] | None = None


@dataclass
class Parity:
    """The differences found so far. `sides` name the reference and the candidate; `blends` counts images near the
    decision boundary, of which logits alone are compared.

    `top1_differences` leaves out ties. Labelled images count for precision @ 1, real ones (not the hostile) for the
    distribution of predictions.
    """

    classes: list[str]
    tolerance: Tolerance
    provider: str = "cpu"
    threads: int = 1
    sides: tuple[str, str] = ("pytorch", "onnx")
    images: int = 0
    blends: int = 0
    top1_differences: int = 0
    real_differences: int = 0
    differing: list[dict[str, Any]] = field(default_factory=list, repr=False)
    reference: Evaluation = field(init=False, repr=False)
    candidate: Evaluation = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.reference, self.candidate = Evaluation(self.classes), Evaluation(self.classes)
        self._predictions = np.zeros((2, len(self.classes)), np.int64)
        self._logits: list[NDArray[np.float32]] = []
        self._ranges: list[NDArray[np.float32]] = []  # of each image's logits, 0 included
        self._sums = np.zeros(len(self.classes))  # by class, of the Δlogit of real images
        self._probabilities: list[NDArray[np.float32]] = []

    def add(self, batch: Batch, mine: Outputs, theirs: Outputs, is_real: bool = True) -> None:
        """Take in what the reference and the candidate gave for a batch."""
        (p, logit), (other_p, other_logit) = mine, theirs
        self.images += len(p)
        self._add_logits(logit, other_logit)
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
            self._sums += (other_logit - logit).sum(0, dtype=np.float64)
            self._predictions += [np.bincount(side, minlength=len(self.classes)) for side in (chosen, other)]
        if batch.labels is not None:
            self.reference.add(logit, batch.labels)
            self.candidate.add(other_logit, batch.labels)

    def add_blends(self, logit: NDArray[np.float32], other_logit: NDArray[np.float32]) -> None:
        """Take in what the reference and the candidate gave for images near the decision boundary."""
        self.blends += len(logit)
        self._add_logits(logit, other_logit)

    def _add_logits(self, logit: NDArray[np.float32], other_logit: NDArray[np.float32]) -> None:
        # NaN - NaN is NaN, and max() of an array with a NaN is NaN: it fails every comparison
        self._logits.append(np.abs(logit - other_logit).max(1))
        self._ranges.append(logit.max(1).clip(min=0) - logit.min(1).clip(max=0))

    @property
    def _usual_range(self) -> float:
        return max(LEAST_RANGE, float(np.median(np.concatenate(self._ranges))))

    @property
    def _relatives(self) -> NDArray[np.float32]:
        """By image |Δlogit| as a share of the range of its logits, or of the usual one."""
        with np.errstate(invalid="ignore"):  # infinity / infinity
            ratios: NDArray[np.float32] = np.concatenate(self._logits) / np.concatenate(self._ranges).clip(
                self._usual_range
            )
        return ratios

    @property
    def relative_logit(self) -> float:
        """The largest of them."""
        return float(self._relatives.max())

    @property
    def mean_logit(self) -> float:
        """The mean Δlogit over the real images of the class where it is largest, as a share of the usual range."""
        return float(np.abs(self._sums).max() / max(1, self._reals) / self._usual_range)

    @property
    def _reals(self) -> int:
        """How many real images there were."""
        return int(self._predictions[0].sum())

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
        tolerance, count = self.tolerance, self._reals
        if not np.isfinite(self.largest_logit) or not np.isfinite(self.largest_probability):
            return ["a value is not a finite number"]
        if tolerance.probability is not None:
            exceeds = self.largest_probability > tolerance.probability
            return [
                *([f"|Δprobability| may be {tolerance.probability:g}"] if exceeds else []),
                *([f"{self.top1_differences} top-1 differ"] if self.top1_differences else []),
                *self._problems_of_logits(),
            ]
        losable = tolerance.losable(count)
        told = [f"precision @ 1 loses {self.lost} of {count} images, it may lose {losable:g}"]
        shifted = [f"{self.moved} of {count} predictions moved to other classes, {2 * losable:g} may"]
        others = [f"{self.real_differences} of {count} top-1 differ, {4 * losable:g} may"]
        return [
            *(told if self.lost > losable else []),
            *(shifted if self.moved > 2 * losable else []),
            *(others if self.real_differences > 4 * losable and not self.reference.count else []),
        ]

    def _problems_of_logits(self) -> list[str]:
        if (share := self.tolerance.logit) is None:
            return []
        mean = max(self.tolerance.mean_logit, share / max(1, self._reals) ** 0.5)
        return [
            *([f"|Δlogit| may be {share:g} of the logits' range"] if self.relative_logit > share else []),
            *(
                [f"the mean Δlogit of a class is {self.mean_logit:.1e} of the range, it may be {mean:.1e}"]
                if self.mean_logit > mean
                else []
            ),
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
            "blends": self.blends,
            "tolerance": self.tolerance.probability,
            "logit_tolerance": self.tolerance.logit,
            "relative_logit_difference": {name: _json(v) for name, v in _spread([self._relatives]).items()},
            "mean_logit_difference": _json(self.mean_logit),
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
        blends = f" and {self.blends} blends" if self.blends else ""
        return (
            f"parity {'passed' if self.passed else 'FAILED'}: {self.images} images{blends}, "
            f"largest |Δlogit| {self.largest_logit:.1e}, |Δprobability| {self.largest_probability:.1e}, {agreement}"
            f"{figures} ({self.provider}){''.join(f'; {problem}' for problem in self.problems)}"
        )

    def table(self) -> str:
        """The proof for a person, below its sentence."""
        lines = [f"{'':18}{'largest':>8}{'mean':>10}{'99.9%':>10}"]
        rows = {"|Δlogit|": self._logits, "… of its range": [self._relatives], "|Δprobability|": self._probabilities}
        for name, parts in rows.items():
            lines.append(f"{name:16}" + "".join(f"{value:10.1e}" for value in _spread(parts).values()))
        lines.insert(3, f"{'… by class, mean':16}{self.mean_logit:10.1e}")
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
