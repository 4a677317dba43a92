"""Networks of torchvision by name, such as "resnet18": every classifier of `torchvision.models`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

# families that need the size of their images as an argument
IMAGE_SIZE_ARGUMENTS: dict[str, Callable[[int], dict[str, Any]]] = {
    "vit": lambda side: {"image_size": side},
    "maxvit": lambda side: {"input_size": (side, side)},
}
# families with an auxiliary head for training; built without it, so that forward returns the logits alone
WITH_AUXILIARY_HEAD = ("googlenet", "inception")


def builder(name: str) -> Callable[..., nn.Module]:
    """The function that builds this classifier of the installed torchvision. Raises KeyError for an unknown name."""
    from torchvision import models

    if name not in models.list_models(module=models):
        raise KeyError(name)
    return partial(build, name)


def build(name: str, image_shape: tuple[int, int, int], classes: int) -> nn.Module:
    """The network, freshly initialised. Raises ValueError for images that the network does not accept."""
    from torchvision import models

    channels, height, width = image_shape
    if channels != 3:
        raise ValueError("networks of torchvision take RGB images; prepare the dataset with --channels 3")
    family = name.partition("_")[0]
    arguments: dict[str, Any] = {}
    if family in IMAGE_SIZE_ARGUMENTS:
        if height != width:
            raise ValueError("it takes square images only")
        arguments = IMAGE_SIZE_ARGUMENTS[family](height)
    if family in WITH_AUXILIARY_HEAD:
        # transform_input would convert from ImageNet's mean and std to those that their weights were trained with;
        # here preprocessing applies them (pipeline/pretrained/weight_sources.py)
        arguments = {"aux_logits": False, "init_weights": True, "transform_input": False}
    try:
        network: nn.Module = models.get_model(name, weights=None, num_classes=classes, **arguments)
    except AssertionError as error:
        raise ValueError(str(error)) from error
    return network
