"""The module that is exported to ONNX and served: preprocessing, network and softmax in one."""

from __future__ import annotations

from torch import Tensor, nn

from models.preprocessing import Preprocessing


class ServedNetwork(nn.Module):
    """`preprocessing`, `network` and softmax, one after the other."""

    def __init__(self, preprocessing: Preprocessing, network: nn.Module) -> None:
        super().__init__()
        self.preprocessing = preprocessing
        self.network = network

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Probability and logit, float32 [batch, classes], of uint8 [batch, height, width, channels]."""
        logit = self.network(self.preprocessing(image)).float()
        return logit.softmax(1), logit
