"""The exponential moving average of the weights: what is evaluated, exported and served."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


class MovingAverage:
    """After update `step` (from 0): average += (1 - decay) * (weight - average), with
    decay = min(`decay`, (1 + step) / (10 + step)), as TensorFlow's ExponentialMovingAverage with
    `num_updates`. It starts as the initial weights; floating-point parameters and buffers are averaged,
    others copied; nothing flows back into training.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.decay = decay
        self.network = copy.deepcopy(network).requires_grad_(False).eval()
        pairs = list(zip(_tensors(self.network), _tensors(network), strict=True))
        blended = [pair for pair in pairs if pair[0].is_floating_point()]
        self._averages, self._weights = [mine for mine, _ in blended], [theirs for _, theirs in blended]
        self._copied = [pair for pair in pairs if not pair[0].is_floating_point()]

    def update(self, step: int) -> None:
        """Take in the weights as they are after update `step`."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self._averages, self._weights, 1 - decay)
        for average, value in self._copied:
            average.copy_(value)


def _tensors(network: nn.Module) -> list[Tensor]:
    return [tensor.detach() for tensor in (*network.parameters(), *network.buffers())]
