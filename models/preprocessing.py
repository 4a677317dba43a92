"""Preprocessing inside the network: centre crop and standardisation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

Standardize = Literal["scale", "per-image", "per-channel"]


class Preprocessing(nn.Module):
    """From stored pixels to the network's input: centre crop, then standardisation, in float32.

    "scale": x / 255. "per-image": (x - mean) / max(std, 1 / sqrt(N)) over the N values of each cropped
    image, std of the population (TensorFlow's `tf.image.per_image_standardization`). "per-channel":
    (x - mean) / std with the `mean` and `std` of the dataset, or of the images that pretrained weights were trained
    with: one value per channel, in pixel units (0 to 255).

    `crop`: a side, or (height, width). `output_size`: height and width after the crop. Raises ValueError for a crop
    that does not fit images of `image_size`.
    """

    def __init__(
        self,
        image_size: tuple[int, int],
        crop: int | tuple[int, int] | None = None,
        standardize: Standardize = "scale",
        mean: Sequence[float] = (),
        std: Sequence[float] = (),
    ) -> None:
        super().__init__()
        self.height, self.width = image_size
        self.output_size = image_size if crop is None else (crop, crop) if isinstance(crop, int) else crop
        self.standardize = standardize
        if self.output_size[0] > self.height or self.output_size[1] > self.width:
            cropped = "x".join(map(str, self.output_size))
            raise ValueError(f"a crop of {cropped} does not fit images of {self.height}x{self.width}")
        if standardize == "per-channel":
            # a constant channel has a std of 0
            scale = [1 / max(value, 1e-6) for value in std]
            self.mean: Tensor
            self.scale: Tensor
            self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
            self.register_buffer("scale", torch.tensor(scale).view(1, -1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """float32 [batch, channels, height, width] of uint8 [batch, height, width, channels]."""
        return self.standardized(self.cropped(images))

    def cropped(self, images: Tensor) -> Tensor:
        """The centre crop of uint8 [batch, height, width, channels]."""
        height, width = self.output_size
        if (self.height, self.width) == (height, width):
            return images
        top, left = (self.height - height) // 2, (self.width - width) // 2
        return images[:, top : top + height, left : left + width]

    def standardized(self, images: Tensor) -> Tensor:
        """float32 [batch, channels, height, width] of uint8 or float [batch, height, width, channels]."""
        x = images.permute(0, 3, 1, 2)
        if self.standardize == "scale":
            return x / 255
        x = x.to(torch.get_default_dtype())
        if self.standardize == "per-channel":
            return (x - self.mean) * self.scale
        x = x - x.mean((1, 2, 3), keepdim=True)
        std = x.square().mean((1, 2, 3), keepdim=True).sqrt()
        return x / std.clamp(min=1 / math.sqrt(math.prod(x.shape[1:])))
