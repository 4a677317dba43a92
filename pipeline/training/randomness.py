"""Random numbers and seeds: all randomness of a training is a function of (seed, step).

So no random state is saved, and any step can be repeated.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch

from pipeline.training.torch_internals import seed_generator

# each use of random numbers has its own stream
DRAW = 1
DROPOUT = 2
AUGMENT = 3  # random crop, flip, brightness, contrast
CLASSES, MEMBERS = 4, 5  # of balanced sampling: the order of the classes, and of the images of each
RESIZED_CROP, VERTICAL_FLIP, ROTATE, TRIVIAL, COLOR_JITTER, ERASING, MIX = range(10, 17)
ALTERNATING_FLIP = 17


def generator(seed: int, stream: int, number: int) -> np.random.Generator:
    """The generator of one stream at step (or pass) `number`."""
    return np.random.default_rng([seed, stream, number])


def seed_step(seed: int, step: int, device: torch.device) -> None:
    """Make the random numbers of the forward pass, such as dropout masks, a function of (seed, step)."""
    # a hash mixes the seed as well as numpy's generator does, in microseconds
    digest = hashlib.blake2b(f"{seed} {DROPOUT} {step}".encode(), digest_size=8).digest()
    seed_generator(device, int.from_bytes(digest, "little") >> 1)
