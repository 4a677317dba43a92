"""Images as a network sees them: after crop and standardisation, scaled so that they can be looked at."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.dataset import Dataset
from pipeline.network import build_network
from pipeline.recipe import load
from pipeline.reporting.image_grid import View
from pipeline.training.resolved_weights import resolve_pixels


def network_view(recipe: str, dataset: Dataset, runs_dir: Path) -> View:
    """A function that applies a recipe's crop and standardisation to stored images and makes the result visible.
    `runs_dir` holds the runs that it may name.

    Raises ConvlineError where the recipe's network does not accept the dataset.
    """
    preprocessing = build_network(resolve_pixels(load(recipe), dataset.meta, runs_dir), dataset.meta).preprocessing

    return lambda images: to_visible(preprocessing(torch.from_numpy(images)))


def to_visible(inputs: Tensor) -> NDArray[np.uint8]:
    """A network's inputs, float32 [batch, channels, height, width], as images to look at, uint8 [batch, height, width,
    channels]. Each is scaled to the range from black to white."""
    lowest, highest = (reduce(inputs, (1, 2, 3), keepdim=True) for reduce in (torch.amin, torch.amax))
    scaled = (255 * (inputs - lowest) / (highest - lowest).clamp(min=1e-12)).to(torch.uint8)
    return scaled.permute(0, 2, 3, 1).cpu().numpy()
