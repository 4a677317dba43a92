"""Batches as whole tensors. Which images a step sees is a function of (seed, step) alone."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.dataset import Split
from pipeline.engine.randomness import DRAW, generator


class Batches:
    """Batches of a training split, kept on `device` as uint8; of each only this process's `share`.

    "epoch": shuffled passes, one after the other, so that a batch may end one and begin the next;
    "independent": a fresh draw without repeats each step.
    Raises ValueError where a batch is larger than the split and draws must not repeat.
    """

    def __init__(
        self,
        split: Split,
        sampling: Literal["epoch", "independent"],
        batch_size: int,
        seed: int,
        device: torch.device,
        share: slice = slice(None),
    ) -> None:
        if sampling == "independent" and batch_size > len(split):
            raise ValueError(f"batch_size {batch_size} exceeds the {len(split)} training images")
        self._rows = split.rows
        self._images = torch.from_numpy(split.images).to(device)
        self._labels = torch.from_numpy(split.labels).to(device)
        self._sampling = sampling
        self._size = batch_size
        self._seed = seed
        self._device = device
        self._share = share
        self._passes: dict[int, NDArray[np.int64]] = {}

    def draw(self, step: int) -> tuple[Tensor, Tensor]:
        """Images, uint8 [share, height, width, channels], and labels, int64 [share], of `step`."""
        index = torch.from_numpy(self._rows[self.positions(step)[self._share]]).to(self._device)
        return self._images.index_select(0, index), self._labels.index_select(0, index)

    def positions(self, step: int) -> NDArray[np.int64]:
        """Which images of the split `step` sees, int64 [batch]."""
        count = len(self._rows)
        if self._sampling == "independent":
            return generator(self._seed, DRAW, step).choice(count, self._size, replace=False)
        places = np.arange(step * self._size, (step + 1) * self._size)
        passes = range(places[0] // count, places[-1] // count + 1)
        return np.concatenate([self._pass(number)[places[places // count == number] % count] for number in passes])

    def _pass(self, number: int) -> NDArray[np.int64]:
        """The order of one pass over the split."""
        if number not in self._passes:
            self._passes = {k: v for k, v in self._passes.items() if k == number - 1}
            self._passes[number] = generator(self._seed, DRAW, number).permutation(len(self._rows))
        return self._passes[number]
