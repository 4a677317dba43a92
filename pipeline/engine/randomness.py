"""All randomness of a training is a function of (seed, step): nothing random is saved, any step can be redone."""

from __future__ import annotations

import numpy as np
import torch

# streams of random numbers, one a use
DRAW = 1
DROPOUT = 2
DISTORT = 3


def generator(seed: int, use: int, number: int) -> np.random.Generator:
    """The random numbers of one use at one step (or pass)."""
    return np.random.default_rng([seed, use, number])


def seed_step(seed: int, step: int) -> None:
    """Make what a network draws in its forward pass, such as dropout masks, a function of (seed, step)."""
    (state,) = np.random.SeedSequence([seed, DROPOUT, step]).generate_state(1, np.uint64)
    torch.manual_seed(int(state >> 1))
