"""The exponential moving average of the weights, which is what is evaluated, exported and served."""

from __future__ import annotations

import copy

from torch import Tensor, nn

from pipeline.training.torch_internals import blend_all


class MovingAverage:
    """After update `step` (from 0): average += (1 - decay) * (weight - average), with
    decay = min(`decay`, (1 + step) / (10 + step)), as TensorFlow's ExponentialMovingAverage with `num_updates`.

    The average starts as the initial weights. Floating-point parameters and buffers are averaged, others are copied.
    Training does not depend on the average. `network` is a copy of the network with the averaged weights.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.decay = decay
        self.network = copy.deepcopy(network).requires_grad_(False).eval()
        pairs = list(zip(_tensors(self.network), _tensors(network), strict=True))
        averaged = [pair for pair in pairs if pair[0].is_floating_point()]
        self._averages, self._weights = [average for average, _ in averaged], [weight for _, weight in averaged]
        self._copied = [pair for pair in pairs if not pair[0].is_floating_point()]

    def update(self, step: int) -> None:
        """Update the average with the weights after update `step`."""
        decay = min(self.decay, (1 + step) / (10 + step))
        blend_all(self._averages, self._weights, 1 - decay)
        for average, value in self._copied:
            average.copy_(value)


def _tensors(network: nn.Module) -> list[Tensor]:
    return [tensor.detach() for tensor in (*network.parameters(), *network.buffers())]
