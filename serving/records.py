"""The result for a file: a `Prediction`, or a `Reject` with the reason why the file was not classified."""

from __future__ import annotations

from dataclasses import dataclass

UNSURE = "unsure"  # the decision where the most probable class is not probable enough


@dataclass(frozen=True)
class Prediction:
    """The k most probable classes of one file, most probable first."""

    path: str
    labels: tuple[str, ...]
    probabilities: tuple[float, ...]


@dataclass(frozen=True)
class Reject:
    """A file that could not be classified; `reason` is a code (`convline.errors.Reason`), `detail` is for people."""

    path: str
    reason: str
    detail: str


Entry = Prediction | Reject
