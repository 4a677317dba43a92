"""From a recipe and the images it meets to the module that is trained and served."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from convline.errors import ConvlineError
from models import build
from models.layers import LocallyConnected2d
from models.preprocessing import Preprocessing
from models.served import Served
from pipeline import checkpoint
from pipeline.recipe import Recipe
from pipeline.run import Run

# torch refuses impossible sizes by exceptions of several kinds
IMPOSSIBLE = (ValueError, TypeError, RuntimeError, ArithmeticError)

# probability and logit, float32 [n, classes], of uint8 images [n, height, width, channels]
Predict = Callable[[NDArray[np.uint8]], tuple[NDArray[np.float32], NDArray[np.float32]]]


def build_served(recipe: Recipe, meta: dict[str, Any]) -> Served:
    """Preprocessing and a freshly initialised network, by the recipe's seed, for a dataset's `meta`.

    Raises ConvlineError where the network does not accept the dataset's images.
    """
    image = meta["image"]
    try:
        preprocessing = Preprocessing(
            (image["height"], image["width"]),
            recipe.preprocess.crop,
            recipe.preprocess.standardize,
            meta["mean"],
            meta["std"],
        )
        shape = (image["channels"], *preprocessing.output_size)
        torch.manual_seed(recipe.train.seed)
        served = Served(preprocessing, build(recipe.model.name, shape, len(meta["classes"]), **recipe.model.options))
        with torch.inference_mode():  # some networks find out only when they see an image
            served.eval()(torch.zeros((1, image["height"], image["width"], image["channels"]), dtype=torch.uint8))
    except IMPOSSIBLE as error:
        raise ConvlineError(
            f"the network {recipe.model.name} does not accept the dataset {meta['name']}, whose images are "
            f"{image['height']}x{image['width']}x{image['channels']}: {_first_line(error)}"
        ) from error
    return served.train()


def check_trains(served: Served, recipe: Recipe, meta: dict[str, Any], batch_size: int) -> None:
    """Raises ConvlineError where a network cannot train on batches so small, or a distortion has no effect.

    The module is of no use afterwards: layers that count what they see have seen nothing but black.
    """
    image, preprocessing, augment = meta["image"], served.preprocessing, recipe.augment
    size = (image["height"], image["width"])
    if augment.random_crop and not augment.padding and preprocessing.output_size == size:
        raise ConvlineError(
            f"augment.random_crop has no effect: a window of {size[0]}x{size[1]} fits the images of {meta['name']} at "
            "one place only; set preprocess.crop below their size, or augment.padding"
        )
    batch = torch.zeros((min(batch_size, 2), *size, image["channels"]), dtype=torch.uint8)
    try:
        served.train()(batch)
    except IMPOSSIBLE as error:
        raise ConvlineError(
            f"the network {recipe.model.name} does not train on batches of {batch_size}: {_first_line(error)}"
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def load_served(run: Run, weights: str = "averaged") -> tuple[Served, int]:
    """The run's network with its newest "averaged" or "raw" weights, for inference, and their step.

    Raises ConvlineError where the run has no checkpoint yet, or none that is whole and its own.
    """
    folder = run.folder / "checkpoints"
    state = checkpoint.load_newest(folder)
    if state is None and checkpoint.paths(folder):
        raise ConvlineError(
            f"every checkpoint in {folder} is damaged; `pipeline train --resume` begins again at step 0"
        )
    if state is None:
        raise ConvlineError(f"{run.folder} has no checkpoint yet; `pipeline train` makes one")
    return restored(run, state, weights), state["step"]


def restored(run: Run, state: dict[str, Any], weights: str = "averaged") -> Served:
    """The run's network with the "averaged" or "raw" weights of a checkpoint's `state`, for inference.

    Raises ConvlineError where they are not this run's.
    """
    run.check_provenance(state)
    served = build_served(run.recipe, run.info["dataset"])
    with run.fitting(state):
        served.network.load_state_dict(state[weights])
    return served.eval().requires_grad_(False)


def predictor(served: nn.Module, device: torch.device) -> Predict:
    """A served module, which is on `device` already, as a function on NumPy arrays."""

    @torch.inference_mode()
    def predict(images: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        probability, logit = served(torch.from_numpy(np.ascontiguousarray(images)).to(device))
        return probability.cpu().numpy(), logit.cpu().numpy()

    return predict


@dataclass(frozen=True)
class Layer:
    """A layer with weights: its `name`, `kind`, the shapes of what it takes and returns for one image, its
    `parameters` and `multiply_adds`, the multiplications with a weight that one image takes."""

    name: str
    kind: str
    takes: tuple[int, ...]
    returns: tuple[int, ...]
    parameters: int
    multiply_adds: int


@torch.inference_mode()
def layers(network: nn.Module, image_shape: tuple[int, int, int]) -> list[Layer]:
    """The convolutions and linear layers, in the order in which an image of (channels, height, width) meets them."""
    met: list[Layer] = []

    def note(name: str) -> Callable[[Any, Any, Tensor], None]:
        def hook(layer: Any, inputs: Any, output: Tensor) -> None:
            weight, bias = layer.weight, layer.bias
            # a weight is used once for each of the values that share a bias
            products = weight.numel() * output.numel() // (len(weight) if bias is None else bias.numel())
            size = weight.numel() + (0 if bias is None else bias.numel())
            takes, returns = tuple(inputs[0].shape[1:]), tuple(output.shape[1:])
            met.append(Layer(name, _kind(layer), takes, returns, size, products))

        return hook

    weighted = {name: layer for name, layer in network.named_modules() if isinstance(layer, WEIGHTED)}
    hooks = [layer.register_forward_hook(note(name)) for name, layer in weighted.items()]
    network.eval()(torch.zeros(1, *image_shape, device=next(network.parameters()).device))
    for hook in hooks:
        hook.remove()
    return met


WEIGHTED = (nn.Conv2d, nn.Linear, LocallyConnected2d)


def _kind(layer: nn.Module) -> str:
    if isinstance(layer, nn.Linear):
        return "linear"
    height, width = layer.weight.shape[-2:] if isinstance(layer, nn.Conv2d) else [layer.kernel_size] * 2
    return f"{'conv' if isinstance(layer, nn.Conv2d) else 'locally connected'} {height}×{width}"


def count_parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def seen_shape(run: Run, served: Served) -> tuple[int, int, int]:
    """Of what a run's network sees of an image: channels, height, width."""
    height, width = served.preprocessing.output_size
    return run.spec.channels, height, width


def multiply_adds(network: nn.Module, image_shape: tuple[int, int, int]) -> int:
    """Those of convolutions and linear layers together, for one image."""
    return sum(layer.multiply_adds for layer in layers(network, image_shape))


def choose_device(name: str, rank: int = 0) -> torch.device:
    """The device of that name, for the process `rank` on this machine; "auto" takes CUDA where it works.

    Raises ConvlineError for a device that is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise ConvlineError(f"--device {name} is not known here; use auto, cpu, cuda or cuda:N")
    device = torch.device("cuda", rank) if name == "cuda" else torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConvlineError(f"--device {name}: torch sees {torch.cuda.device_count()} CUDA devices here")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.backends.cudnn.allow_tf32 = False  # it keeps 10 bits of mantissa: not what parity proves
    return device
