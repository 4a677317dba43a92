"""The training loss: cross-entropy (label smoothing or class weights would go here) and L2 penalties."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def cross_entropy(logits: Tensor, labels: Tensor, reduction: Literal["mean", "sum"], ranks: int) -> Tensor:
    """The cross-entropy of this rank's share of a batch, scaled so that its mean over the `ranks` is the whole batch's
    mean or sum."""
    loss = F.cross_entropy(logits, labels, reduction=reduction)
    return loss * ranks if reduction == "sum" else loss


def add_l2_gradients(network: nn.Module, coefficients: dict[str, float]) -> dict[str, Tensor]:
    """Add the gradients of the L2 penalties, coefficient * weight, to those of the layers that `coefficients` names;
    returns the penalties, coefficient * ‖weight‖² / 2, as "l2/<layer>"."""
    penalties: dict[str, Tensor] = {}
    for layer, coefficient in coefficients.items():
        weight = network.get_parameter(f"{layer}.weight")
        values = weight.detach()
        if weight.grad is None:  # the network does not use this layer
            weight.grad = torch.zeros_like(values)
        weight.grad.add_(values, alpha=coefficient)
        penalties[f"l2/{layer}"] = coefficient / 2 * torch.dot(values.flatten(), values.flatten())
    return penalties
