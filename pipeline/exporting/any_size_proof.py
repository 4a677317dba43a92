"""The proof of `export --any-size`: the graph resizes images as `convline.images` does, whatever their size."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from PIL import Image

from convline.errors import ImageError
from convline.images import ImageSpec, fit_pixels
from pipeline.exporting.resize_graph import RESIZED, resizing_part
from pipeline.exporting.tolerances import TIE
from serving.model import OnnxModel
from serving.session import open_session

# height, width: from one pixel to 12 megapixels; the stored size is added
SIZES = ((1, 1), (1, 300), (300, 1), (17, 31), (64, 48), (500, 333), (700, 1000), (3000, 4000))
PIXEL_TOLERANCE = 1  # of 255
PROBABILITY_TOLERANCE = 2e-3
SEED = 20151109


@dataclass(frozen=True)
class SizeDifference:
    """The largest differences between images that the graph resizes and the same ones that `convline.images` resizes:
    in pixels (of 255, and the share of values that differ at all) and in the file's probabilities."""

    height: int
    width: int
    pixels: int
    share: float
    probability: float
    top1_differences: int

    @property
    def problems(self) -> list[str]:
        size = f"{self.height}x{self.width}"
        pixels = f"pixels of images of {size} differ by {self.pixels} of 255"
        probability = f"|Δprobability| of images of {size} is {self.probability:.1e}"
        return [
            *([pixels] if self.pixels > PIXEL_TOLERANCE else []),
            *([probability] if not self.probability <= PROBABILITY_TOLERANCE else []),  # NaN fails
            *([f"top-1 of images of {size} differ"] if self.top1_differences else []),
        ]


@dataclass(frozen=True)
class AnySizeProof:
    """The differences at each size."""

    sizes: list[SizeDifference]

    @property
    def problems(self) -> list[str]:
        return [problem for size in self.sizes for problem in size.problems]

    def to_dict(self) -> dict[str, Any]:
        """What the file and parity.json hold."""
        tolerance = {"pixels": PIXEL_TOLERANCE, "probability": PROBABILITY_TOLERANCE}
        return {"sizes": [asdict(size) for size in self.sizes], "tolerance": tolerance}

    def sentence(self) -> str:
        """The result in a few words."""
        pixels, probability = (max(getattr(size, name) for size in self.sizes) for name in ("pixels", "probability"))
        return f"{len(self.sizes)} sizes: pixels differ by at most {pixels} of 255, |Δprobability| {probability:.1e}"


def prove_any_size(path: Path, model: OnnxModel) -> AnySizeProof:
    """Compare images that the file at `path`, opened as `model`, resizes itself with those that serving resizes.

    Sizes that serving refuses, as they would be resized to too many pixels, are left out.
    """
    part = resizing_part(onnx.load(path)).SerializeToString()
    session, _ = open_session(part, "cuda" if model.provider == "cuda" else "cpu", name=path)
    stored = (model.spec.height or 0, model.spec.width or 0)
    sizes = []
    for height, width in (*SIZES, stored):
        differences = []
        for image in _photographs(height, width, model.spec):
            try:
                expected = fit_pixels(image, model.spec)[None]
            except ImageError:
                continue
            pixels = np.asarray(image).reshape(1, height, width, model.spec.channels)
            resized = session.run([RESIZED], {"image": pixels})[0]
            differences.append(_compare(model, pixels, resized, expected))
        sizes += [_largest(differences)] if differences else []
    return AnySizeProof(sizes)


def _compare(model: OnnxModel, pixels: Any, resized: Any, expected: Any) -> SizeDifference:
    difference = np.abs(resized.astype(np.int16) - expected)
    (probability,), (reference,) = model.run(pixels)[0], model.run(expected)[0]
    is_other = bool(reference.max() - reference[probability.argmax()] > TIE)
    return SizeDifference(
        height=pixels.shape[1],
        width=pixels.shape[2],
        pixels=int(difference.max()),
        share=float(np.mean(difference > 0)),
        probability=float(np.abs(probability - reference).max()),
        top1_differences=int(is_other),
    )


def _largest(differences: list[SizeDifference]) -> SizeDifference:
    fields = [asdict(difference) for difference in differences]
    return SizeDifference(**{name: max(values[name] for values in fields) for name in fields[0]})


def _photographs(height: int, width: int, spec: ImageSpec) -> Iterator[Image.Image]:
    """A photograph and smooth noise, of one size."""
    from sklearn.datasets import load_sample_image

    noise = np.random.default_rng(SEED).integers(0, 256, (max(2, height // 8), max(2, width // 8), 3), np.uint8)
    for pixels in (load_sample_image("china.jpg"), noise):
        image = Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)
        yield image.convert("L") if spec.channels == 1 else image
