"""A first layer that is computed from training images instead of learnt."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

EPSILON = 5e-4  # added to each variance, so that directions that hardly occur are not blown up


class WhiteningConv2d(nn.Conv2d):
    """A convolution, without padding, onto the principal components of image patches, each scaled to a variance of 1,
    and onto their negatives: 2 * channels * kernel_size² outputs (Page 2019, "How to Train Your ResNet 8", and
    arXiv:2404.00498, section 3.1).

    `weight` is a buffer that `fit` sets; `bias` is learnt.
    """

    def __init__(self, in_channels: int, kernel_size: int) -> None:
        super().__init__(in_channels, 2 * in_channels * kernel_size**2, kernel_size)
        weight = self.weight.detach().clone()
        del self.weight
        self.register_buffer("weight", weight)

    @torch.no_grad()
    def fit(self, images: Tensor) -> None:
        """Whiten the patches of `images`, float [n, channels, height, width], as the layer will see them."""
        patches = F.unfold(images.double(), self.kernel_size).transpose(1, 2).flatten(0, 1)  # [patches, values]
        variances, directions = torch.linalg.eigh(patches.T @ patches / len(patches))
        components = directions.T / (variances[:, None] + EPSILON).sqrt()
        self.weight.copy_(torch.cat([components, -components]).view_as(self.weight))
