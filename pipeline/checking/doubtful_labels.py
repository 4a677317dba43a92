"""Finds labels that are probably wrong, by confident learning (Northcutt et al., "Confident Learning: Estimating
Uncertainty in Dataset Labels", 2021, arXiv:1911.00068).

A classifier that has not seen an image's label judges it. The images are divided into folds; a linear classifier is
fitted to the features of all folds but one and applied to that one.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

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
    given, each = labels[judged], np.arange(len(judged))
    if len(np.unique(given)) < 2:
        none = np.zeros(0, np.int64)
        return DoubtfulLabels(none, none, np.zeros((0, 2), np.float32))
    probabilities = cross_validated(features, labels, classes, same_image, judged)
    own = probabilities[each, given]
    wrong = _estimated_wrong(probabilities, given)
    probabilities[each, given] = -1
    suggested = probabilities.argmax(1)
    other = probabilities[each, suggested]
    order = np.argsort(own, kind="stable")
    doubtful = order[other[order] > own[order]][:wrong]
    return DoubtfulLabels(judged[doubtful], suggested[doubtful], np.stack([own[doubtful], other[doubtful]], 1))


def _estimated_wrong(probabilities: Probabilities, given: Rows) -> int:
    """The sum of the confident joint outside its diagonal."""
    own = probabilities[np.arange(len(given)), given]
    sums, counts = np.bincount(given, own, probabilities.shape[1]), np.bincount(given, minlength=probabilities.shape[1])
    threshold = np.where(counts > 0, sums / counts.clip(min=1), np.inf)
    confident = np.where(probabilities >= threshold, probabilities, -1)
    return int(((confident.argmax(1) != given) & (confident.max(1) >= 0)).sum())


def cross_validated(
    features: NDArray[np.floating], labels: Rows, classes: int, same_image: Rows, rows: Rows
) -> Probabilities:
    """The probability of each class, float32 [rows, classes], by classifiers that have not seen the image."""
    rng = np.random.default_rng(0)
    numbers = np.unique(same_image[rows], return_inverse=True)[1]
    fold = (rng.permutation(numbers.max() + 1) % FOLDS)[numbers]
    probabilities = np.empty((len(rows), classes), np.float32)
    for number in range(FOLDS):
        seen = np.flatnonzero(fold != number)
        if len(seen) > MOST_FITTED:
            seen = np.sort(rng.choice(seen, MOST_FITTED, replace=False))
        classifier = _LinearClassifier(features[rows[seen]], labels[rows[seen]], classes)
        left_out = np.flatnonzero(fold == number)
        for chunk in np.array_split(left_out, -(-len(left_out) // CHUNK)):
            probabilities[chunk] = classifier.probabilities(features[rows[chunk]])
    return probabilities


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
