"""The head of a network: the layers that give one score per class."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from models import build


def head_layers(name: str, image_shape: tuple[int, int, int], classes: int, **options: Any) -> list[str]:
    """See `models.head_layers`. The names that timm keeps for its networks are the same for all 1,371 of them but two
    (levit_384_s8 and levit_conv_384_s8), for which timm leaves out one of the two layers."""
    network, other = (_state(name, image_shape, count, options) for count in (classes, classes + 1))
    different = [key for key, value in network.items() if value.shape != other[key].shape]
    return list(dict.fromkeys(key.rpartition(".")[0] for key in different))


def _state(name: str, image_shape: tuple[int, int, int], classes: int, options: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of a network, if possible without memory for them. Draws nothing from torch's generator."""
    try:
        with torch.device("meta"):
            return build(name, image_shape, classes, **options).state_dict()
    except (NotImplementedError, RuntimeError):
        # some compute their widths as tensors, which need values
        with torch.random.fork_rng(devices=[]):
            return build(name, image_shape, classes, **options).state_dict()
