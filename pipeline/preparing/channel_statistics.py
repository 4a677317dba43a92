"""Mean and standard deviation of each channel, for per-channel standardisation."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pipeline.preparing.mapped_arrays import chunks


def mean_and_std(images: NDArray[np.uint8]) -> tuple[list[float], list[float]]:
    """Mean and population standard deviation of each channel of [n, height, width, channels], in 0 to 255; exact, as
    they are computed from histograms."""
    channels = images.shape[-1]
    histogram = np.zeros((channels, 256))
    for chunk in chunks(images):
        for channel in range(channels):
            histogram[channel] += np.bincount(images[chunk, ..., channel].ravel(), minlength=256)
    share = histogram / histogram.sum(1, keepdims=True)
    values = np.arange(256)
    mean = share @ values
    variance = share @ values**2 - mean**2
    return mean.tolist(), np.sqrt(np.maximum(variance, 0)).tolist()
