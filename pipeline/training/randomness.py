"""All randomness of a training is a function of (seed, step): nothing random is saved, any step can be redone."""

from __future__ import annotations

import hashlib

import numpy as np
import torch

# streams of random numbers, one a use
DRAW = 1
DROPOUT = 2
DISTORT = 3


def generator(seed: int, use: int, number: int) -> np.random.Generator:
    """The random numbers of one use at one step (or pass)."""
    return np.random.default_rng([seed, use, number])


def seed_step(seed: int, step: int, device: torch.device) -> None:
    """Make what a network draws in its forward pass, such as dropout masks, a function of (seed, step)."""
    digest = hashlib.blake2b(f"{seed} {DROPOUT} {step}".encode(), digest_size=8).digest()  # as good, and quick
    # torch.manual_seed takes 1.5 ms, and memory, to remember the call for every device that is not in use
    generator = torch.cuda.default_generators[device.index] if device.type == "cuda" else torch.default_generator
    generator.manual_seed(int.from_bytes(digest, "little") >> 1)
