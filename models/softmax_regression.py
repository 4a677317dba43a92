"""Softmax regression: one linear layer."""

from __future__ import annotations

import math

from torch import Tensor, nn


class SoftmaxRegression(nn.Module):
    """One linear layer from pixels to logits, `output`, with zero initial weights."""

    def __init__(self, image_shape: tuple[int, int, int], classes: int) -> None:
        super().__init__()
        self.output = nn.Linear(math.prod(image_shape), classes)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Logits, float32 [batch, classes], of float32 [batch, channels, height, width]."""
        return self.output(images.flatten(1))
