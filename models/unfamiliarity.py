"""How far an image is from the training images, by what a network computes of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

SMALLEST_LENGTH = 1e-6  # of a vector of features; a shorter one is 0

Outputs = dict[str, Tensor]  # of layers, by their names


class ImageFeatures(nn.Module):
    """Features of an image from what some layers of a network compute: from each convolutional layer of `maps` the mean
    and the maximum of each channel, from `head` (None: not used) what it takes in. The features of each layer are
    scaled to length 1, so that all layers count alike (Müller and Hein 2025, arXiv:2505.18032, for the last layer).
    """

    def __init__(self, maps: Sequence[str], head: str | None) -> None:
        super().__init__()
        self.maps = tuple(maps)
        self.head = head

    @contextmanager
    def seen_in(self, network: nn.Module) -> Iterator[Outputs]:
        """A dictionary that is filled with the values of the layers whenever the network runs within the context."""
        seen: Outputs = {}

        def keep_output(name: str) -> torch.utils.hooks.RemovableHandle:
            layer = network.get_submodule(name)
            return layer.register_forward_hook(lambda _, __, output: seen.__setitem__(name, output))

        def keep_input(name: str) -> torch.utils.hooks.RemovableHandle:
            layer = network.get_submodule(name)
            return layer.register_forward_pre_hook(lambda _, inputs: seen.__setitem__("head", inputs[0]))

        hooks = [keep_output(name) for name in self.maps] + ([keep_input(self.head)] if self.head else [])
        try:
            yield seen
        finally:
            for hook in hooks:
                hook.remove()

    def forward(self, seen: Outputs) -> Tensor:
        """float32 [batch, features], of what `seen_in` gave: float [batch, channels, height, width] for each of the
        maps, of any shape for the head."""
        parts = [_pooled(seen[name]) for name in self.maps]
        if self.head:
            taken = seen["head"]
            parts.append(_pooled(taken) if taken.ndim == 4 else taken.float().flatten(1))
        lengths = [(part * part).sum(1, keepdim=True).sqrt().clamp(min=SMALLEST_LENGTH) for part in parts]
        return torch.cat([part / length for part, length in zip(parts, lengths, strict=True)], 1)


def _pooled(values: Tensor) -> Tensor:
    values = values.float()
    return torch.cat([values.mean((2, 3)), values.amax((2, 3))], 1)


class Unfamiliarity(nn.Module):
    """The distance of an image's features from the mean of the training images', in standard deviations (Mahalanobis
    distance).

    The deviations are those of probabilistic principal components (Tipping and Bishop 1999): `components` are
    orthonormal directions, float32 [features, n], `deviations` the standard deviation along each, float32 [n], and
    `residual_deviation`, a float32 number, that along each direction at right angles to them.
    """

    mean: Tensor
    components: Tensor
    deviations: Tensor
    residual_deviation: Tensor

    def __init__(
        self, features: ImageFeatures, mean: Tensor, components: Tensor, deviations: Tensor, residual_deviation: Tensor
    ) -> None:
        super().__init__()
        self.features = features
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("components", components, persistent=False)
        self.register_buffer("deviations", deviations, persistent=False)
        self.register_buffer("residual_deviation", residual_deviation, persistent=False)

    def forward(self, seen: Outputs) -> Tensor:
        """float32 [batch], 0 or more."""
        centred = self.features(seen) - self.mean
        along = centred @ self.components
        rest = (centred - along @ self.components.T) / self.residual_deviation
        along = along / self.deviations
        return ((along * along).sum(1) + (rest * rest).sum(1)).sqrt()
