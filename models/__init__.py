"""Everything that ends up inside the ONNX file: networks and preprocessing, nn.Modules only, no I/O.

A new network is a module here and a line in NETWORKS; those of torchvision are there by name. Neither is imported
before it is built: torch takes seconds.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any

from models import signatures

if TYPE_CHECKING:
    from torch import nn

NETWORKS = {
    "cifar10": "Cifar10",
    "cifar10_local": "Cifar10Local",
    "deep_mnist": "DeepMnist",
    "digits_convnet": "DigitsConvnet",
    "mlp": "Mlp",
    "simple_convnet": "SimpleConvnet",
    "slides_convnet": "SlidesConvnet",
    "softmax_regression": "SoftmaxRegression",
}
TORCHVISION = "torchvision/"


def build(name: str, image_shape: tuple[int, int, int], classes: int, **options: Any) -> nn.Module:
    """A freshly initialised network (from torch's global generator).

    `image_shape` is (channels, height, width) after the crop, `classes` their number, `options` the
    keyword arguments of what builds it. Its forward takes float32 [batch, channels, height, width]
    and returns logits, float32 [batch, classes]; parameters are named `<layer>.weight`, `<layer>.bias`.
    Raises KeyError for an unknown name, ValueError where the network does not accept the images.
    """
    return find(name)(image_shape, classes, **options)


def find(name: str) -> Callable[..., nn.Module]:
    """What builds the network of this name. Raises KeyError where there is none."""
    if name.startswith(TORCHVISION):
        from models import zoo

        return zoo.find(name.removeprefix(TORCHVISION))
    builder: Callable[..., nn.Module] = getattr(import_module(f"models.{name}"), NETWORKS[name])
    return builder


def options(name: str) -> dict[str, inspect.Parameter]:
    """The options of a network, with annotation and default: the keyword-only parameters of what builds it, read
    without importing it. Raises KeyError where there is none of this name."""
    if not name.startswith(TORCHVISION):
        return signatures.keyword_options(name, NETWORKS[name], "__init__")
    signatures.torchvision_weights(name.removeprefix(TORCHVISION))
    return signatures.keyword_options("zoo", "build")


def weights_of(name: str) -> list[str]:
    """What the option `weights` of a network of torchvision may be: "none", "default", or torchvision's own names."""
    return ["none", "default", *signatures.torchvision_weights(name.removeprefix(TORCHVISION))]
