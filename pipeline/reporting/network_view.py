"""What a network sees of an image, made visible."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.dataset import Dataset
from pipeline.network import build_network
from pipeline.recipe import load
from pipeline.reporting.image_grid import View


def seen_by(recipe: str, dataset: Dataset) -> View:
    """Images after a recipe's crop and standardisation, each scaled to the range from black to white.

    Raises ConvlineError where the recipe's network does not accept the dataset.
    """
    preprocessing = build_network(load(recipe), dataset.meta).preprocessing

    return lambda images: visible(preprocessing(torch.from_numpy(images)))


def visible(seen: Tensor) -> NDArray[np.uint8]:
    """What goes into a network, float32 [batch, channels, height, width], as images to look at, uint8 [batch, height,
    width, channels]: each scaled to the range from black to white."""
    lowest, highest = (edge(seen, (1, 2, 3), keepdim=True) for edge in (torch.amin, torch.amax))
    scaled = (255 * (seen - lowest) / (highest - lowest).clamp(min=1e-12)).to(torch.uint8)
    return scaled.permute(0, 2, 3, 1).cpu().numpy()
