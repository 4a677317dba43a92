"""The classifiers of `torchvision.models`, by name: "resnet18"."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

# networks that must be told the size of their images
SIZED: dict[str, Callable[[int], dict[str, Any]]] = {
    "vit": lambda side: {"image_size": side},
    "maxvit": lambda side: {"input_size": (side, side)},
}
# networks with a second head for training: without it, so that forward returns logits
TWO_HEADED = ("googlenet", "inception")


def find(name: str) -> Callable[..., nn.Module]:
    """The function that builds a classifier of the installed torchvision. Raises KeyError for none of them."""
    from torchvision import models

    if name not in models.list_models(module=models):
        raise KeyError(name)
    return partial(build, name)


def build(name: str, image_shape: tuple[int, int, int], classes: int, *, weights: str = "none") -> nn.Module:
    """`weights` names what a training begins from (see `models.weights_of`); whoever trains loads them.

    Raises ValueError for images that the network does not take.
    """
    from torchvision import models

    channels, height, width = image_shape
    if channels != 3:
        raise ValueError("networks of torchvision take RGB images; prepare the dataset with --channels 3")
    family = name.partition("_")[0]
    arguments: dict[str, Any] = {}
    if family in SIZED:
        if height != width:
            raise ValueError("it takes square images only")
        arguments = SIZED[family](height)
    if family in TWO_HEADED:
        # their weights were trained on images scaled otherwise, which the network undoes
        arguments = {"aux_logits": False, "init_weights": True, "transform_input": weights != "none"}
    try:
        network: nn.Module = models.get_model(name, weights=None, num_classes=classes, **arguments)
    except AssertionError as error:
        raise ValueError(str(error)) from error
    return network
