"""Augmentations of training images, applied to a whole batch at once, in this order: crop and flips, TrivialAugment,
rotation, colour jitter, brightness, contrast, erasing; then mixup or CutMix.

To add one, give it a field in `AugmentSection` (pipeline/recipe.py), a stream of random numbers (randomness.py), and a
function in geometric_operations.py or color_operations.py; call it here.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from models.preprocessing import Preprocessing
from pipeline.device import copy_to_device
from pipeline.recipe_sections import AugmentSection, ColorJitter
from pipeline.training import mixing, randomness
from pipeline.training.color_operations import adjust_brightness, adjust_contrast, color_jitter, draw_jitter
from pipeline.training.geometric_operations import (
    crop_and_flip,
    draw_crops,
    draw_erased,
    erase,
    resized_crop,
    rotation_matrices,
    transform,
)
from pipeline.training.randomness import generator
from pipeline.training.trivial_augment import draw_trivial, trivial_augment


class Augmentations:
    """The augmentations of `settings`. Without random and resized crop, `preprocessing` crops the images.

    Random numbers are drawn for the whole batch of `batch_size`; this process uses those of its `share`. Where images
    are mixed (`needs_whole_batch`), it augments the whole batch, and `mix` takes the share.
    """

    def __init__(
        self,
        settings: AugmentSection,
        preprocessing: Preprocessing,
        seed: int,
        batch_size: int,
        share: slice = slice(None),
    ) -> None:
        self.needs_whole_batch = bool(settings.mixup or settings.cutmix)
        self.is_off = settings.is_off
        self._settings = settings
        self._preprocessing = preprocessing
        self._seed = seed
        self._batch_size = batch_size
        self._share = share
        self._drawn = slice(None) if self.needs_whole_batch else share

    def __call__(self, images: Tensor, step: int, mirrored: Tensor | None = None) -> Tensor:
        """From uint8 [share, height, width, channels] as stored to images of the cropped size, from 0 to 255, not
        standardised yet: uint8, or float32 where an augmentation computes other values. Brightness and contrast may
        leave the range. Where `needs_whole_batch`, the images are those of the whole batch. `mirrored`, bool [images]:
        of alternating flips, which depend on the images and the pass (see `BatchLoader.mirrored`).

        The result is a function of the seed and `step`; every image has its own random numbers.
        """
        settings = self._settings
        if self.is_off:
            return self._preprocessing.cropped(images)
        # one row each for top, left, flip, brightness, contrast; other augmentations have streams of their own
        rows = self._generator(randomness.AUGMENT, step).random((5, self._batch_size))
        uniform = self._on_device(rows, images)
        if mirrored is None:
            mirrored = uniform[2] < (0.5 if settings.flip else 0)
        images = self._crop_and_flip(images, uniform, mirrored, step)
        if settings.trivial:
            operations, strengths = draw_trivial(self._generator(randomness.TRIVIAL, step), self._batch_size)
            images = trivial_augment(images, operations[self._drawn], strengths[self._drawn])
        if settings.rotate:
            angles = settings.rotate * (2 * self._generator(randomness.ROTATE, step).random(self._batch_size) - 1)
            matrices = copy_to_device(torch.from_numpy(rotation_matrices(angles[self._drawn])), images.device)
            images = transform(images, matrices.to(torch.get_default_dtype()), "bilinear")
        if settings.color_jitter != ColorJitter():
            draws = draw_jitter(self._generator(randomness.COLOR_JITTER, step), self._batch_size, settings.color_jitter)
            images = color_jitter(images, draws.share(self._drawn))
        if settings.brightness:
            images = adjust_brightness(images, settings.brightness * (2 * uniform[3] - 1))
        if settings.contrast != (1, 1):
            lowest, highest = settings.contrast
            images = adjust_contrast(images, lowest + uniform[4] * (highest - lowest))
        if settings.erasing:
            rng, size = self._generator(randomness.ERASING, step), self._preprocessing.output_size
            images = erase(images, self._on_device(draw_erased(rng, self._batch_size, size, settings.erasing), images))
        return images

    def mix(self, images: Tensor, labels: Tensor, step: int) -> tuple[Tensor, mixing.MixedLabels]:
        """mixup and CutMix of the augmented images and the labels, int64 [batch], of the whole batch. Returns those of
        this process's share. Call it where `needs_whole_batch`."""
        rng, settings = self._generator(randomness.MIX, step), self._settings
        size = self._preprocessing.output_size
        draws = mixing.draw_mix(rng, self._batch_size, size, settings.mixup, settings.cutmix)
        return mixing.mix(images, labels, draws, self._share)

    def _crop_and_flip(self, images: Tensor, uniform: Tensor, mirrored: Tensor, step: int) -> Tensor:
        settings, size = self._settings, self._preprocessing.output_size
        upside_down = None
        if settings.vertical_flip:
            drawn = self._generator(randomness.VERTICAL_FLIP, step).random(self._batch_size) < 0.5
            upside_down = self._on_device(drawn, images)
        if settings.resized_crop:
            rng, stored = self._generator(randomness.RESIZED_CROP, step), (images.shape[1], images.shape[2])
            boxes = draw_crops(rng, self._batch_size, stored, settings.resized_crop.scale, settings.resized_crop.ratio)
            return resized_crop(images, self._on_device(boxes, images), size, mirrored, upside_down)
        border = settings.padding
        if not settings.random_crop:
            images = self._preprocessing.cropped(images)
        elif border and settings.padding_mode == "black":
            images, border = F.pad(images, (0, 0, *[border] * 4)), 0
        if settings.random_crop or settings.flip or settings.vertical_flip:
            top = (uniform[0] * (images.shape[1] + 2 * border - size[0] + 1)).long() - border
            left = (uniform[1] * (images.shape[2] + 2 * border - size[1] + 1)).long() - border
            images = crop_and_flip(images, top, left, size, mirrored, upside_down, reflects=border > 0)
        return images

    def _generator(self, stream: int, step: int) -> np.random.Generator:
        return generator(self._seed, stream, step)

    def _on_device(self, draws: NDArray[np.generic], images: Tensor) -> Tensor:
        """Random numbers [..., batch] of the whole batch, as those of `images`, on their device."""
        return copy_to_device(torch.from_numpy(np.ascontiguousarray(draws[..., self._drawn])), images.device)
