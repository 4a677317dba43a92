"""`Summary`: the counts and the speed of a classification, which are printed at its end, and its observers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from convline.inputs.input_file import InputFile
from serving.records import UNSURE, Entry, Reject


@dataclass
class Tally:
    """Counts of files; `classified + rejected == found`. Of the classified files `unsure` counts those below the
    threshold, None without one, and `unfamiliar` those unlike the training images, None where that was not asked for.
    """

    classified: int = 0
    unsure: int | None = None
    unfamiliar: int | None = None
    reasons: Counter[str] = field(default_factory=Counter)
    labels: Counter[str] = field(default_factory=Counter)

    @property
    def rejected(self) -> int:
        return self.reasons.total()

    @property
    def found(self) -> int:
        return self.classified + self.rejected

    def add(self, entry: Entry) -> None:
        if isinstance(entry, Reject):
            self.reasons[entry.reason] += 1
        else:
            self.classified += 1
            self.labels[entry.labels[0]] += 1
            if entry.decision is not None:
                self.unsure = (self.unsure or 0) + (entry.decision == UNSURE)
            if entry.unfamiliar is not None:
                self.unfamiliar = (self.unfamiliar or 0) + entry.is_unfamiliar


@dataclass(frozen=True)
class RescanCounts:
    """The files of the listing, `kept + classified_again + new`, and those that were in it before, `vanished`.

    Classified again are files that have changed, whose version is not known, that could not be read or took too long.
    """

    kept: int
    classified_again: int
    new: int
    vanished: int

    def sentence(self) -> str:
        again = f"classified {self.classified_again} again"
        return f"kept {self.kept}, {again}, {self.new} new, {self.vanished} vanished"


class Observer(Protocol):
    """Makes something else than the table from the results of a job, such as an HTML report."""

    def add(self, file: InputFile, entry: Entry) -> None:
        """Receive the next file, in the order of the listing, with its result."""

    def finish(self, summary: Summary) -> None:
        """Called after the last file."""


@dataclass
class Summary:
    """The result of a job: its counts and its speed. `resumed` counts the results that an earlier run had left.
    `rescan` is None if the job was no rescan.
    """

    provider: str
    seconds: float = 0.0
    resumed: int = 0
    rescan: RescanCounts | None = None
    tally: Tally = field(default_factory=Tally)
    observers: Sequence[Observer] = ()

    def add(self, file: InputFile, entry: Entry) -> None:
        """Count an entry, and pass it to the observers."""
        self.tally.add(entry)
        for observer in self.observers:
            observer.add(file, entry)

    def finish(self, seconds: float) -> None:
        self.seconds = seconds
        for observer in self.observers:
            observer.finish(self)

    @property
    def images_per_second(self) -> float:
        return (self.tally.found - self.resumed) / self.seconds if self.seconds else 0.0

    def to_dict(self) -> dict[str, Any]:
        return {
            "found": self.tally.found,
            "classified": self.tally.classified,
            "rejected": self.tally.rejected,
            "rejects_by_reason": dict(sorted(self.tally.reasons.items())),
            **({"unsure": self.tally.unsure} if self.tally.unsure is not None else {}),
            **({"unfamiliar": self.tally.unfamiliar} if self.tally.unfamiliar is not None else {}),
            "labels": dict(sorted(self.tally.labels.items())),
            "resumed": self.resumed,
            **({"rescan": asdict(self.rescan)} if self.rescan else {}),
            "seconds": round(self.seconds, 3),
            "images_per_second": round(self.images_per_second, 1),
            "provider": self.provider,
        }

    def sentence(self) -> str:
        tally = self.tally
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(tally.reasons.items()))
        return (
            f"classified {tally.classified} + rejected {tally.rejected} == found {tally.found}"
            f"{f' ({reasons})' if reasons else ''}"
            f"{f'; {tally.unsure} unsure' if tally.unsure is not None else ''}"
            f"{f'; {tally.unfamiliar} unfamiliar' if tally.unfamiliar is not None else ''}"
            f"{f'; {self.rescan.sentence()}' if self.rescan else ''}"
            f"{f'; {self.images_per_second:.0f} images/s on {self.provider}' if self.images_per_second else ''}"
        )
