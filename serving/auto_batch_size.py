"""`--batch-size auto`: measure which batch size is the smallest that reaches nearly the highest rate."""

from __future__ import annotations

import time

import numpy as np

from serving.model import MAX_PIXELS, OnnxModel

SIZES = tuple(2**power for power in range(10))
NEARLY_HIGHEST = 0.95  # of the highest rate
SLOWER = 0.8  # of the highest rate; larger batches are not tried then
SECONDS_PER_SIZE = 0.1  # and at least three runs
MAX_SECONDS = 3.0  # for all sizes together, and for one size


def fastest_batch_size(model: OnnxModel) -> int:
    """Measure the smallest batch size that reaches 95% of the highest images/s."""
    return choose_batch_size(batch_rates(model))


def choose_batch_size(rates: dict[int, float]) -> int:
    """The smallest batch size that reaches 95% of the highest rate; `rates` holds images/s by batch size."""
    return min(size for size, rate in rates.items() if rate >= NEARLY_HIGHEST * max(rates.values()))


def batch_rates(model: OnnxModel) -> dict[int, float]:
    """Images/s by batch size, in ascending order.

    Stops when the rate falls, the time is up, or a batch needs too much memory.
    """
    rates: dict[int, float] = {}
    start = time.perf_counter()
    pixels = (model.spec.height or 0) * (model.spec.width or 0)
    for size in SIZES if model.batch is None else (model.batch,):
        if rates and (size * pixels > 4 * MAX_PIXELS or time.perf_counter() - start > MAX_SECONDS):
            break
        rates[size] = size / _seconds_per_run(model, size)
        if rates[size] < SLOWER * max(rates.values()):
            break
    return rates


def _seconds_per_run(model: OnnxModel, size: int) -> float:
    """The median time of one run on a batch of random images."""
    images = np.random.default_rng(0).integers(
        0, 256, (size, model.spec.height or 0, model.spec.width or 0, model.spec.channels), np.uint8
    )
    model.run(images)
    times: list[float] = []
    while sum(times) < SECONDS_PER_SIZE or len(times) < 3:
        start = time.perf_counter()
        model.run(images)
        times.append(time.perf_counter() - start)
        if sum(times) > MAX_SECONDS:
            break
    return float(np.median(times))
