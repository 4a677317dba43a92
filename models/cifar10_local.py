"""cuda-convnet's CIFAR-10 network with two locally connected layers."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from models.cifar10 import CifarConvolutions
from models.layers import LocallyConnected2d, initialize
from models.option_types import PositiveFloat


class Cifar10Local(CifarConvolutions):
    """cuda-convnet's network with 13% test error: Cifar10 with local3 and local4 as locally connected layers."""

    def __init__(self, image_shape: tuple[int, int, int], classes: int, *, conv_std: PositiveFloat = 5e-2) -> None:
        super().__init__(image_shape, conv_std)
        self.local3 = LocallyConnected2d(64, 64, self.size, 3)
        self.local4 = LocallyConnected2d(64, 32, self.size, 3)
        self.softmax_linear = nn.Linear(32 * self.size[0] * self.size[1], classes)
        initialize(self.local3, 0.04, 0.1)
        initialize(self.local4, 0.04, 0.1)
        initialize(self.softmax_linear, 1 / 192, 0.0)

    def forward(self, images: Tensor) -> Tensor:
        """Logits, float32 [batch, classes], of float32 [batch, channels, height, width]."""
        x = F.relu(self.local3(self.features(images)))
        x = F.relu(self.local4(x))
        return self.softmax_linear(x.flatten(1))
