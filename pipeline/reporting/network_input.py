"""Images as a network sees them: after crop and standardisation, or augmented, so that they can be looked at."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.preprocessing import Preprocessing
from pipeline.dataset import Dataset
from pipeline.network import build_network
from pipeline.pretrained.resolve import resolve_pixels
from pipeline.recipe import Recipe, load
from pipeline.reporting.image_grid import NetworkViews
from pipeline.training.augmentations import Augmentations


def network_views(recipe_name: str, dataset: Dataset, runs_dir: Path, steps: int) -> NetworkViews:
    """Views of stored images by a recipe's crop, standardisation and augmentations. `runs_dir` holds the runs that it
    may name.

    Raises ConvlineError where the recipe's network does not accept the dataset.
    """
    recipe = resolve_pixels(load(recipe_name), dataset.meta, runs_dir)
    preprocessing = build_network(recipe, dataset.meta).preprocessing

    def seen(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
        return to_visible(preprocessing(torch.from_numpy(images)))

    def augmented(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
        return augmented_images(images, recipe, preprocessing, steps)

    return NetworkViews(seen, None if recipe.augment.is_off else augmented)


def augmented_images(
    images: NDArray[np.uint8], recipe: Recipe, preprocessing: Preprocessing, steps: int
) -> NDArray[np.uint8]:
    """A batch of stored images, uint8 [n, height, width, channels], as the recipe augments it at steps 0, 1, …, before
    standardisation, clipped to 0 to 255: uint8 [n, steps, height, width, channels]. mixup and CutMix take an image's
    partner from the batch."""
    augment = Augmentations(recipe.augment, preprocessing, recipe.train.seed, len(images))
    labels = torch.zeros(len(images), dtype=torch.int64)
    batches = []
    for step in range(steps):
        batch = augment(torch.from_numpy(images), step)
        if augment.needs_whole_batch:
            batch, _ = augment.mix(batch, labels, step)
        batches.append(batch.clamp(0, 255).to(torch.uint8))
    return torch.stack(batches, 1).numpy()


def to_visible(inputs: Tensor) -> NDArray[np.uint8]:
    """A network's inputs, float32 [batch, channels, height, width], as images to look at, uint8 [batch, height, width,
    channels]. Each is scaled to the range from black to white."""
    lowest, highest = (reduce(inputs, (1, 2, 3), keepdim=True) for reduce in (torch.amin, torch.amax))
    scaled = (255 * (inputs - lowest) / (highest - lowest).clamp(min=1e-12)).to(torch.uint8)
    return scaled.permute(0, 2, 3, 1).cpu().numpy()
