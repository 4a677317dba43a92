"""The network of TensorFlow's CIFAR-10 tutorial, and the convolutions that cifar10_local shares."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from models.layers import LocalResponseNorm, SameConv2d, SameMaxPool2d, initialize
from models.option_types import PositiveFloat, PositiveInt


class CifarConvolutions(nn.Module):
    """The convolutions of both CIFAR-10 networks: conv1 - ReLU - pool1 - norm1 - conv2 - ReLU - norm2 - pool2."""

    def __init__(self, image_shape: tuple[int, int, int], conv_std: float, conv2_filters: int = 64) -> None:
        super().__init__()
        channels, height, width = image_shape
        self.conv1 = SameConv2d(channels, 64, 5)
        self.pool1 = SameMaxPool2d(3, 2)
        self.norm1 = LocalResponseNorm(64, radius=4, bias=1.0, alpha=0.001 / 9, beta=0.75)
        self.conv2 = SameConv2d(64, conv2_filters, 5)
        self.norm2 = LocalResponseNorm(conv2_filters, radius=4, bias=1.0, alpha=0.001 / 9, beta=0.75)
        self.pool2 = SameMaxPool2d(3, 2)
        self.size = (-(-height // 4), -(-width // 4))  # halved twice, rounded up
        initialize(self.conv1, conv_std, 0.0)
        initialize(self.conv2, conv_std, 0.1)

    def features(self, images: Tensor) -> Tensor:
        """float32 [batch, conv2_filters, *size] of float32 [batch, channels, height, width]."""
        # pooling before ReLU gives the same values and gradients for a quarter of the work
        x = self.norm1(F.relu(self.pool1(self.conv1(images)), inplace=True))
        return self.pool2(self.norm2(F.relu(self.conv2(x), inplace=True)))


class Cifar10(CifarConvolutions):
    """The network of TensorFlow's CIFAR-10 tutorial, which follows cuda-convnet's.

    `CifarConvolutions`, then local3 - ReLU - local4 - ReLU - softmax_linear. `conv_std`, the standard
    deviation of the initial convolution weights, is 1e-4 in the tutorial's first edition and 5e-2 in later ones;
    `conv2_filters` widens the second convolution.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        classes: int,
        *,
        conv_std: PositiveFloat = 5e-2,
        conv2_filters: PositiveInt = 64,
    ) -> None:
        super().__init__(image_shape, conv_std, conv2_filters)
        self.local3 = nn.Linear(conv2_filters * self.size[0] * self.size[1], 384)
        self.local4 = nn.Linear(384, 192)
        self.softmax_linear = nn.Linear(192, classes)
        initialize(self.local3, 0.04, 0.1)
        initialize(self.local4, 0.04, 0.1)
        initialize(self.softmax_linear, 1 / 192, 0.0)

    def forward(self, images: Tensor) -> Tensor:
        """Logits, float32 [batch, classes], of float32 [batch, channels, height, width]."""
        x = F.relu(self.local3(self.features(images).flatten(1)))
        x = F.relu(self.local4(x))
        return self.softmax_linear(x)
