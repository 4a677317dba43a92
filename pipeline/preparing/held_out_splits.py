"""Held-out splits, stratified and seeded: the fifth that becomes test (TEST_SHARE), and a recipe's validation split."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from convline.errors import ConvlineError

TEST_SHARE = 0.2  # of each class, where the source has no test split
TEST_SEED = 0


def hold_out_test(labels: NDArray[np.int64], rows: NDArray[np.int64]) -> dict[str, NDArray[np.int64]]:
    """The rows of "train" and "test", from `rows` of a source without a test split; `labels` are of all its rows."""
    test = stratified_sample(labels[rows], TEST_SHARE, TEST_SEED)
    return {"train": np.delete(rows, test), "test": rows[test]}


def stratified_sample(labels: NDArray[np.int64], share: int | float, seed: int) -> NDArray[np.int64]:
    """Indices of a random sample that keeps the proportions of the classes, int64, ascending.

    `share` is the size of the sample (an int; classes with the largest remainders round up), or a fraction below 1 of
    each class (a float; rounded, but at least one image of a class that has two). Raises ConvlineError for a sample
    that would leave nothing.
    """
    classes, sizes = np.unique(labels, return_counts=True)
    if isinstance(share, float):
        quotas = np.maximum(np.round(sizes * share).astype(np.int64), sizes > 1)
    elif share < len(labels):
        exact = sizes * share / len(labels)
        quotas = np.floor(exact).astype(np.int64)
        quotas[np.argsort(quotas - exact, kind="stable")[: share - int(quotas.sum())]] += 1
    else:
        raise ConvlineError(f"cannot hold out {share} of {len(labels)} images; hold out fewer")
    generator = np.random.default_rng([seed, len(labels)])
    chosen = [
        generator.permutation(np.flatnonzero(labels == label))[:quota]
        for label, quota in zip(classes, quotas, strict=True)
    ]
    return np.sort(np.concatenate(chosen))
