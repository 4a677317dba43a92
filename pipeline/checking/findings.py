"""What `pipeline check` finds in a dataset, as a table for the terminal and as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.preparing.image_sizes import lines_about_odd_sizes
from pipeline.preparing.skipped_files import escape_unprintable

TINY_CLASS = 10  # training images: with fewer, a class is hardly learned
IMBALANCE = 10  # times as many images in the largest class as in the smallest
LISTED = 10  # pairs, and doubtful labels, on the terminal


@dataclass(frozen=True)
class NamedImage:
    """An image of a dataset: its split and row, its path in the source (or its split and row), and its class."""

    split: str
    row: int
    path: str
    label: str


@dataclass(frozen=True)
class Pair:
    """Two images that show the same; `is_equal`: in every pixel."""

    first: NamedImage
    second: NamedImage
    is_equal: bool

    @property
    def is_leak(self) -> bool:
        return self.first.split != self.second.split

    @property
    def has_two_labels(self) -> bool:
        return self.first.label != self.second.label


@dataclass(frozen=True)
class DoubtfulLabel:
    """An image whose label is probably wrong: `suggested`, the most probable other label; the probabilities of both."""

    image: NamedImage
    suggested: str
    probability: float
    suggested_probability: float


@dataclass(frozen=True)
class Check:
    """What was found in a dataset. `doubtful_labels`: the most doubtful first; None where they were not looked for.
    `odd_sizes`: as in meta.json. `tiny_classes`: by name, their number of training images. `imbalance`: how many times
    as many training images the largest class has as the smallest. `seconds`: that the check took."""

    dataset: str
    images: int
    pairs: list[Pair]
    doubtful_labels: list[DoubtfulLabel] | None
    blank: list[NamedImage]
    odd_sizes: dict[str, Any]
    tiny_classes: dict[str, int]
    imbalance: float
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        pairs = [asdict(pair) | {"is_leak": pair.is_leak, "has_two_labels": pair.has_two_labels} for pair in self.pairs]
        return asdict(self) | {"pairs": pairs}

    @property
    def worst_pairs(self) -> list[Pair]:
        """Those in two splits first, then those under two labels."""
        return sorted(self.pairs, key=lambda pair: (not pair.is_leak, not pair.has_two_labels))

    def table(self) -> str:
        """For the terminal."""
        return "\n".join([*self._pair_lines(), *self._label_lines(), *self._other_lines()])

    def _pair_lines(self) -> Iterator[str]:
        yield f"{self.dataset}: {self.images:,} images"
        yield f"{'':22}{'pairs':>7}{'in two splits':>15}{'two labels':>12}"
        equal = [pair for pair in self.pairs if pair.is_equal]
        near = [pair for pair in self.pairs if not pair.is_equal]
        for name, pairs in (("same pixels", equal), ("near duplicates", near)):
            leaks, two_labels = sum(pair.is_leak for pair in pairs), sum(pair.has_two_labels for pair in pairs)
            yield f"{name:22}{len(pairs):7,}{leaks:15,}{two_labels:12,}"
        for pair in self.worst_pairs[:LISTED]:
            same = "=" if pair.is_equal else "≈"
            yield f"  {_described(pair.first)} {same} {_described(pair.second)}"
        yield from _rest(self.pairs)

    def _label_lines(self) -> Iterator[str]:
        if self.doubtful_labels is None:
            yield "labels were not judged (--quick)"
            return
        yield f"doubtful labels: {len(self.doubtful_labels):,}"
        for doubtful in self.doubtful_labels[:LISTED]:
            suggestion = f"{escape_unprintable(doubtful.suggested)} {doubtful.suggested_probability:.0%}"
            yield f"  {_described(doubtful.image)}: {doubtful.probability:.0%}, rather {suggestion}"
        yield from _rest(self.doubtful_labels)

    def _other_lines(self) -> Iterator[str]:
        if self.blank:
            yield f"blank images: {len(self.blank):,}, such as {escape_unprintable(self.blank[0].path)}"
        yield from lines_about_odd_sizes(self.odd_sizes)
        if self.tiny_classes:
            tiny = ", ".join(f"{escape_unprintable(name)} ({count})" for name, count in self.tiny_classes.items())
            yield f"classes with fewer than {TINY_CLASS} training images: {tiny}"
        if self.imbalance >= IMBALANCE:
            yield (
                f"the largest class has {self.imbalance:.0f} times as many training images as the smallest; "
                'data.sampling = "balanced" shows each equally often'
            )
        yield f"took {self.seconds:.0f} s"


def _rest(found: Sequence[Any]) -> Iterator[str]:
    if len(found) > LISTED:
        yield f"  … and {len(found) - LISTED:,} more; --report shows them, --json lists them"


def _described(image: NamedImage) -> str:
    return f"{escape_unprintable(image.path)} ({image.split}, {escape_unprintable(image.label)})"
