"""Whether two runs differ by more than chance, given which of the same test images each classifies correctly."""

from __future__ import annotations

import base64
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

CHANCE = 0.05  # differences that are at least this probable between equally good runs may be chance


def packed_bits(hits: NDArray[np.bool_]) -> str:
    """Bools [n] as text: eight in a byte, base64."""
    return base64.b64encode(np.packbits(hits).tobytes()).decode()


def unpacked_bits(text: str, count: int) -> NDArray[np.bool_]:
    """The first `count` bools of `packed_bits`. Raises ValueError for text that holds another number of bytes."""
    packed = np.frombuffer(base64.b64decode(text, validate=True), np.uint8)
    if len(packed) != -(-count // 8):
        raise ValueError(f"{len(packed)} bytes for {count} images")
    return np.unpackbits(packed, count=count).astype(bool)


@dataclass(frozen=True)
class PairedComparison:
    """Of the same images, how many only the first run classifies correctly, and how many only the second."""

    only_first: int
    only_second: int

    @classmethod
    def of(cls, first: NDArray[np.bool_], second: NDArray[np.bool_]) -> PairedComparison:
        """`first` and `second`: which images each run classifies correctly, bool [n]."""
        return cls(int((first & ~second).sum()), int((second & ~first).sum()))

    @property
    def probability(self) -> float:
        """How probable a difference of this size or more is between equally good runs: McNemar's test, exact.

        (McNemar, Note on the Sampling Error of the Difference Between Correlated Proportions, 1947.)
        """
        from scipy.stats import binomtest

        differing = self.only_first + self.only_second
        return float(binomtest(self.only_first, differing).pvalue) if differing else 1.0

    def sentence(self, first: str, second: str) -> str:
        """The result in words, with the names of the runs."""
        better, worse = (first, second) if self.only_first >= self.only_second else (second, first)
        more, fewer = max(self.only_first, self.only_second), min(self.only_first, self.only_second)
        probability = self.probability
        surely = f"{better} is better by more than chance"
        verdict = surely if probability < CHANCE else "the difference may be chance"
        return (
            f"only {better} is right on {more:,} test images, only {worse} on {fewer:,}: {verdict} "
            f"(McNemar, p = {probability:.2g})"
        )
