"""SimpleConvNet of "Deep Learning from Scratch"."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from models.option_types import NonNegativeInt, PositiveFloat, PositiveInt


class SimpleConvnet(nn.Module):
    """SimpleConvNet of "Deep Learning from Scratch" (Saitoh), chapter 7.

    conv1 - ReLU - 2x2 max-pool - affine1 - ReLU - affine2; weights N(0, `init_std`), biases zero.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        classes: int,
        *,
        filters: PositiveInt = 30,
        filter_size: PositiveInt = 5,
        padding: NonNegativeInt = 0,
        stride: PositiveInt = 1,
        hidden_size: PositiveInt = 100,
        init_std: PositiveFloat = 0.01,
    ) -> None:
        super().__init__()
        channels, *sides = image_shape
        spans = [side + 2 * padding - filter_size for side in sides]
        if any(span < 0 or span % stride or span // stride + 1 < 2 for span in spans):
            height, width = sides
            raise ValueError(
                f"a {filter_size}x{filter_size} filter with padding {padding} and stride {stride} "
                f"does not fit images of {height}x{width}"
            )
        pooled = [(span // stride + 1) // 2 for span in spans]
        self.conv1 = nn.Conv2d(channels, filters, filter_size, stride, padding)
        self.affine1 = nn.Linear(filters * pooled[0] * pooled[1], hidden_size)
        self.affine2 = nn.Linear(hidden_size, classes)
        for layer in (self.conv1, self.affine1, self.affine2):
            nn.init.normal_(layer.weight, std=init_std)
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Logits, float32 [batch, classes], of float32 [batch, channels, height, width]."""
        x = F.max_pool2d(F.relu(self.conv1(images)), 2)
        x = F.relu(self.affine1(x.flatten(1)))
        return self.affine2(x)
