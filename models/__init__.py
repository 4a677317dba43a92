"""The networks by name: register a new network, or another library of networks, here, in NETWORKS or `builder`.

This package holds everything that ends up inside the ONNX file: networks and preprocessing, nn.Modules only, no I/O.
The networks of torchvision and timm are available by name. A network's module is imported when the network is built,
because importing torch takes seconds.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any

from models import option_reader

if TYPE_CHECKING:
    from torch import nn

# module in this folder: class
NETWORKS = {
    "cifar10": "Cifar10",
    "cifar10_fast": "Cifar10Fast",
    "cifar10_local": "Cifar10Local",
    "deep_mnist": "DeepMnist",
    "digits_convnet": "DigitsConvnet",
    "mlp": "Mlp",
    "simple_convnet": "SimpleConvnet",
    "slides_convnet": "SlidesConvnet",
    "softmax_regression": "SoftmaxRegression",
}
TORCHVISION = "torchvision/"
TIMM = "timm/"


def build(name: str, image_shape: tuple[int, int, int], classes: int, **options: Any) -> nn.Module:
    """A freshly initialised network; its weights are drawn from torch's global generator.

    `image_shape` is (channels, height, width) after the crop, `classes` the number of classes, `options` the
    network's own (see `options`). Its forward takes float32 [batch, channels, height, width] and returns logits,
    float32 [batch, classes]; parameters are named `<layer>.weight`, `<layer>.bias`.
    Raises KeyError for an unknown name, ValueError where the network does not accept the images.
    """
    return builder(name)(image_shape, classes, **options)


def builder(name: str) -> Callable[..., nn.Module]:
    """The class or function that builds the network `name`. Raises KeyError for an unknown name."""
    if name.startswith(TORCHVISION):
        from models import torchvision_networks

        return torchvision_networks.builder(name.removeprefix(TORCHVISION))
    if name.startswith(TIMM):
        from models import timm_networks

        return timm_networks.builder(name.removeprefix(TIMM))
    network: Callable[..., nn.Module] = getattr(import_module(f"models.{name}"), NETWORKS[name])
    return network


def options(name: str) -> dict[str, inspect.Parameter]:
    """The options of the network `name`, with type and default: the keyword-only parameters of its builder, read
    without importing it. Raises KeyError for an unknown name."""
    if name.startswith(TORCHVISION):
        option_reader.torchvision_weights(name.removeprefix(TORCHVISION))  # raises KeyError for an unknown name
        return option_reader.keyword_options("torchvision_networks", "build")
    if name.startswith(TIMM):
        if name.removeprefix(TIMM) not in option_reader.timm_names():
            raise KeyError(name)
        return option_reader.keyword_options("timm_networks", "build")
    return option_reader.keyword_options(name, NETWORKS[name], "__init__")


def head_layers(name: str, image_shape: tuple[int, int, int], classes: int, **options: Any) -> list[str]:
    """The names of the layers of `build(name, image_shape, classes, **options)` that give one score per class, such as
    ["classifier"]: those whose shapes depend on the number of classes. A few networks of timm have none.

    Raises as `build` does.
    """
    from models import heads

    return heads.head_layers(name, image_shape, classes, **options)


def weights_of(name: str) -> list[str]:
    """The names that its library gives to pretrained weights of the network `name`, read without importing it; none for
    the networks of this package, and for those whose names timm computes."""
    if name.startswith(TORCHVISION):
        return option_reader.torchvision_weights(name.removeprefix(TORCHVISION))
    return option_reader.timm_weights(name.removeprefix(TIMM)) if name.startswith(TIMM) else []
