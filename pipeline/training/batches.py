"""Batches as whole tensors. Which images a step sees is a function of (seed, step) alone."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Literal

import numpy as np
import psutil
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.dataset import Split
from pipeline.training.memory import moved
from pipeline.training.randomness import DRAW, generator

AHEAD = 3  # batches read before they are needed

Batch = tuple[Tensor, Tensor]


class Batches:
    """Batches of a training split on `device`; of each only this process's `share`.

    "epoch": shuffled passes, one after the other, so that a batch may end one and begin the next;
    "independent": a fresh draw without repeats each step. Images of more than `memory_limit` bytes (default: half
    of the device's free memory) are not held on the device but read from disk, by a thread, some steps ahead.
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
        memory_limit: int | None = None,
    ) -> None:
        if sampling == "independent" and batch_size > len(split):
            raise ValueError(f"batch_size {batch_size} exceeds the {len(split)} training images")
        self._split = split
        self._device = device
        self._sampling = sampling
        self._size = batch_size
        self._seed = seed
        self._share = share
        self._passes: dict[int, NDArray[np.int64]] = {}
        room = free_memory(device) // 2 if memory_limit is None else memory_limit
        is_held = split.images.nbytes <= room
        self._held = Held(split, device) if is_held else None
        self._reader = ThreadPoolExecutor(1)
        self._ahead: deque[tuple[int, Future[Batch]]] = deque()
        where = f"held on {device}" if is_held else f"streamed from disk, being more than {room / 1e6:,.0f} MB"
        self.whereabouts = f"{split.images.nbytes / 1e6:,.0f} MB of training images, {where}"

    def draw(self, step: int) -> Batch:
        """Images, uint8 [share, height, width, channels], and labels, int64 [share], of `step`."""
        if self._held is not None:
            return self._held.take(self._chosen(step))
        if self._ahead and self._ahead[0][0] != step:
            self._ahead.clear()
        for later in range(step + len(self._ahead), step + AHEAD + 1):
            self._ahead.append((later, self._reader.submit(self._read, later)))
        images, labels = self._ahead.popleft()[1].result()
        return moved(images, self._device), moved(labels, self._device)

    def _read(self, step: int) -> Batch:
        """A batch from disk."""
        rows = self._chosen(step)
        batch = torch.from_numpy(self._split.images.take(rows, 0)), torch.from_numpy(self._split.labels.take(rows, 0))
        self._split.release_memory()
        return batch if self._device.type == "cpu" else (batch[0].pin_memory(), batch[1].pin_memory())

    def _chosen(self, step: int) -> NDArray[np.int64]:
        """Rows of the prepared arrays: this process's share of what `step` sees."""
        return self._split.rows[self.positions(step)[self._share]]

    def positions(self, step: int) -> NDArray[np.int64]:
        """Which images of the split `step` sees, int64 [batch]."""
        count = len(self._split)
        if self._sampling == "independent":
            return generator(self._seed, DRAW, step).choice(count, self._size, replace=False)
        number, start = divmod(step * self._size, count)
        if start + self._size <= count:
            return self._pass(number)[start : start + self._size]
        places = np.arange(start, start + self._size)
        passes = range(places[-1] // count + 1)
        return np.concatenate([self._pass(number + k)[places[places // count == k] % count] for k in passes])

    def _pass(self, number: int) -> NDArray[np.int64]:
        """The order of one pass over the split."""
        if number not in self._passes:
            self._passes = {k: v for k, v in self._passes.items() if k == number - 1}
            self._passes[number] = generator(self._seed, DRAW, number).permutation(len(self._split))
        return self._passes[number]


class Held:
    """A split's images on the device; on the CPU their map itself."""

    def __init__(self, split: Split, device: torch.device) -> None:
        self._images = torch.from_numpy(split.images).to(device)
        self._labels = torch.from_numpy(split.labels).to(device)
        self._device = device

    def take(self, rows: NDArray[np.int64]) -> Batch:
        index = moved(torch.from_numpy(rows), self._device)
        return self._images.index_select(0, index), self._labels.index_select(0, index)


def free_memory(device: torch.device) -> int:
    """Bytes."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)
