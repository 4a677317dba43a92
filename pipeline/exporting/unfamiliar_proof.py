"""The proof of `export --unfamiliar`: the exported file tells how unfamiliar an image is as PyTorch does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.exporting.tolerances import Tolerance

LARGEST_DIFFERENCE = 1e-3  # in float32, as a share of the distance, or of 1 where that is larger


@dataclass
class UnfamiliarProof:
    """How unfamiliar images are to a reference and to a candidate, over the images added so far.

    In float32, distances may differ by a thousandth. In lower precisions, images may be on different sides of 1: as
    many as may have another top-1 where there are no labels.
    """

    tolerance: Tolerance
    images: int = 0
    largest: float = 0.0
    sides_differ: int = 0

    def add(self, expected: NDArray[np.float32], found: NDArray[np.float32], is_real: bool = True) -> None:
        """Compare the distances, float32 [n], of a batch. Only real images count for the sides of 1."""
        with np.errstate(invalid="ignore"):
            differences = np.abs(expected - found) / np.maximum(1, np.abs(expected))
        # NaN stays: it fails every comparison
        self.largest = float(np.max([self.largest, differences.max()]))
        if is_real:
            self.images += len(expected)
            self.sides_differ += int(((expected > 1) != (found > 1)).sum())

    @property
    def problems(self) -> list[str]:
        """Why the candidate fails; empty if it passes."""
        if not np.isfinite(self.largest):
            return ["how unfamiliar an image is, is not a finite number"]
        if self.tolerance.probability is not None:
            text = f"|Δunfamiliar| is {self.largest:.1e} of the distance (allowed: {LARGEST_DIFFERENCE:g})"
            return [text] if self.largest > LARGEST_DIFFERENCE else []
        allowed = 4 * self.tolerance.allowed_losses(self.images)
        text = (
            f"{self.sides_differ} of {self.images} images are on the other side of unfamiliar 1 (allowed: {allowed:g})"
        )
        return [text] if self.sides_differ > allowed else []

    def to_dict(self) -> dict[str, Any]:
        """What the file and parity.json hold."""
        return {"images": self.images, "largest_relative_difference": self.largest, "sides_differ": self.sides_differ}

    def sentence(self) -> str:
        """The result in a few words."""
        return f"|Δunfamiliar| {self.largest:.1e} of the distance"
