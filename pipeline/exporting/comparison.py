"""Run two implementations of a model on the same images (real, hostile and boundary images) and compare them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from convline.images import ImageSpec
from pipeline.dataset import Split
from pipeline.exporting.boundary_images import BoundaryImages
from pipeline.exporting.parity_result import NamedBatch, Parity
from pipeline.network import Predict
from serving.batch_size import SERVING_BATCH

HOSTILE_BATCHES = (1, 2, 3, 17)
HOSTILE_NAMES = ("black", "white", "noise", "one hot pixel")
REAL_AMONG_HOSTILE = 64  # real images that are mixed with the hostile ones
NOISE_SEED = 20151109


def compare_models(
    parity: Parity, reference: Predict, candidate: Predict, real: Iterator[NamedBatch], spec: ImageSpec
) -> None:
    """Add the outputs of both models to `parity`.

    For all batches of real images; for the first 64 of these together with hostile images, in batches of 1, 2, 3 and
    17; and, where logits have a tolerance, for boundary images.
    """
    first_batches: list[NamedBatch] = []
    boundary_images = BoundaryImages(len(parity.classes))
    for batch in real:
        outputs = reference(batch.images)
        parity.add(batch, outputs, candidate(batch.images))
        boundary_images.add(batch.images, outputs[1].argmax(1))
        if sum(len(first.images) for first in first_batches) < REAL_AMONG_HOSTILE:
            first_batches.append(batch)
    names = [name for first in first_batches for name in first.names][:REAL_AMONG_HOSTILE] + list(HOSTILE_NAMES)
    real_images = np.concatenate([first.images for first in first_batches])[:REAL_AMONG_HOSTILE]
    mixed = np.concatenate([real_images, hostile_images(spec)])
    for size in HOSTILE_BATCHES:
        for start in range(0, len(mixed), size):
            batch = NamedBatch(names[start : start + size], mixed[start : start + size])
            parity.add(batch, reference(batch.images), candidate(batch.images), is_real=False)
    if parity.tolerance.logit is not None:
        blends = boundary_images.near_boundary(reference)
        for start in range(0, len(blends), SERVING_BATCH):
            images = blends[start : start + SERVING_BATCH]
            parity.add_boundary_images(reference(images)[1], candidate(images)[1])


def split_batches(split: Split) -> Iterator[NamedBatch]:
    """A split in batches of the size that serving uses; the last one may be shorter."""
    start = 0
    for images, labels in split.batches(SERVING_BATCH):
        yield NamedBatch([f"{split.name} {start + i}" for i in range(len(images))], images, labels)
        start += len(images)


def hostile_images(spec: ImageSpec) -> NDArray[np.uint8]:
    """Black, white, noise and one hot pixel, uint8 [4, height, width, channels]."""
    assert spec.height and spec.width
    images = np.zeros((4, spec.height, spec.width, spec.channels), np.uint8)
    images[1] = 255
    images[2] = np.random.default_rng(NOISE_SEED).integers(0, 256, images[2].shape)
    images[3, spec.height // 2, spec.width // 2] = 255
    return images
