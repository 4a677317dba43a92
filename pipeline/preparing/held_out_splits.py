"""Held-out splits, stratified and seeded: the fifth that becomes test (TEST_SHARE), and a recipe's validation split."""

from __future__ import annotations

from collections import Counter

import numpy as np
from numpy.typing import NDArray

from convline.errors import ConvlineError

TEST_SHARE = 0.2  # of each class, where the source has no test split
TEST_SEED = 0


def hold_out_test(
    labels: NDArray[np.int64], rows: NDArray[np.int64], groups: NDArray[np.int64]
) -> dict[str, NDArray[np.int64]]:
    """The rows of "train" and "test", from `rows` of a source without a test split; `labels` and `groups` (see
    `stratified_sample`) are of all its rows."""
    test = stratified_sample(labels[rows], TEST_SHARE, TEST_SEED, groups[rows])
    return {"train": np.delete(rows, test), "test": rows[test]}


def stratified_sample(
    labels: NDArray[np.int64], share: int | float, seed: int, groups: NDArray[np.int64] | None = None
) -> NDArray[np.int64]:
    """Indices of a random sample that keeps the proportions of the classes, int64, ascending.

    `share` is the size of the sample (an int; classes with the largest remainders round up), or a fraction below 1 of
    each class (a float; rounded, but at least one image of a class that has two). Images of one of the `groups`, int64
    [n], are all in the sample or all outside; the numbers of images of the classes then come near. Raises
    ConvlineError for a sample that would leave nothing.
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
    if groups is not None and len(np.unique(groups)) < len(groups):
        shares = dict(zip(classes.tolist(), (quotas / sizes).tolist(), strict=True))
        return _whole_groups(labels, shares, generator.permutation(len(labels)), groups)
    chosen = [
        generator.permutation(np.flatnonzero(labels == label))[:quota]
        for label, quota in zip(classes, quotas, strict=True)
    ]
    return np.sort(np.concatenate(chosen))


def _whole_groups(
    labels: NDArray[np.int64], shares: dict[int, float], order: NDArray[np.int64], groups: NDArray[np.int64]
) -> NDArray[np.int64]:
    """A sample of whole groups. The groups of the images in `order` are considered one after the other; one is taken
    where that brings the sample nearer to the `shares` of the classes among the images considered so far (by the sum of
    the squared differences)."""
    by_group = np.argsort(groups, kind="stable")
    _, starts = np.unique(groups[by_group], return_index=True)
    members = np.split(by_group, starts[1:])
    group_of = np.empty(len(groups), np.int64)
    for number, rows in enumerate(members):
        group_of[rows] = number
    missing = dict.fromkeys(shares, 0.0)  # by class, how many images fewer than its share the sample has
    taken = np.zeros(len(members), bool)
    for number in dict.fromkeys(group_of[order].tolist()):
        sizes = Counter(labels[members[number]].tolist())
        for label, size in sizes.items():
            missing[label] += shares[label] * size
        if sum((missing[label] - size) ** 2 - missing[label] ** 2 for label, size in sizes.items()) < 0:
            taken[number] = True
            for label, size in sizes.items():
                missing[label] -= size
    return np.flatnonzero(taken[group_of])
