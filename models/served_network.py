"""The module that is exported to ONNX and served: preprocessing, network and softmax in one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.preprocessing import Preprocessing
from models.unfamiliarity import Unfamiliarity


class Temperature(nn.Module):
    """Divides logits by a number, so that their softmax is less sure, or surer (Guo et al. 2017, arXiv:1706.04599)."""

    value: Tensor

    def __init__(self, number: float) -> None:
        super().__init__()
        self.number = number
        self.register_buffer("value", torch.tensor(number, dtype=torch.float32), persistent=False)

    def forward(self, logit: Tensor) -> Tensor:
        return logit / self.value


class ServedNetwork(nn.Module):
    """`preprocessing`, `network`, `temperature` (where there is one) and softmax, one after the other; and
    `unfamiliarity`, where it is wanted.
    """

    def __init__(self, preprocessing: Preprocessing, network: nn.Module) -> None:
        super().__init__()
        self.preprocessing = preprocessing
        self.network = network
        self.temperature: Temperature | None = None
        self.unfamiliarity: Unfamiliarity | None = None

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Probability and logit, float32 [batch, classes], of uint8 [batch, height, width, channels]; and float32
        [batch] where there is `unfamiliarity`.

        The temperature changes probabilities alone.
        """
        if self.unfamiliarity is None:
            return self._scores(image)
        with self.unfamiliarity.features.seen_in(self.network) as seen:
            scores = self._scores(image)
        return *scores, self.unfamiliarity(seen)

    def _scores(self, image: Tensor) -> tuple[Tensor, Tensor]:
        logit = self.network(self.preprocessing(image)).float()
        scaled = logit if self.temperature is None else self.temperature(logit)
        return scaled.softmax(1), logit
