"""Finds labels that are probably wrong, by confident learning (Northcutt et al., "Confident Learning: Estimating
Uncertainty in Dataset Labels", 2021, arXiv:1911.00068).

A classifier that has not seen an image's label judges it. The images are divided into folds; a linear classifier is
fitted to the features of all folds but one and applied to that one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from pipeline.preparing.mapped_arrays import release_memory

FOLDS = 4
MOST_FITTED = 50_000  # images that a classifier is fitted to
# of the weights: penalty / images * ‖weight‖² / 2. On 10,000 and 60,000 images of CIFAR-10 the best of values that are
# three times apart, for accuracy and for the changed labels that are found
PENALTY = 450.0
ITERATIONS = 60
FEWEST = 10  # images of a class, below which its labels are not judged
CHUNK = 8192

Rows = NDArray[np.int64]
Probabilities = NDArray[np.float32]


class DoubtfulLabels(NamedTuple):
    """The most doubtful first. `rows` int64 [n]; `suggested` int64 [n], the most probable other labels; `probability`,
    float32 [n, 2]: of the given label, and of the suggested one."""

    rows: Rows
    suggested: Rows
    probability: Probabilities


def doubtful_labels(features: NDArray[np.floating], labels: Rows, classes: int, same_image: Rows) -> DoubtfulLabels:
    """The doubtful ones of `labels`, int64 [n], from `features`, [n, features]. Rows with one number in `same_image`,
    int64 [n], show the same picture: they are in one fold. Classes with fewer than FEWEST images are not judged.

    How many labels are wrong is estimated as in the paper: by the images labelled i for which another class j is at
    least as probable as it is, on average, for those labelled j. So many of those whose own label is least probable
    are doubtful.
    """
    judged = np.flatnonzero(np.bincount(labels, minlength=classes)[labels] >= FEWEST)
    given = labels[judged]
    if len(np.unique(given)) < 2:
        none = np.zeros(0, np.int64)
        return DoubtfulLabels(none, none, np.zeros((0, 2), np.float32))
    judges = CrossValidation(features, labels, classes, same_image, judged)
    own, other = np.empty(len(judged), np.float32), np.empty(len(judged), np.float32)
    for chunk, probabilities in judges.probabilities():
        own[chunk] = probabilities[np.arange(len(chunk)), given[chunk]]
    counts = np.bincount(given, minlength=classes)
    mean = np.where(counts > 0, np.bincount(given, own, classes) / counts.clip(min=1), np.inf)
    suggested, wrong = np.empty(len(judged), np.int64), 0
    for chunk, probabilities in judges.probabilities():
        confident = np.where(probabilities >= mean, probabilities, -1)
        wrong += int(((confident.argmax(1) != given[chunk]) & (confident.max(1) >= 0)).sum())
        probabilities[np.arange(len(chunk)), given[chunk]] = -1
        suggested[chunk], other[chunk] = probabilities.argmax(1), probabilities.max(1)
    order = np.argsort(own, kind="stable")
    doubtful = order[other[order] > own[order]][:wrong]
    return DoubtfulLabels(judged[doubtful], suggested[doubtful], np.stack([own[doubtful], other[doubtful]], 1))


class CrossValidation:
    """Linear classifiers, one for each fold of the images at `rows`, which has not seen them."""

    def __init__(
        self, features: NDArray[np.floating], labels: Rows, classes: int, same_image: Rows, rows: Rows
    ) -> None:
        rng = np.random.default_rng(0)
        numbers = np.unique(same_image[rows], return_inverse=True)[1]
        self._fold = (rng.permutation(numbers.max() + 1) % FOLDS)[numbers]
        self._features, self._rows = features, rows
        self._classifiers = []
        for number in range(FOLDS):
            seen = np.flatnonzero(self._fold != number)
            if len(seen) > MOST_FITTED:
                seen = np.sort(rng.choice(seen, MOST_FITTED, replace=False))
            self._classifiers.append(_LinearClassifier(_read(features, rows[seen]), labels[rows[seen]], classes))

    def probabilities(self) -> Iterator[tuple[Rows, Probabilities]]:
        """Positions in `rows`, int64 [n], and the probability of each class, float32 [n, classes], in chunks: those of
        all images may be more than the memory holds."""
        for number, classifier in enumerate(self._classifiers):
            left_out = np.flatnonzero(self._fold == number)
            for start in range(0, len(left_out), CHUNK):
                chunk = left_out[start : start + CHUNK]
                yield chunk, classifier.probabilities(_read(self._features, self._rows[chunk]))


def _read(features: NDArray[np.floating], rows: Rows) -> NDArray[np.floating]:
    """Some rows of features, which may be mapped from a file: their pages are released again."""
    copied = np.empty((len(rows), features.shape[1]), features.dtype)
    for start in range(0, len(rows), CHUNK):
        copied[start : start + CHUNK] = features[rows[start : start + CHUNK]]
        release_memory(features)
    return copied


class _LinearClassifier:
    """Multinomial logistic regression on standardised features, with an L2 penalty, by L-BFGS."""

    def __init__(self, features: NDArray[np.floating], labels: Rows, classes: int) -> None:
        x, y = torch.from_numpy(features).float(), torch.from_numpy(labels)
        self._mean, self._std = x.mean(0), x.std(0).clamp(min=1e-6)
        x = self._standardized(x)
        self._weight = torch.zeros((x.shape[1], classes), requires_grad=True)
        self._bias = torch.zeros(classes, requires_grad=True)
        parameters = [self._weight, self._bias]
        optimizer = torch.optim.LBFGS(parameters, max_iter=ITERATIONS, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optimizer.zero_grad()
            penalty = PENALTY / len(x) / 2 * self._weight.square().sum()
            value = F.cross_entropy(torch.addmm(self._bias, x, self._weight), y) + penalty
            value.backward()
            return value

        optimizer.step(loss)

    def _standardized(self, x: Tensor) -> Tensor:
        return x.sub_(self._mean).div_(self._std)

    @torch.no_grad()
    def probabilities(self, features: NDArray[np.floating]) -> Probabilities:
        x = self._standardized(torch.from_numpy(features).float())
        return torch.addmm(self._bias, x, self._weight).softmax(1).numpy()
