"""The network of TensorFlow's "Deep MNIST for Experts"."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from models.layers import SameConv2d, SameMaxPool2d, initialize
from models.option_types import DropoutRate


class DeepMnist(nn.Module):
    """The network of TensorFlow's "Deep MNIST for Experts".

    conv1 - ReLU - max-pool - conv2 - ReLU - max-pool - fc1 - ReLU - dropout - fc2; truncated N(0, 0.1),
    biases 0.1.
    """

    def __init__(self, image_shape: tuple[int, int, int], classes: int, *, dropout: DropoutRate = 0.5) -> None:
        super().__init__()
        channels, height, width = image_shape
        self.conv1 = SameConv2d(channels, 32, 5)
        self.conv2 = SameConv2d(32, 64, 5)
        self.pool = SameMaxPool2d(2, 2)
        self.fc1 = nn.Linear(64 * -(-height // 4) * -(-width // 4), 1024)  # halved twice, rounded up
        self.dropout = nn.Dropout(dropout)
        self.fc2 = nn.Linear(1024, classes)
        for layer in (self.conv1, self.conv2, self.fc1, self.fc2):
            initialize(layer, std=0.1, bias=0.1)

    def forward(self, images: Tensor) -> Tensor:
        """Logits, float32 [batch, classes], of float32 [batch, channels, height, width]."""
        x = self.pool(F.relu(self.conv1(images)))
        x = self.pool(F.relu(self.conv2(x)))
        x = self.dropout(F.relu(self.fc1(x.flatten(1))))
        return self.fc2(x)
