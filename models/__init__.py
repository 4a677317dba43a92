"""Everything that ends up inside the ONNX file: networks and preprocessing, nn.Modules only, no I/O.

A new network is a module here and a line in NETWORKS; those of torchvision are there by name.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from models import zoo
from models.cifar10 import Cifar10
from models.cifar10_local import Cifar10Local
from models.deep_mnist import DeepMnist
from models.digits_convnet import DigitsConvnet
from models.mlp import Mlp
from models.simple_convnet import SimpleConvnet
from models.slides_convnet import SlidesConvnet
from models.softmax_regression import SoftmaxRegression

NETWORKS: dict[str, type[nn.Module]] = {
    "cifar10": Cifar10,
    "cifar10_local": Cifar10Local,
    "deep_mnist": DeepMnist,
    "digits_convnet": DigitsConvnet,
    "mlp": Mlp,
    "simple_convnet": SimpleConvnet,
    "slides_convnet": SlidesConvnet,
    "softmax_regression": SoftmaxRegression,
}


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
    return zoo.find(name) if name.startswith(zoo.PREFIX) else NETWORKS[name]


def options(name: str) -> dict[str, inspect.Parameter]:
    """The options of a network, with annotation and default: the keyword-only parameters of what builds it."""
    parameters = inspect.signature(find(name), eval_str=True).parameters
    return {key: value for key, value in parameters.items() if value.kind is inspect.Parameter.KEYWORD_ONLY}
