"""TrivialAugment (Müller and Hutter, 2021): one operation per image, with a random strength.

Operations, strengths and arithmetic are those of torchvision's TrivialAugmentWide on bytes.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from pipeline.device import copy_to_device
from pipeline.training.color_operations import blend, grey
from pipeline.training.geometric_operations import rotation_matrices, transform

# from images, positions in OPERATIONS and strengths, a value each per image, to changed images
Operation = Callable[[Tensor, NDArray[np.int64], NDArray[np.float64]], Tensor]

STRENGTHS = 31
# the largest strength of each operation; its sign is drawn, too
SIGNED = {
    "ShearX": 0.99,
    "ShearY": 0.99,
    "TranslateX": 32.0,
    "TranslateY": 32.0,
    "Rotate": 135.0,
    "Brightness": 0.99,
    "Color": 0.99,
    "Contrast": 0.99,
    "Sharpness": 0.99,
}
OPERATIONS = ("Identity", *SIGNED, "Posterize", "Solarize", "AutoContrast", "Equalize")
GEOMETRIC = ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate")


def _strength_table() -> NDArray[np.float64]:
    """The strengths of all operations, [operations, STRENGTHS], as torchvision computes them."""
    table = {name: torch.linspace(0, largest, STRENGTHS) for name, largest in SIGNED.items()}
    table["Posterize"] = (8 - torch.arange(STRENGTHS) / ((STRENGTHS - 1) / 6)).round()  # bits that are kept
    table["Solarize"] = torch.linspace(1, 0, STRENGTHS)
    return np.array([table.get(name, torch.zeros(STRENGTHS)).tolist() for name in OPERATIONS])


_STRENGTH_TABLE = _strength_table()


def draw_trivial(rng: np.random.Generator, count: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """For each image the position of its operation in OPERATIONS, int64 [count], and its strength, float64 [count]."""
    operation, strength = rng.integers(len(OPERATIONS), size=count), rng.integers(STRENGTHS, size=count)
    is_negative = (rng.random(count) < 0.5) & np.isin(operation, [OPERATIONS.index(name) for name in SIGNED])
    return operation, _STRENGTH_TABLE[operation, strength] * np.where(is_negative, -1, 1)


def trivial_augment(images: Tensor, operations: NDArray[np.int64], strengths: NDArray[np.float64]) -> Tensor:
    """Images, uint8 [batch, height, width, channels], each changed by its operation (see `draw_trivial`). Floats are
    rounded to bytes first, because the operations are defined on bytes."""
    if images.is_floating_point():
        images = images.round().clamp_(0, 255).to(torch.uint8)
    if images.shape[-1] == 1:  # grey images have no colour to change
        operations = np.where(operations == OPERATIONS.index("Color"), OPERATIONS.index("Identity"), operations)
    # operations are known on the host, so that grouping by them does not wait for the device
    groups = _GROUP_OF_OPERATION[operations]
    order = np.argsort(groups, kind="stable")
    index = copy_to_device(torch.from_numpy(order), images.device)
    counts = np.bincount(groups, minlength=len(_GROUPS))
    changed = [
        apply(part, operations[rows], strengths[rows])
        for (_, apply), part, rows in zip(
            _GROUPS,
            images.index_select(0, index).split(counts.tolist()),
            np.split(order, counts.cumsum()[:-1]),
            strict=True,
        )
        if len(rows)
    ]
    back = copy_to_device(torch.from_numpy(np.argsort(order)), images.device)
    return torch.cat(changed).index_select(0, back)


def _move(images: Tensor, operations: NDArray[np.int64], strengths: NDArray[np.float64]) -> Tensor:
    """Shear, shift or rotate, without interpolation. Shearing leaves the upper left corner where it is."""
    height, width = images.shape[1:3]
    matrices = np.tile(np.eye(2, 3), (len(images), 1, 1))
    is_ = {name: operations == OPERATIONS.index(name) for name in GEOMETRIC}
    for name, row, half in (("ShearX", 0, height / 2), ("ShearY", 1, width / 2)):
        matrices[is_[name], row, 1 - row] = strengths[is_[name]]
        matrices[is_[name], row, 2] = strengths[is_[name]] * half
    matrices[is_["TranslateX"], 0, 2] = -np.trunc(strengths[is_["TranslateX"]])
    matrices[is_["TranslateY"], 1, 2] = -np.trunc(strengths[is_["TranslateY"]])
    matrices[is_["Rotate"]] = rotation_matrices(strengths[is_["Rotate"]])
    on_device = copy_to_device(torch.from_numpy(matrices), images.device).to(torch.get_default_dtype())
    return transform(images, on_device, "nearest").round_().to(torch.uint8)


def _brighten(images: Tensor, _: NDArray[np.int64], strengths: NDArray[np.float64]) -> Tensor:
    return (images * _per_image(1 + strengths, images)).clamp_(0, 255).to(torch.uint8)


def _blend_with(degenerate: Callable[[Tensor], Tensor]) -> Operation:
    """An operation that moves an image away from its `degenerate` form, or towards it where the strength is below 0."""

    def apply(images: Tensor, _: NDArray[np.int64], strengths: NDArray[np.float64]) -> Tensor:
        floats = images.to(torch.get_default_dtype())
        return blend(floats, degenerate(floats), _per_image(1 + strengths, images)).to(torch.uint8)

    return apply


def _per_image(values: NDArray[np.float64], images: Tensor) -> Tensor:
    """[batch] on the host as float [batch, 1, 1, 1] on the images' device."""
    on_device = copy_to_device(torch.from_numpy(values), images.device)
    return on_device.to(torch.get_default_dtype())[:, None, None, None]


def _grey_level(images: Tensor) -> Tensor:
    return grey(images).floor_()


def _mean_grey_level(images: Tensor) -> Tensor:
    return _grey_level(images).mean((1, 2), keepdim=True)


def _smooth(images: Tensor) -> Tensor:
    """The images blurred by a 3x3 kernel, but for their border."""
    x = images.permute(0, 3, 1, 2).clone()
    if min(x.shape[2:]) > 2:
        kernel = torch.full((3, 3), 1 / 13, dtype=x.dtype, device=x.device)
        kernel[1, 1] = 5 / 13
        x[:, :, 1:-1, 1:-1] = F.conv2d(x, kernel.expand(x.shape[1], 1, 3, 3), groups=x.shape[1]).round_()
    return x.permute(0, 2, 3, 1)


def _posterize(images: Tensor, _: NDArray[np.int64], bits: NDArray[np.float64]) -> Tensor:
    masks = (256 - 2 ** (8 - bits)).astype(np.uint8)
    return images & copy_to_device(torch.from_numpy(masks), images.device)[:, None, None, None]


def _solarize(images: Tensor, _: NDArray[np.int64], threshold: NDArray[np.float64]) -> Tensor:
    return torch.where(images >= _per_image(255 * threshold, images), 255 - images, images)


def _of_torchvision(name: str) -> Operation:
    """An operation of torchvision; those without a strength take a batch at once."""

    def apply(images: Tensor, _: NDArray[np.int64], __: NDArray[np.float64]) -> Tensor:
        from torchvision.transforms.v2 import functional

        return getattr(functional, name)(images.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)

    return apply


# operations that are computed together; geometric ones differ in their matrices alone
_GROUPS: tuple[tuple[tuple[str, ...], Operation], ...] = (
    (("Identity",), lambda images, _, __: images),
    (GEOMETRIC, _move),
    (("Brightness",), _brighten),
    (("Color",), _blend_with(_grey_level)),
    (("Contrast",), _blend_with(_mean_grey_level)),
    (("Sharpness",), _blend_with(_smooth)),
    (("Posterize",), _posterize),
    (("Solarize",), _solarize),
    (("AutoContrast",), _of_torchvision("autocontrast")),
    (("Equalize",), _of_torchvision("equalize")),
)
_GROUP_OF_OPERATION = np.array(
    [next(number for number, (names, _) in enumerate(_GROUPS) if name in names) for name in OPERATIONS]
)
