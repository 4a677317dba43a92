"""A network for small images that learns in few passes, after KellerJordan's airbench94."""

from __future__ import annotations

from collections import OrderedDict
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.option_types import PositiveInt
from models.whitening import WhiteningConv2d

SMALLEST_SIDE = 9  # whitening leaves 8, and three halvings 1


class Cifar10Fast(nn.Module):
    """whiten - GELU - three groups - max-pool - head (Jordan 2024, "94% on CIFAR-10 in 3.29 Seconds on a Single GPU",
    arXiv:2404.00498, section 3 and appendix).

    A group is conv1 - max-pool - norm1 - GELU - conv2 - norm2 - GELU, of 3x3 convolutions without bias; the groups have
    `width`, 4 * `width` and 4 * `width` channels (64 in the paper). The first layer whitens patches of the image and
    is not trained, but for its bias; convolutions begin as the identity on as many channels as they can pass on. The
    logits are divided by the number of the head's inputs. In inference they are the mean over the image and its
    mirror image if `mirror`.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        classes: int,
        *,
        width: PositiveInt = 64,
        mirror: bool = True,
    ) -> None:
        super().__init__()
        channels, *size = image_shape
        if min(size) < SMALLEST_SIDE:
            raise ValueError(f"images of {size[0]}x{size[1]} are too small; the network needs {SMALLEST_SIDE} a side")
        self.mirror = mirror
        self.whiten = WhiteningConv2d(channels, kernel_size=2)
        widths = (self.whiten.out_channels, width, 4 * width, 4 * width)
        self.groups = nn.Sequential(*(_group(*pair) for pair in pairwise(widths)))
        self.head = nn.Linear(4 * width, classes, bias=False)
        with torch.no_grad():
            self.head.weight.div_(self.head.weight.std())

    def forward(self, images: Tensor) -> Tensor:
        """Logits, float32 [batch, classes], of float32 [batch, channels, height, width]."""
        if self.mirror and not self.training:
            mirrored = self._logits(images.flip(3))  # first, so that what hooks see last is of the image as it is
            return (mirrored + self._logits(images)) / 2
        return self._logits(images)

    def _logits(self, images: Tensor) -> Tensor:
        x = self.groups(F.gelu(self.whiten(images)))
        logits: Tensor = self.head(x.amax((2, 3)))
        return logits / self.head.in_features


def _group(inputs: int, outputs: int) -> nn.Sequential:
    layers = OrderedDict(
        conv1=_identity_convolution(inputs, outputs),
        pool=nn.MaxPool2d(2),
        norm1=_norm(outputs),
        gelu1=nn.GELU(),
        conv2=_identity_convolution(outputs, outputs),
        norm2=_norm(outputs),
        gelu2=nn.GELU(),
    )
    return nn.Sequential(layers)


def _identity_convolution(inputs: int, outputs: int) -> nn.Conv2d:
    layer = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    with torch.no_grad():
        nn.init.dirac_(layer.weight[:inputs])
    return layer


def _norm(channels: int) -> nn.BatchNorm2d:
    # few steps: statistics that follow quickly
    return nn.BatchNorm2d(channels, eps=1e-12, momentum=0.4)
