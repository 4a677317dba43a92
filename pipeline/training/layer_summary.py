"""How the values of a network's layers are distributed: what TensorFlow's tutorials watch in TensorBoard."""

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
IMAGES = 16  # of the batch, for activations
SAMPLE = 8  # images of the batch, to look at
SIDE = 64  # pixels of them, at most
LAYERS = 16  # at most
VALUES = 2**15  # of a tensor, at most
NONLINEAR = {"relu", "relu_", "relu6", "sigmoid", "tanh", "gelu", "silu", "elu", "leaky_relu", "hardswish"}

Distribution = dict[str, Any]


def summarize(network: nn.Module, inputs: Tensor) -> dict[str, dict[str, Distribution]]:
    """By layer the distributions of its "weights", "gradients" and "activations", those of the first of `inputs`,
    float32 [batch, channels, height, width].

    The activations are what the nonlinearity after the layer makes of its output, or that itself where there is none.
    The network is left as it was.
    """
    layers = watched_layers(network)
    activations = _activations(network, layers, inputs[:IMAGES])
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
    """The first few of `inputs`, to look at; of large ones every so many pixels."""
    stride = -(-max(inputs.shape[2:]) // SIDE)
    return to_visible(inputs[:SAMPLE, :, ::stride, ::stride])


def watched_layers(network: nn.Module) -> dict[str, Any]:
    """The layers with a matrix of weights, by name; of very many, evenly chosen ones."""
    weighted = [(name, layer) for name, layer in network.named_modules() if _is_weighted(layer)]
    if len(weighted) > LAYERS:
        weighted = [weighted[round(i * (len(weighted) - 1) / (LAYERS - 1))] for i in range(LAYERS)]
    return dict(weighted)


def _is_weighted(layer: nn.Module) -> bool:
    weight = getattr(layer, "weight", None)
    return isinstance(weight, nn.Parameter) and weight.dim() > 1


@torch.no_grad()
def distribution(values: Tensor) -> Distribution:
    """`counts` in BINS equal bins between `lowest` and `highest`, the share of `zeros`, `mean` and `std`.

    Of very many values some drawn at random, always at the same places; no counts where some are not finite.
    """
    flat = values.detach().flatten()
    if flat.numel() > VALUES:
        flat = flat[_places(flat.numel(), flat.device)]
    flat = flat.float()
    lowest, highest = flat.aminmax()
    figures = torch.stack([lowest, highest, (flat == 0).float().mean(), flat.mean(), flat.std(correction=0)]).tolist()
    told = dict(zip(("lowest", "highest", "zeros", "mean", "std"), figures, strict=True))
    if not figures[1] - figures[0] < float("inf"):
        return {"zeros": told["zeros"]}
    return {**told, "counts": torch.histc(flat, BINS, figures[0], figures[1]).int().tolist()}


@lru_cache(maxsize=3 * LAYERS)
def _places(count: int, device: torch.device) -> Tensor:
    """VALUES of `count` places. Evenly spaced ones would fall into the same columns of every image."""
    return torch.randint(count, (VALUES,), generator=torch.Generator().manual_seed(0)).to(device)


class _Activations(TorchFunctionMode):
    """Keeps what each layer returns, or the first nonlinearity after it."""

    def __init__(self) -> None:
        super().__init__()
        self.values: dict[str, Tensor] = {}
        self._open: str | None = None  # the layer whose nonlinearity may come

    def hook(self, name: str | None) -> Callable[[nn.Module, Any, Tensor], None]:
        """For the layer of that name; None for one whose activations are not wanted."""

        def keep(_: nn.Module, __: Any, output: Tensor) -> None:
            self._open = name
            if name is not None:
                self.values[name] = output

        return keep

    def __torch_function__(self, function: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if self._open is not None and getattr(function, "__name__", "") in NONLINEAR:
            output = self.values[self._open]
            if result.shape == output.shape:
                self.values[self._open] = result
            elif result.shape[:2] == output.shape[:2]:  # pooled first, for speed: a maximum is the same either way
                self.values[self._open] = function(output.clone(), *args[1:], **(kwargs or {}))
            self._open = None
        return result


@torch.no_grad()
def _activations(network: nn.Module, layers: dict[str, Any], inputs: Tensor) -> dict[str, Tensor]:
    """In inference: nothing is drawn, no statistics are moved."""
    watch = _Activations()
    hooks = [
        layer.register_forward_hook(watch.hook(name if name in layers else None))
        for name, layer in network.named_modules()
        if _is_weighted(layer)
    ]
    was_training = network.training
    try:
        with watch:
            network.eval()(inputs)
    finally:
        network.train(was_training)
        for hook in hooks:
            hook.remove()
    return watch.values
