from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from models.layers import LocallyConnected2d, LocalResponseNorm, SameConv2d, SameMaxPool2d, truncated_normal_


class Cifar10Local(nn.Module):
    """cuda-convnet's network of 13% test error: as Cifar10, with the two top layers locally connected."""

    def __init__(self, image_shape: tuple[int, int, int], classes: int, *, conv_std: float = 5e-2) -> None:
        super().__init__()
        channels, height, width = image_shape
        size = (-(-height // 4), -(-width // 4))
        self.conv1 = SameConv2d(channels, 64, 5)
        self.pool1 = SameMaxPool2d(3, 2)
        self.norm1 = LocalResponseNorm(64, radius=4, bias=1.0, alpha=0.001 / 9, beta=0.75)
        self.conv2 = SameConv2d(64, 64, 5)
        self.norm2 = LocalResponseNorm(64, radius=4, bias=1.0, alpha=0.001 / 9, beta=0.75)
        self.pool2 = SameMaxPool2d(3, 2)
        self.local3 = LocallyConnected2d(64, 64, size, 3)
        self.local4 = LocallyConnected2d(64, 32, size, 3)
        self.softmax_linear = nn.Linear(32 * size[0] * size[1], classes)
        layers: list[tuple[nn.Conv2d | nn.Linear | LocallyConnected2d, float, float]] = [
            (self.conv1, conv_std, 0.0),
            (self.conv2, conv_std, 0.1),
            (self.local3, 0.04, 0.1),
            (self.local4, 0.04, 0.1),
            (self.softmax_linear, 1 / 192, 0.0),
        ]
        for layer, std, bias in layers:
            truncated_normal_(layer.weight, std)
            assert layer.bias is not None
            nn.init.constant_(layer.bias, bias)

    def forward(self, images: Tensor) -> Tensor:
        """Logits, float32 [batch, classes], of float32 [batch, channels, height, width]."""
        x = self.norm1(self.pool1(F.relu(self.conv1(images))))
        x = self.pool2(self.norm2(F.relu(self.conv2(x))))
        x = F.relu(self.local3(x))
        x = F.relu(self.local4(x))
        return self.softmax_linear(x.flatten(1))
