"""A small convolutional network for small images."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from models.option_types import PositiveInt


class DigitsConvnet(nn.Module):
    """conv1 - ReLU - max-pool - conv2 - ReLU - max-pool - fc1 - ReLU - fc2, of 3x3 convolutions and 2x2 max-pools."""

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        classes: int,
        *,
        filters: PositiveInt = 32,
        hidden_size: PositiveInt = 128,
    ) -> None:
        super().__init__()
        channels, height, width = image_shape
        if height < 4 or width < 4:
            raise ValueError(
                f"images of {height}x{width} are too small to be halved twice; the network needs 4x4 or more"
            )
        self.conv1 = nn.Conv2d(channels, filters, 3, padding=1)
        self.conv2 = nn.Conv2d(filters, 2 * filters, 3, padding=1)
        self.fc1 = nn.Linear(2 * filters * (height // 4) * (width // 4), hidden_size)
        self.fc2 = nn.Linear(hidden_size, classes)
        for layer in (self.conv1, self.conv2, self.fc1, self.fc2):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Logits, float32 [batch, classes], of float32 [batch, channels, height, width]."""
        x = F.max_pool2d(F.relu(self.conv1(images)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = F.relu(self.fc1(x.flatten(1)))
        return self.fc2(x)
