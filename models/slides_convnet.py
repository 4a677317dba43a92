"""Two blocks of convolution, activation and max-pool, after lecture slides."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from models.layers import SameConv2d, SameMaxPool2d, initialize
from models.option_types import PositiveInt

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh, "sigmoid": nn.Sigmoid}


class Block(nn.Module):
    """Convolution (SAME), activation, max-pool."""

    def __init__(self, channels: int, filters: int, kernel_size: int, pool_size: int, activation: str) -> None:
        super().__init__()
        self.conv = SameConv2d(channels, filters, kernel_size)
        self.activation = ACTIVATIONS[activation]()
        self.pool = SameMaxPool2d(pool_size, pool_size)
        initialize(self.conv, std=0.1, bias=0.1)

    def forward(self, x: Tensor) -> Tensor:
        """float32 [batch, filters, height / pool_size, width / pool_size], rounded up."""
        return self.pool(self.activation(self.conv(x)))


class SlidesConvnet(nn.Module):
    """Two blocks of convolution, activation and max-pool, then one linear layer, `output`."""

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        classes: int,
        *,
        block1_filters: PositiveInt = 24,
        block2_filters: PositiveInt = 48,
        kernel_size: PositiveInt = 5,
        pool_size: PositiveInt = 2,
        activation: Literal["relu", "tanh", "sigmoid"] = "relu",
    ) -> None:
        super().__init__()
        channels, height, width = image_shape
        sides = [-(-side // pool_size**2) for side in (height, width)]  # pooled twice, rounded up
        self.block1 = Block(channels, block1_filters, kernel_size, pool_size, activation)
        self.block2 = Block(block1_filters, block2_filters, kernel_size, pool_size, activation)
        self.output = nn.Linear(block2_filters * sides[0] * sides[1], classes)
        initialize(self.output, std=0.1, bias=0.1)

    def forward(self, images: Tensor) -> Tensor:
        """Logits, float32 [batch, classes], of float32 [batch, channels, height, width]."""
        return self.output(self.block2(self.block1(images)).flatten(1))
