"""Networks of timm by name, such as "tf_efficientnet_lite0": every model that the installed timm registers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn


def builder(name: str) -> Callable[..., nn.Module]:
    """The function that builds this network of the installed timm. Raises KeyError for an unknown name."""
    import timm

    if not timm.is_model(name):
        raise KeyError(name)
    return partial(build, name)


def build(name: str, image_shape: tuple[int, int, int], classes: int) -> nn.Module:
    """The network, freshly initialised, for grey images as well as RGB.

    timm itself says which networks are made for one image size (transformers, mostly) and replaces their head.
    Raises ValueError for images that the network does not accept.
    """
    try:
        return create(name, image_shape, classes)
    except AssertionError as error:
        raise ValueError(str(error)) from error


def create(name: str, image_shape: tuple[int, int, int], classes: int, **arguments: Any) -> nn.Module:
    """The network by timm's own function, with further `arguments` of that function. Raises what timm raises."""
    import timm

    channels, height, width = image_shape
    config = timm.get_pretrained_cfg(name)
    size: dict[str, Any] = {"img_size": (height, width)} if config is not None and config.fixed_input_size else {}
    network: nn.Module = timm.create_model(name, num_classes=classes, in_chans=channels, **size, **arguments)
    return network
