"""Muon, an optimiser for matrices and convolutions, with SGD for all other weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from pipeline.training.parameter_groups import ORTHOGONALIZED

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of x, x³ and x⁵: the steepest at 0 for which all of 0 to 1 stays near 1


class Muon(Optimizer):
    """Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) for the groups marked ORTHOGONALIZED: the
    update is the gradient with Nesterov momentum, orthogonalised. The weights of other groups are updated by SGD with
    Nesterov momentum `sgd_momentum`.

    A convolution counts as the matrix [out channels, all others]. With `normalize` each matrix is kept at the norm
    √(out channels), for networks in which a norm follows it.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        lr: float,
        momentum: float,
        sgd_momentum: float,
        iterations: int,
        normalize: bool,
    ) -> None:
        settings = {"momentum": momentum, "sgd_momentum": sgd_momentum, "iterations": iterations}
        # "fused" as in torch's optimisers: there is no such kernel
        super().__init__(groups, {"lr": lr, "weight_decay": 0.0, "normalize": normalize, "fused": False, **settings})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # noqa: ARG002
        """Update every weight that has a gradient."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    update = self._update_matrix if group[ORTHOGONALIZED] else self._update_by_sgd
                    update(weight, weight.grad, group)

    def _update_matrix(self, weight: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        direction = orthogonal(self._nesterov(weight, gradient, group["momentum"]).flatten(1), group["iterations"])
        if group["normalize"]:
            weight.mul_(len(weight) ** 0.5 / weight.norm())
        weight.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * direction.view_as(weight))

    def _update_by_sgd(self, weight: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        gradient = gradient + group["weight_decay"] * weight
        weight.sub_(group["lr"] * self._nesterov(weight, gradient, group["sgd_momentum"]))

    def _nesterov(self, weight: Tensor, gradient: Tensor, momentum: float) -> Tensor:
        state = self.state[weight]
        velocity: Tensor | None = state.get("momentum_buffer")
        velocity = gradient.clone() if velocity is None else velocity.mul_(momentum).add_(gradient)
        state["momentum_buffer"] = velocity
        return gradient + momentum * velocity


def orthogonal(matrix: Tensor, iterations: int) -> Tensor:
    """Nearly the orthogonal matrix closest to `matrix`, float [rows, columns]: its singular vectors, with singular
    values from 0.7 to 1.2 in place of its own, by `iterations` of Newton and Schulz's method (fewer leave small ones
    smaller)."""
    a, b, c = COEFFICIENTS
    x = matrix / (matrix.norm() + 1e-7)
    if is_tall := len(matrix) > matrix.shape[1]:
        x = x.T
    for _ in range(iterations):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if is_tall else x
