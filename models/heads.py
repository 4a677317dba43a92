"""The head of a network: the layers that give one score per class."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from models import TIMM, build


def head_layers(name: str, image_shape: tuple[int, int, int], classes: int, **options: Any) -> list[str]:
    """See `models.head_layers`."""
    network = _shapes_only(name, image_shape, classes, options)
    if name.startswith(TIMM):
        named = _named_by_timm(network)
        if named:
            return named
    other = _shapes_only(name, image_shape, classes + 1, options).state_dict()
    different = [key for key, value in network.state_dict().items() if value.shape != other[key].shape]
    return list(dict.fromkeys(key.rpartition(".")[0] for key in different))


def _shapes_only(name: str, image_shape: tuple[int, int, int], classes: int, options: dict[str, Any]) -> nn.Module:
    """The network, if possible without memory for its weights. Draws nothing from torch's generator."""
    try:
        with torch.device("meta"):
            return build(name, image_shape, classes, **options)
    except (NotImplementedError, RuntimeError):
        # some compute their widths as tensors, which need values
        with torch.random.fork_rng(devices=[]):
            return build(name, image_shape, classes, **options)


def _named_by_timm(network: nn.Module) -> list[str]:
    """The head's layers as timm names them, without those that this variant of the network lacks."""
    names = getattr(network, "pretrained_cfg", {}).get("classifier") or ()
    names = (names,) if isinstance(names, str) else tuple(names)
    return [each for each in names if list(dict(network.named_modules()).get(each, nn.Identity()).parameters())]
