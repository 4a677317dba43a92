"""Histograms of each layer's weights, gradients and activations, as TensorFlow's tutorials show them in TensorBoard."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pipeline.reporting.network_input import to_visible

BINS = 40
ACTIVATION_IMAGES = 16  # images of the batch from which activations are computed
SAMPLE_IMAGES = 8  # images of the batch that are kept
MAX_SIDE = 64  # pixels per side of the images that are kept
MAX_LAYERS = 16
MAX_VALUES = 2**15  # per tensor
NONLINEARITIES = {"relu", "relu_", "relu6", "sigmoid", "tanh", "gelu", "silu", "elu", "leaky_relu", "hardswish"}

Distribution = dict[str, Any]


def summarize(network: nn.Module, inputs: Tensor) -> dict[str, dict[str, Distribution]]:
    """By layer, the distributions of its "weights", "gradients" and "activations"; the latter for the first few images
    of `inputs`, float32 [batch, channels, height, width].

    A layer's activations are the output of the nonlinearity that follows it, or its own output where none follows.
    The network is not changed.
    """
    layers = watched_layers(network)
    activations = _activations(network, layers, inputs[:ACTIVATION_IMAGES])
    return {
        name: {
            "weights": distribution(layer.weight),
            **({} if layer.weight.grad is None else {"gradients": distribution(layer.weight.grad)}),
            "activations": distribution(activations[name]),
        }
        for name, layer in layers.items()
        if name in activations
    }


def sample(inputs: Tensor) -> NDArray[np.uint8]:
    """The first few images of `inputs`, uint8 [n, height, width, channels]; large ones are subsampled."""
    stride = -(-max(inputs.shape[2:]) // MAX_SIDE)
    return to_visible(inputs[:SAMPLE_IMAGES, :, ::stride, ::stride])


def watched_layers(network: nn.Module) -> dict[str, Any]:
    """The layers with a weight matrix or kernel, by name; where there are too many, an evenly spaced choice."""
    weighted = [(name, layer) for name, layer in network.named_modules() if _is_weighted(layer)]
    if len(weighted) > MAX_LAYERS:
        weighted = [weighted[round(i * (len(weighted) - 1) / (MAX_LAYERS - 1))] for i in range(MAX_LAYERS)]
    return dict(weighted)


def _is_weighted(layer: nn.Module) -> bool:
    weight = getattr(layer, "weight", None)
    return isinstance(weight, nn.Parameter) and weight.dim() > 1


@torch.no_grad()
def distribution(values: Tensor) -> Distribution:
    """`counts` in BINS equal bins between `lowest` and `highest`, the fraction of `zeros`, `mean` and `std`.

    Of a large tensor, a random sample that is the same every time; `zeros` alone where values are not finite.
    """
    flat = values.detach().flatten()
    if flat.numel() > MAX_VALUES:
        flat = flat[_sample_positions(flat.numel(), flat.device)]
    flat = flat.float()
    lowest, highest = flat.aminmax()
    figures = torch.stack([lowest, highest, (flat == 0).float().mean(), flat.mean(), flat.std(correction=0)]).tolist()
    statistics = dict(zip(("lowest", "highest", "zeros", "mean", "std"), figures, strict=True))
    if not figures[1] - figures[0] < float("inf"):
        return {"zeros": statistics["zeros"]}
    return {**statistics, "counts": torch.histc(flat, BINS, figures[0], figures[1]).int().tolist()}


@lru_cache(maxsize=3 * MAX_LAYERS)
def _sample_positions(count: int, device: torch.device) -> Tensor:
    """MAX_VALUES random positions below `count`. Evenly spaced ones would hit the same columns of every image."""
    return torch.randint(count, (MAX_VALUES,), generator=torch.Generator().manual_seed(0)).to(device)


class _Activations(TorchFunctionMode):
    """Records the output of each layer, replaced by that of the nonlinearity that follows it."""

    def __init__(self) -> None:
        super().__init__()
        self.values: dict[str, Tensor] = {}
        self._current: str | None = None  # the layer whose nonlinearity may come next

    def hook(self, name: str | None) -> Callable[[nn.Module, Any, Tensor], None]:
        """A forward hook for the layer `name`; None for a layer that is not recorded."""

        def record(_: nn.Module, __: Any, output: Tensor) -> None:
            self._current = name
            if name is not None:
                self.values[name] = output

        return record

    def __torch_function__(self, function: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if self._current is not None and getattr(function, "__name__", "") in NONLINEARITIES:
            output = self.values[self._current]
            if result.shape == output.shape:
                self.values[self._current] = result
            elif result.shape[:2] == output.shape[:2]:  # pooled first, for speed: the maximum is the same
                self.values[self._current] = function(output.clone(), *args[1:], **(kwargs or {}))
            self._current = None
        return result


@torch.no_grad()
def _activations(network: nn.Module, layers: dict[str, Any], inputs: Tensor) -> dict[str, Tensor]:
    """Activations in inference mode, so that no random numbers are drawn and no running statistics change."""
    activations = _Activations()
    hooks = [
        layer.register_forward_hook(activations.hook(name if name in layers else None))
        for name, layer in network.named_modules()
        if _is_weighted(layer)
    ]
    modes = [(layer, layer.training) for layer in network.modules()]  # frozen layers are in inference mode already
    try:
        with activations:
            network.eval()(inputs)
    finally:
        for layer, is_training in modes:
            layer.training = is_training
        for hook in hooks:
            hook.remove()
    return activations.values
