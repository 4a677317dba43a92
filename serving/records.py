"""The result for a file: a `Prediction`, or a `Reject` with the reason why the file was not classified."""

from __future__ import annotations

from dataclasses import dataclass

UNSURE = "unsure"  # the decision where the most probable class is not probable enough


@dataclass(frozen=True)
class Prediction:
    """The k most probable classes of one file, most probable first.

    With a threshold, `decision` is the first label where its probability reaches the threshold, and else UNSURE. Where
    it was asked for, `unfamiliar` is the distance from the training images; 99 of 100 validation images were below 1.
    """

    path: str
    labels: tuple[str, ...]
    probabilities: tuple[float, ...]
    decision: str | None = None
    unfamiliar: float | None = None

    @property
    def is_unfamiliar(self) -> bool:
        return self.unfamiliar is not None and self.unfamiliar > 1


def decide(label: str, probability: float, threshold: float | None) -> str | None:
    """The decision for the most probable class and its probability; None without a threshold."""
    if threshold is None:
        return None
    return label if probability >= threshold else UNSURE


@dataclass(frozen=True)
class Reject:
    """A file that could not be classified; `reason` is a code (`convline.errors.Reason`), `detail` is for people."""

    path: str
    reason: str
    detail: str


Entry = Prediction | Reject
