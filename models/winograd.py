"""Winograd's algorithm: 5x5 convolutions with 6 times fewer multiplications, for training on CPUs.

Winograd's minimal filtering, F(4x4, 5x5): Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks" (2016,
arXiv:1509.09308). Each 4x4 tile of the output comes from an 8x8 tile of the input: transform the tile and the kernel,
multiply them elementwise, transform back. The three linear transforms are those of Toom-Cook polynomial multiplication,
transposed. All steps are matrix products, so the gradients that autograd derives are as cheap.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

KERNEL = 5
TILE = 4  # output values per side of a tile
POINTS = (0, 1, -1, 2, -2, 1 / 2, -1 / 2)  # where the polynomials are evaluated, besides infinity, which comes last
POINT_COUNT = len(POINTS) + 1


def winograd_conv2d(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`F.conv2d(x, weight, bias, padding=2)` for [batch, channels, height, width] and [out, channels, 5, 5]; the result
    is in channels-last memory order. In float32 its largest relative error is about 1e-5, that of F.conv2d 4e-6."""
    batch, channels, height, width = x.shape
    kernel_transform = kernel_transform_matrix(weight.dtype)
    to_row_tiles, from_row_tiles = tile_matrices(height, x.dtype)
    to_column_tiles, from_column_tiles = tile_matrices(width, x.dtype)
    rows, columns = len(to_row_tiles) // POINT_COUNT, len(to_column_tiles) // POINT_COUNT  # of tiles

    x = x.permute(2, 3, 0, 1).contiguous()  # height and width first: every transform multiplies from the left
    points = (to_row_tiles @ x.view(height, -1)).view(POINT_COUNT * rows, width, -1)
    points = (to_column_tiles @ points).view(POINT_COUNT, rows, POINT_COUNT, columns * batch, channels)
    kernel = torch.einsum("pi,qj,ocij->pqco", kernel_transform, kernel_transform, weight)
    products = points @ kernel[:, None]
    y = from_column_tiles @ products.view(POINT_COUNT * rows, POINT_COUNT * columns, -1)
    y = (from_row_tiles @ y.view(POINT_COUNT * rows, -1)).view(height, width, batch, len(weight))
    return y.permute(2, 3, 0, 1).contiguous(memory_format=torch.channels_last) + bias[:, None, None]


@lru_cache
@torch.inference_mode(False)  # the matrix is cached, and a training may use it later
def kernel_transform_matrix(dtype: torch.dtype) -> Tensor:
    """The transform of one axis of the kernel, [points, 5]: its values at the points, times `_scale`."""
    return torch.from_numpy(_vandermonde(KERNEL) * _scale()[:, None]).to(dtype)


@lru_cache
@torch.inference_mode(False)
def tile_matrices(side: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The transforms of one axis with SAME padding: [points * tiles, side] of the input into tiles, and
    [side, points * tiles] from tiles to the output."""
    tiles = -(-side // TILE)
    to_tiles = np.zeros((POINT_COUNT, tiles, side))
    from_tiles = np.zeros((side, POINT_COUNT, tiles))
    interpolation = np.linalg.inv(_vandermonde(POINT_COUNT)) / _scale()
    values = _vandermonde(TILE)
    for tile in range(tiles):
        start = tile * TILE
        for offset in range(POINT_COUNT):
            if 0 <= (position := start - KERNEL // 2 + offset) < side:
                to_tiles[:, tile, position] = interpolation[offset]
        for offset in range(min(TILE, side - start)):
            from_tiles[start + offset, :, tile] = values[:, offset]
    pair = (to_tiles.reshape(-1, side), from_tiles.reshape(side, -1))
    return torch.from_numpy(pair[0]).to(dtype), torch.from_numpy(pair[1]).to(dtype)


def _vandermonde(length: int) -> NDArray[np.float64]:
    """Evaluates polynomials with `length` coefficients; [points, length]. At infinity: the last coefficient."""
    powers = np.vander(np.array(POINTS, np.float64), length, increasing=True)
    return np.vstack([powers, np.eye(length)[-1]])


def _scale() -> NDArray[np.float64]:
    """A factor per point, [points]: both operands of the product get similar magnitudes, for accuracy in float32."""
    input_magnitude = np.abs(np.linalg.inv(_vandermonde(POINT_COUNT))).sum(0)
    return np.sqrt(input_magnitude / np.abs(_vandermonde(KERNEL)).sum(1))
