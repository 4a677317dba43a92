"""Builds, checks and loads the network of a recipe or run, and counts its parameters and multiply-adds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from convline.errors import ConvlineError
from convline.malloc import keep_freed_memory
from models import build
from models.layers import LocallyConnected2d
from models.preprocessing import Preprocessing
from models.served_network import ServedNetwork
from pipeline import checkpoint
from pipeline.recipe import Recipe
from pipeline.run import Run

# what torch, or a network of timm, raises for sizes that a network cannot process
SIZE_ERRORS = (ValueError, TypeError, RuntimeError, ArithmeticError, AssertionError)

LAYERS_WITH_WEIGHTS = (nn.Conv2d, nn.Linear, LocallyConnected2d)

# from uint8 images [n, height, width, channels] to probability and logit, float32 [n, classes]; and, of a network that
# tells it, to how unfamiliar each image is, float32 [n]
Predict = Callable[[NDArray[np.uint8]], tuple[NDArray[np.float32], ...]]


def build_network(recipe: Recipe, meta: dict[str, Any]) -> ServedNetwork:
    """The network of a recipe, initialised by its seed, with preprocessing for the dataset that `meta` describes.

    Raises ConvlineError where the network does not accept the dataset's images.
    """
    image = meta["image"]
    try:
        preprocessing = _preprocessing(recipe, meta)
        shape = (image["channels"], *preprocessing.output_size)
        torch.manual_seed(recipe.train.seed)
        network = build(recipe.model.name, shape, len(meta["classes"]), **recipe.model.options)
        served = ServedNetwork(preprocessing, network)
        with torch.inference_mode():  # some networks refuse a size only when they compute
            served.eval()(torch.zeros((1, image["height"], image["width"], image["channels"]), dtype=torch.uint8))
    except SIZE_ERRORS as error:
        raise ConvlineError(
            f"the network {recipe.model.name} does not accept the dataset {meta['name']}, whose images are "
            f"{image['height']}x{image['width']}x{image['channels']}: {_first_line(error)}"
        ) from error
    return served.train()


def _preprocessing(recipe: Recipe, meta: dict[str, Any]) -> Preprocessing:
    """Raises ValueError where mean and std do not match the images, ConvlineError where they are not known yet."""
    image, standardize = meta["image"], recipe.preprocess.standardize
    size, crop = (image["height"], image["width"]), recipe.preprocess.crop_size
    if standardize == "weights":
        raise ConvlineError(
            'preprocess.standardize is "weights", which only `pipeline train` replaces by numbers; set it to '
            "{mean = [...], std = [...]}"
        )
    if isinstance(standardize, str):
        return Preprocessing(size, crop, standardize, meta["mean"], meta["std"])
    if len(standardize.mean) != image["channels"]:
        raise ValueError(
            f"preprocess.standardize has a mean and std for {len(standardize.mean)} channels, the images have "
            f"{image['channels']}"
        )
    mean, std = ([255 * value for value in values] for values in (standardize.mean, standardize.std))
    return Preprocessing(size, crop, "per-channel", mean, std)


def check_trains(served: ServedNetwork, recipe: Recipe, meta: dict[str, Any], batch_size: int) -> None:
    """Raises ConvlineError where a network cannot train on such a small batch, or where an augmentation has no effect.

    The network keeps its weights and statistics.
    """
    image, preprocessing, augment = meta["image"], served.preprocessing, recipe.augment
    size = (image["height"], image["width"])
    if augment.random_crop and not augment.padding and preprocessing.output_size == size:
        raise ConvlineError(
            f"augment.random_crop has no effect: a crop of {size[0]}x{size[1]} has only one position in the images of "
            f"{meta['name']}; set preprocess.crop below their size, or augment.padding"
        )
    batch = torch.zeros((min(batch_size, 2), *size, image["channels"]), dtype=torch.uint8)
    statistics = [(buffer, buffer.clone()) for buffer in served.buffers()]
    try:
        served.train()(batch)
    except SIZE_ERRORS as error:
        raise ConvlineError(
            f"the network {recipe.model.name} does not train on batches of {batch_size}: {_first_line(error)}"
        ) from error
    for buffer, before in statistics:
        buffer.copy_(before)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def load_network(run: Run, weights: str = "averaged") -> tuple[ServedNetwork, int]:
    """The run's network with its "averaged" or "raw" weights that count (see `checkpoint.load_kept`), for inference,
    and their step.

    Raises ConvlineError where the run has no checkpoint yet, or no intact one that fits it.
    """
    folder = run.folder / "checkpoints"
    state = checkpoint.load_kept(folder)
    if state is None and checkpoint.paths(folder):
        raise ConvlineError(
            f"every checkpoint in {folder} is damaged; `pipeline train --resume` starts again at step 0"
        )
    if state is None:
        raise ConvlineError(f"{run.folder} has no checkpoint yet; `pipeline train` writes one")
    return network_from_checkpoint(run, state, weights), state["step"]


def network_from_checkpoint(run: Run, state: dict[str, Any], weights: str = "averaged") -> ServedNetwork:
    """The run's network with the "averaged" or "raw" weights of a checkpoint's `state`, for inference.

    Raises ConvlineError where they do not fit the run.
    """
    run.check_provenance(state)
    served = build_network(run.recipe, run.info["dataset"])
    with run.loading(state):
        served.network.load_state_dict(state[weights])
    return served.eval().requires_grad_(False)


def predictor(served: nn.Module, device: torch.device) -> Predict:
    """A network that is on `device` already, as a function on NumPy arrays."""
    keep_freed_memory()

    @torch.inference_mode()
    def predict(images: NDArray[np.uint8]) -> tuple[NDArray[np.float32], ...]:
        outputs = served(torch.from_numpy(np.ascontiguousarray(images)).to(device))
        return tuple(output.cpu().numpy() for output in outputs)

    return predict


@dataclass(frozen=True)
class Layer:
    """A layer with weights: `name`, `kind`, the shapes of its input and output for one image, the number of its
    `parameters`, and `multiply_adds`, the number of multiplications by a weight for one image."""

    name: str
    kind: str
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    parameters: int
    multiply_adds: int


@torch.inference_mode()
def layers(network: nn.Module, image_shape: tuple[int, int, int]) -> list[Layer]:
    """The convolutions and linear layers, in the order in which an image of (channels, height, width) first passes
    them; the `multiply_adds` of a layer that it passes several times are those of all."""
    passed: dict[str, Layer] = {}

    def record(name: str) -> Callable[[Any, Any, Tensor], None]:
        def hook(layer: Any, inputs: Any, output: Tensor) -> None:
            weight, bias = layer.weight, layer.bias
            # each weight is used once for every output value that shares a bias
            products = weight.numel() * output.numel() // (len(weight) if bias is None else bias.numel())
            size = weight.numel() + (0 if bias is None else bias.numel())
            input_shape, output_shape = tuple(inputs[0].shape[1:]), tuple(output.shape[1:])
            products += passed[name].multiply_adds if name in passed else 0
            passed[name] = Layer(name, _kind(layer), input_shape, output_shape, size, products)

        return hook

    weighted = {name: layer for name, layer in network.named_modules() if isinstance(layer, LAYERS_WITH_WEIGHTS)}
    hooks = [layer.register_forward_hook(record(name)) for name, layer in weighted.items()]
    network.eval()(torch.zeros(1, *image_shape, device=next(network.parameters()).device))
    for hook in hooks:
        hook.remove()
    return list(passed.values())


def _kind(layer: nn.Module) -> str:
    if isinstance(layer, nn.Linear):
        return "linear"
    height, width = layer.weight.shape[-2:] if isinstance(layer, nn.Conv2d) else [layer.kernel_size] * 2
    return f"{'conv' if isinstance(layer, nn.Conv2d) else 'locally connected'} {height}×{width}"


def count_parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def network_input_shape(run: Run, served: ServedNetwork) -> tuple[int, int, int]:
    """The shape of an image at the input of a run's network, after the crop: channels, height, width."""
    height, width = served.preprocessing.output_size
    return run.spec.channels, height, width


def multiply_adds(network: nn.Module, image_shape: tuple[int, int, int]) -> int:
    """The number of multiply-adds of all convolutions and linear layers, for one image."""
    return sum(layer.multiply_adds for layer in layers(network, image_shape))
