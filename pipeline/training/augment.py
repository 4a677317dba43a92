"""Distortions of training images, a whole batch at once: those of TensorFlow's CIFAR-10 tutorial."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from models.preprocessing import Preprocessing
from pipeline.recipe import Augment
from pipeline.training.memory import moved
from pipeline.training.randomness import DISTORT, generator


class Distortions:
    """`settings` applied to batches of images as stored; `preprocessing` says what is cropped without them.

    The draws are those of a whole batch of `batch_size`, of which this process has its `share`.
    """

    def __init__(
        self, settings: Augment, preprocessing: Preprocessing, seed: int, batch_size: int, share: slice = slice(None)
    ) -> None:
        self._settings = settings
        self._preprocessing = preprocessing
        self._seed = seed
        self._is_idle = settings == Augment()
        self._batch_size = batch_size
        self._share = share

    def __call__(self, images: Tensor, step: int) -> Tensor:
        """uint8 [batch, height, width, channels] to the same of the cropped size, float32 where brightness
        or contrast change; not standardised yet. A function of the seed and `step`, each image its own draw.
        """
        settings = self._settings
        if self._is_idle:
            return self._preprocessing.cropped(images)
        height, width = self._preprocessing.output_size
        if not settings.random_crop:
            images = self._preprocessing.cropped(images)
        elif settings.padding:
            images = F.pad(images, (0, 0, *[settings.padding] * 4))
        draws = generator(self._seed, DISTORT, step).random((5, self._batch_size))
        uniform = moved(torch.from_numpy(draws[:, self._share]), images.device)
        if settings.random_crop or settings.flip:
            top = (uniform[0] * (images.shape[1] - height + 1)).long()
            left = (uniform[1] * (images.shape[2] - width + 1)).long()
            mirrored = uniform[2] < (0.5 if settings.flip else 0)
            images = windows(images, top, left, mirrored, (height, width))
        if settings.brightness:
            images = brightened(images, settings.brightness * (2 * uniform[3] - 1))
        if settings.contrast != (1, 1):
            lowest, highest = settings.contrast
            images = contrasted(images, lowest + uniform[4] * (highest - lowest))
        return images


def windows(images: Tensor, top: Tensor, left: Tensor, mirrored: Tensor, size: tuple[int, int]) -> Tensor:
    """From each of [batch, height, width, channels] the window of `size` at `top`, `left` (int64 [batch]),
    left and right exchanged where `mirrored` (bool [batch])."""
    height, width = (torch.arange(side, device=images.device) for side in size)
    count, full_height, full_width, channels = images.shape
    first_row = torch.arange(count, device=images.device) * full_height + top
    rows = (first_row[:, None] + height) * full_width
    columns = left[:, None] + torch.where(mirrored[:, None], width.flip(0), width)
    # one gather of pixels for crop and flip: 0.3 ms for 128 images on 2 cores
    pixels = images.reshape(-1, channels).index_select(0, (rows[:, :, None] + columns[:, None, :]).flatten())
    return pixels.view(count, *size, channels)


def brightened(images: Tensor, delta: Tensor) -> Tensor:
    """Plus `delta` [batch], unclipped: TensorFlow's `tf.image.adjust_brightness` on floats."""
    return images + delta.to(torch.get_default_dtype())[:, None, None, None]


def contrasted(images: Tensor, factor: Tensor) -> Tensor:
    """(x - mean) * `factor` [batch] + mean, over each channel's own mean, unclipped: `tf.image.adjust_contrast`."""
    images = images.to(torch.get_default_dtype())
    mean = images.mean((1, 2), keepdim=True)
    factor = factor.to(torch.get_default_dtype())[:, None, None, None]
    return torch.addcmul(mean * (1 - factor), images, factor)
