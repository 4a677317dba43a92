"""Loads training batches as whole tensors, from device memory or streamed from disk, and shuffles.

Which images a step sees is a function of (seed, step) alone.
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.dataset import Split
from pipeline.device import copy_to_device, free_memory
from pipeline.training.randomness import ALTERNATING_FLIP, CLASSES, DRAW, MEMBERS, generator

PREFETCHED = 3  # batches that are read from disk ahead of time

Batch = tuple[Tensor, Tensor]


class BatchLoader:
    """Batches of a training split on `device`; of each batch only this process's `share`.

    `sampling` "epoch": shuffled passes over the split, one after the other; a batch may end one and begin the next.
    "independent": each step draws anew, without repeats within a batch. "balanced": the images of a batch are of
    all classes in turn, in an order that is shuffled each time; each class goes through shuffled passes of its own.
    Where the images take more than `memory_limit` bytes (default: half of the device's free memory), they are not
    held on the device: a thread reads them from disk, some steps ahead. Raises ValueError where sampling is
    independent and a batch is larger than the split."""

    def __init__(
        self,
        split: Split,
        sampling: Literal["epoch", "independent", "balanced"],
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
        self._batch_size = batch_size
        self._seed = seed
        self._share = share
        self._permutations: dict[int, NDArray[np.int64]] = {}
        self._classes = _ClassPasses(split, seed) if sampling == "balanced" else None
        limit = free_memory(device) // 2 if memory_limit is None else memory_limit
        is_held = split.images.nbytes <= limit
        self._held = _ImagesOnDevice(split, device) if is_held else None
        self._reader = ThreadPoolExecutor(1)
        self._prefetched: deque[tuple[int, Future[Batch]]] = deque()
        where = f"held on {device}" if is_held else f"streamed from disk: they are more than {limit / 1e6:,.0f} MB"
        self.description = f"{split.images.nbytes / 1e6:,.0f} MB of training images, {where}"

    def __len__(self) -> int:
        """The number of images in a batch, over all ranks."""
        return self._batch_size

    def load(self, step: int) -> Batch:
        """The images, uint8 [share, height, width, channels], and labels, int64 [share], of `step`."""
        if self._held is not None:
            return self._held.take(self._rows(step))
        if self._prefetched and self._prefetched[0][0] != step:
            self._prefetched.clear()
        for later in range(step + len(self._prefetched), step + PREFETCHED + 1):
            self._prefetched.append((later, self._reader.submit(self._read, later)))
        images, labels = self._prefetched.popleft()[1].result()
        return copy_to_device(images, self._device), copy_to_device(labels, self._device)

    def _read(self, step: int) -> Batch:
        """The batch of `step`, read from disk; in pinned memory for an accelerator."""
        rows = self._rows(step)
        batch = torch.from_numpy(self._split.images.take(rows, 0)), torch.from_numpy(self._split.labels.take(rows, 0))
        self._split.release_memory()
        return batch if self._device.type == "cpu" else (batch[0].pin_memory(), batch[1].pin_memory())

    def labels(self, step: int) -> Tensor:
        """The labels of this process's share of `step`, int64 [share], without reading images."""
        return copy_to_device(torch.from_numpy(self._split.labels[self._rows(step)]), self._device)

    def _rows(self, step: int) -> NDArray[np.int64]:
        """The rows of the prepared arrays in this process's share of `step`."""
        return self._split.rows[self.positions(step)[self._share]]

    def positions(self, step: int) -> NDArray[np.int64]:
        """The positions in the split of all images that `step` sees, int64 [batch]."""
        count = len(self._split)
        if self._classes is not None:
            return self._classes.positions(np.arange(step * self._batch_size, (step + 1) * self._batch_size))
        if self._sampling == "independent":
            return generator(self._seed, DRAW, step).choice(count, self._batch_size, replace=False)
        epoch, start = divmod(step * self._batch_size, count)
        if start + self._batch_size <= count:
            return self._permutation(epoch)[start : start + self._batch_size]
        # the batch continues in the next pass, or in several where it is larger than the split
        offsets = np.arange(start, start + self._batch_size)
        passes = range(offsets[-1] // count + 1)
        return np.concatenate([self._permutation(epoch + k)[offsets[offsets // count == k] % count] for k in passes])

    def mirrored(self, step: int) -> Tensor:
        """Which images of this process's share of `step` alternating flips mirror, bool [share]: a half of the split in
        even passes, the other half in odd ones. For sampling "epoch"."""
        passes = np.arange(step * self._batch_size, (step + 1) * self._batch_size) // len(self._split)
        mirrored = self._mirrored_in_even_passes[self.positions(step)] ^ (passes % 2 == 1)
        return copy_to_device(torch.from_numpy(mirrored[self._share]), self._device)

    @cached_property
    def _mirrored_in_even_passes(self) -> NDArray[np.bool_]:
        return generator(self._seed, ALTERNATING_FLIP, 0).random(len(self._split)) < 0.5

    def _permutation(self, epoch: int) -> NDArray[np.int64]:
        """The order of the images in one pass over the split; the last two passes are cached."""
        if epoch not in self._permutations:
            self._permutations = {k: order for k, order in self._permutations.items() if k == epoch - 1}
            self._permutations[epoch] = generator(self._seed, DRAW, epoch).permutation(len(self._split))
        return self._permutations[epoch]


class _ClassPasses:
    """All classes of a split equally often: a sequence of positions that is a function of the seed."""

    def __init__(self, split: Split, seed: int) -> None:
        labels = split.labels[split.rows]
        self._seed = seed
        self._members = [np.flatnonzero(labels == label) for label in np.unique(labels)]  # positions, by class
        self._orders: dict[int, tuple[int, NDArray[np.int64]]] = {}  # by class: the number of a pass, and its order

    def positions(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """The positions at `numbers`, ascending, of the sequence."""
        count = len(self._members)
        turns = np.unique(numbers // count)
        orders = {turn: generator(self._seed, CLASSES, turn).permutation(count) for turn in turns}
        return np.array([self._member(orders[n // count][n % count], n // count) for n in numbers], np.int64)

    def _member(self, number: int, turn: int) -> int:
        """The position of the image of class `number` in its `turn`-th turn."""
        members = self._members[number]
        wanted, index = divmod(int(turn), len(members))
        if self._orders.get(number, (-1,))[0] != wanted:
            self._orders[number] = (
                wanted,
                np.random.default_rng([self._seed, MEMBERS, number, wanted]).permutation(members),
            )
        return int(self._orders[number][1][index])


class _ImagesOnDevice:
    """All images and labels of a split on the device; on the CPU they stay in the memory-mapped file."""

    def __init__(self, split: Split, device: torch.device) -> None:
        self._images = torch.from_numpy(split.images).to(device)
        self._labels = torch.from_numpy(split.labels).to(device)
        self._device = device

    def take(self, rows: NDArray[np.int64]) -> Batch:
        index = copy_to_device(torch.from_numpy(rows), self._device)
        return self._images.index_select(0, index), self._labels.index_select(0, index)
