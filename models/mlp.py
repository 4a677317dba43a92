"""A multilayer perceptron with one hidden layer."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from models.option_types import PositiveFloat, PositiveInt


class Mlp(nn.Module):
    """One sigmoid hidden layer; weights N(0, `init_std`), biases zero."""

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        classes: int,
        *,
        hidden_size: PositiveInt = 625,
        init_std: PositiveFloat = 0.05,
    ) -> None:
        super().__init__()
        self.hidden = nn.Linear(math.prod(image_shape), hidden_size)
        self.output = nn.Linear(hidden_size, classes)
        for layer in (self.hidden, self.output):
            nn.init.normal_(layer.weight, std=init_std)
            nn.init.zeros_(layer.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Logits, float32 [batch, classes], of float32 [batch, channels, height, width]."""
        return self.output(torch.sigmoid(self.hidden(images.flatten(1))))
