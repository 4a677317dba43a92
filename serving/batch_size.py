"""The smallest batch size that runs at nearly the highest rate: larger batches are no faster."""

from __future__ import annotations

import time

import numpy as np

from serving.model import MAX_PIXELS, Model

SIZES = tuple(2**power for power in range(10))
ENOUGH = 0.95  # of the highest rate
SECONDS = 0.1  # of each size, at least three runs
LIMIT = 3.0  # seconds for all


def fastest_batch_size(model: Model) -> int:
    """The smallest batch that runs at 95% of the highest images/s."""
    return fastest_of(batch_rates(model))


def fastest_of(rates: dict[int, float]) -> int:
    """The batch size to choose by these images/s of each size."""
    return min(size for size, rate in rates.items() if rate >= ENOUGH * max(rates.values()))


def batch_rates(model: Model) -> dict[int, float]:
    """Images/s by batch size, from the smallest up, until it falls, the time is up, or a batch gets too large."""
    rates: dict[int, float] = {}
    began = time.perf_counter()
    pixels = (model.spec.height or 0) * (model.spec.width or 0)
    for size in SIZES if model.batch is None else (model.batch,):
        if rates and (size * pixels > 4 * MAX_PIXELS or time.perf_counter() - began > LIMIT):
            break
        rates[size] = size / _seconds(model, size)
        if rates[size] < 0.8 * max(rates.values()):
            break
    return rates


def _seconds(model: Model, size: int) -> float:
    """The median time of a run."""
    images = np.random.default_rng(0).integers(
        0, 256, (size, model.spec.height or 0, model.spec.width or 0, model.spec.channels), np.uint8
    )
    model.run(images)
    times: list[float] = []
    while sum(times) < SECONDS or len(times) < 3:
        began = time.perf_counter()
        model.run(images)
        times.append(time.perf_counter() - began)
        if sum(times) > LIMIT:
            break
    return float(np.median(times))
