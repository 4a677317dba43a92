"""mixup and CutMix: blend each image with another one of the batch, and its label with that one's."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.device import copy_to_device
from pipeline.training.geometric_operations import Size, inside


class MixedLabels(NamedTuple):
    """Labels of mixed images. The loss of an image is weight * CE(label) + (1 - weight) * CE(partner)."""

    label: Tensor  # int64 [share], of the image itself
    partner: Tensor  # int64 [share], of the image that it was mixed with
    weight: Tensor  # float [share], from 0 to 1: how much of the image is its own


class MixDraws(NamedTuple):
    """Random numbers for the images of a whole batch. `partner`, int64 [batch]: a permutation of the batch. `boxes`,
    int64 [4, batch] (top, left, height, width): what CutMix takes from the partner; empty where mixup blends. `weight`,
    float64 [batch]: how much of the image is its own."""

    partner: NDArray[np.int64]
    boxes: NDArray[np.int64]
    weight: NDArray[np.float64]


def draw_mix(rng: np.random.Generator, count: int, size: Size, mixup: float, cutmix: float) -> MixDraws:
    """Partners, boxes and weights for images of `size`. With both `mixup` and `cutmix` above 0, each image takes one of
    them, with probability 1/2.

    mixup (Zhang et al., 2018): the weight is from Beta(mixup, mixup). CutMix (Yun et al., 2019): with λ from
    Beta(cutmix, cutmix), the box has √(1 - λ) of the image's height and width around a random pixel and is cut off at
    the border, as torchvision's; the weight is 1 - its share of the image's area.
    """
    partner = rng.permutation(count)
    choice, row, column = rng.random((3, count))
    own = rng.beta(mixup, mixup, count) if mixup else np.ones(count)
    if not cutmix:
        return MixDraws(partner, np.zeros((4, count), np.int64), own)
    half_side = 0.5 * np.sqrt(1 - rng.beta(cutmix, cutmix, count))
    top, height = _cut_off((row * size[0]).astype(np.int64), (half_side * size[0]).astype(np.int64), size[0])
    left, width = _cut_off((column * size[1]).astype(np.int64), (half_side * size[1]).astype(np.int64), size[1])
    is_cut = choice < 0.5 if mixup else np.ones(count, bool)
    boxes = np.where(is_cut, [top, left, height, width], 0)
    return MixDraws(partner, boxes, np.where(is_cut, 1 - height * width / (size[0] * size[1]), own))


def _cut_off(
    centre: NDArray[np.int64], half: NDArray[np.int64], size: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Start and length of centre ± half within 0 to size."""
    start, end = np.maximum(centre - half, 0), np.minimum(centre + half, size)
    return start, end - start


def mix(images: Tensor, labels: Tensor, draws: MixDraws, share: slice) -> tuple[Tensor, MixedLabels]:
    """The images and labels of `share`, mixed with their partners.

    `images` [batch, height, width, channels] and `labels` int64 [batch] are those of the whole batch, because any image
    may be another's partner. Mixed images are float.
    """
    dtype, device = torch.get_default_dtype(), images.device
    partner = copy_to_device(torch.from_numpy(draws.partner[share]), device)
    boxes = copy_to_device(torch.from_numpy(np.ascontiguousarray(draws.boxes[:, share])), device)
    weight = copy_to_device(torch.from_numpy(draws.weight[share]), device).to(dtype)
    is_cut = (boxes[2] * boxes[3] > 0)[:, None, None]
    pasted = inside(boxes, (images.shape[1], images.shape[2]))
    own = torch.where(is_cut, (~pasted).to(dtype), weight[:, None, None])[..., None]
    mixed = torch.lerp(images.index_select(0, partner).to(dtype), images[share].to(dtype), own)
    return mixed, MixedLabels(labels[share], labels.index_select(0, partner), weight)
