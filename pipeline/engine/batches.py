"""Batches as whole tensors. Which images a step sees is a function of (seed, step) alone."""

from __future__ import annotations

import mmap
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Literal

import numpy as np
import psutil
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.dataset import Split
from pipeline.engine.randomness import DRAW, generator

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
        self._rows = split.rows
        self._sampling = sampling
        self._size = batch_size
        self._seed = seed
        self._share = share
        self._passes: dict[int, NDArray[np.int64]] = {}
        room = free_memory(device) // 2 if memory_limit is None else memory_limit
        is_held = split.images.nbytes <= room
        self._images = Held(split, device) if is_held else Streamed(split, device)
        self._reader = None if is_held else ThreadPoolExecutor(1)
        self._ahead: deque[tuple[int, Future[Batch]]] = deque()
        where = f"held on {device}" if is_held else f"streamed from disk, being more than {room / 1e6:,.0f} MB"
        self.whereabouts = f"{split.images.nbytes / 1e6:,.0f} MB of training images, {where}"

    def draw(self, step: int) -> Batch:
        """Images, uint8 [share, height, width, channels], and labels, int64 [share], of `step`."""
        if self._reader is None:
            return self._read(step)
        if self._ahead and self._ahead[0][0] != step:
            self._ahead.clear()
        for later in range(step + len(self._ahead), step + AHEAD + 1):
            self._ahead.append((later, self._reader.submit(self._read, later)))
        return self._ahead.popleft()[1].result()

    def _read(self, step: int) -> Batch:
        return self._images.take(self._rows[self.positions(step)[self._share]])

    def positions(self, step: int) -> NDArray[np.int64]:
        """Which images of the split `step` sees, int64 [batch]."""
        count = len(self._rows)
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
            self._passes[number] = generator(self._seed, DRAW, number).permutation(len(self._rows))
        return self._passes[number]


class Held:
    """A split's images on the device; on the CPU their map itself."""

    def __init__(self, split: Split, device: torch.device) -> None:
        self._images = torch.from_numpy(split.images).to(device)
        self._labels = torch.from_numpy(split.labels).to(device)
        self._device = device

    def take(self, rows: NDArray[np.int64]) -> Batch:
        index = torch.from_numpy(rows).to(self._device)
        return self._images.index_select(0, index), self._labels.index_select(0, index)


class Streamed:
    """A split's images in their map, copied to the device as they are needed, and then forgotten."""

    def __init__(self, split: Split, device: torch.device) -> None:
        self._split = split
        self._device = device

    def take(self, rows: NDArray[np.int64]) -> Batch:
        images, labels = self._split.images, self._split.labels
        batch = torch.from_numpy(images.take(rows, 0)), torch.from_numpy(labels.take(rows, 0))
        pages: object = images.base
        if isinstance(pages, mmap.mmap):
            pages.madvise(mmap.MADV_DONTNEED)  # else every page that was read counts as this process's memory
        if self._device.type == "cpu":
            return batch
        # from pinned memory a copy to the device runs beside its work
        return batch[0].pin_memory().to(self._device, non_blocking=True), batch[1].to(self._device)


def free_memory(device: torch.device) -> int:
    """Bytes."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)
