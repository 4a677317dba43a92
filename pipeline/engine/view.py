"""What a network sees of an image, made visible."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.dataset import Dataset
from pipeline.engine.network import build_served
from pipeline.recipe import load
from pipeline.samples import View


def seen_by(recipe: str, dataset: Dataset) -> View:
    """Images after a recipe's crop and standardisation, each scaled to the range from black to white.

    Raises ConvlineError where the recipe's network does not accept the dataset.
    """
    preprocessing = build_served(load(recipe), dataset.meta).preprocessing

    def view(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
        seen = preprocessing(torch.from_numpy(images)).permute(0, 2, 3, 1)
        lowest, highest = (edge(seen, (1, 2, 3), keepdim=True) for edge in (torch.amin, torch.amax))
        return (255 * (seen - lowest) / (highest - lowest).clamp(min=1e-12)).to(torch.uint8).numpy()

    return view
