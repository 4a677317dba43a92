"""The training loss: cross-entropy, with label smoothing, class weights and mixed labels, and L2 penalties."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class CrossEntropy:
    """The cross-entropy of a part of a batch.

    `reduction`: over the whole batch. `label_smoothing`: as in torch (Szegedy et al., 2016, arXiv:1512.00567).
    `class_weights`, float32 [classes]: what the loss of each image is multiplied by.
    """

    reduction: Literal["mean", "sum"] = "mean"
    label_smoothing: float = 0.0
    class_weights: Tensor | None = None

    def __call__(self, logits: Tensor, labels: Tensor, mixing: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """The mean or sum over the images: logits, float32 [n, classes], labels, int64 [n]. `mixing`: the label of the
        image that was mixed into each, int64 [n], and the share of the image itself, float32 [n]."""
        if self.class_weights is None and mixing is None:
            return F.cross_entropy(logits, labels, reduction=self.reduction, label_smoothing=self.label_smoothing)
        losses = self._of_each(logits, labels)
        if mixing is not None:
            other_labels, share = mixing
            losses = share * losses + (1 - share) * self._of_each(logits, other_labels)
        return losses.mean() if self.reduction == "mean" else losses.sum()

    def _of_each(self, logits: Tensor, labels: Tensor) -> Tensor:
        losses = F.cross_entropy(logits, labels, reduction="none", label_smoothing=self.label_smoothing)
        return losses if self.class_weights is None else losses * self.class_weights[labels]


def balanced_class_weights(counts: Sequence[int]) -> Tensor:
    """1 / the number of training images of each class, times a factor that makes the mean over all images 1; float32
    [classes], 0 for a class without images. The formula is scikit-learn's `compute_class_weight("balanced")`."""
    numbers = torch.tensor(counts, dtype=torch.float64)
    weights = numbers.sum() / (numbers.count_nonzero() * numbers)
    return weights.where(numbers > 0, 0).float()


def add_l2_gradients(network: nn.Module, coefficients: dict[str, float]) -> dict[str, Tensor]:
    """Add the gradients of the L2 penalties, coefficient * weight, to those of the layers that `coefficients` names;
    returns the penalties, coefficient * ‖weight‖² / 2, as "l2/<layer>"."""
    penalties: dict[str, Tensor] = {}
    for layer, coefficient in coefficients.items():
        weight = network.get_parameter(f"{layer}.weight")
        if not weight.requires_grad:  # it is frozen
            continue
        values = weight.detach()
        if weight.grad is None:  # the network does not use this layer
            weight.grad = torch.zeros_like(values)
        weight.grad.add_(values, alpha=coefficient)
        penalties[f"l2/{layer}"] = coefficient / 2 * torch.dot(values.flatten(), values.flatten())
    return penalties
