"""The networks and layers against TensorFlow's, for the same weights (tests/golden/make.py)."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import models
from models.layers import LocalResponseNorm, SameConv2d, SameMaxPool2d
from models.preprocessing import Preprocessing
from pipeline.average import MovingAverage
from pipeline.preparing.image_folder import ImageFolderOptions
from pipeline.preprocess import preprocess
from pipeline.recipe import load
from pipeline.train import train
from tests.golden import fixed

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def golden() -> Mapping[str, np.ndarray]:
    with np.load(Path(__file__).parent.parent / "golden/tensorflow.npz") as arrays:
        return dict(arrays)


def nchw(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))


def nhwc(x: torch.Tensor) -> np.ndarray:
    return x.detach().numpy().transpose(0, 2, 3, 1)


def to_torch(name: str, value: np.ndarray, spatial: tuple[int, int, int] | None) -> np.ndarray:
    """A TensorFlow weight in torch's layout; `spatial` (height, width, channels) is what a dense layer flattens."""
    if value.ndim == 4:
        return value.transpose(3, 2, 0, 1)
    if value.ndim == 3 and name.endswith("bias"):
        return value.transpose(2, 0, 1)
    if value.ndim == 2:
        if spatial:
            value = value.reshape(*spatial, -1).transpose(2, 0, 1, 3).reshape(value.shape)
        return value.T
    return value


# what the first dense layer of each network flattens
FLATTENED = {
    "softmax_regression": {"output.weight": (28, 28, 1)},
    "mlp": {"hidden.weight": (28, 28, 1)},
    "simple_convnet": {"affine1.weight": (12, 12, 30)},
    "slides_convnet": {"output.weight": (7, 7, 48)},
    "deep_mnist": {"fc1.weight": (7, 7, 64)},
    "cifar10": {"local3.weight": (6, 6, 64)},
    "cifar10_local": {"softmax_linear.weight": (6, 6, 32)},
}


def build(name: str) -> nn.Module:
    (height, width, channels), _ = fixed.NETWORKS[name]
    network = models.build(name, (channels, height, width), 10).eval()
    weights = {
        key: torch.from_numpy(np.ascontiguousarray(to_torch(key, value, FLATTENED[name].get(key))))
        for key, value in fixed.weights(name).items()
    }
    network.load_state_dict(weights)  # strict: the names are the contract's
    return network


@pytest.mark.parametrize("name", fixed.NETWORKS)
def test_logits_loss_and_gradients_are_tensorflows(golden: Mapping[str, np.ndarray], name: str) -> None:
    network = build(name)
    images, labels = nchw(fixed.images(name)), torch.from_numpy(fixed.labels())
    logits = network(images)
    expected = golden[f"{name}/logits"]
    np.testing.assert_allclose(logits.detach().numpy(), expected, atol=TOLERANCE * np.abs(expected).max())
    np.testing.assert_allclose(F.cross_entropy(logits, labels).item(), golden[f"{name}/loss"], rtol=TOLERANCE)
    # in float64: in float32 a value within rounding of a ReLU's or a pool's kink may fall on either side
    F.cross_entropy(network.double()(images.double()), labels).backward()
    for key, value in fixed.weights(name).items():
        # the positions of TensorFlow's values in torch's layout
        positions = to_torch(key, np.arange(value.size).reshape(value.shape), FLATTENED[name].get(key))
        gradient = np.empty(value.size)
        gradient[positions.ravel()] = network.get_parameter(key).grad.numpy().ravel()
        expected = golden[f"{name}/gradient/{key}"]
        actual = gradient if value.size <= 1000 else gradient[::101]
        np.testing.assert_allclose(actual, expected, atol=TOLERANCE * max(1, np.abs(expected).max()), err_msg=key)


@pytest.mark.parametrize("side", [6, 7, 8, 9])
@pytest.mark.parametrize(("kernel", "stride"), [(2, 2), (3, 2), (3, 1), (3, 3), (5, 2)])
def test_same_padding_is_tensorflows(golden: Mapping[str, np.ndarray], side: int, kernel: int, stride: int) -> None:
    x = nchw(fixed.state(f"layers {side}").randn(2, side, side + 3, 4).astype(np.float32))
    pooled = SameMaxPool2d(kernel, stride)(x)
    np.testing.assert_array_equal(nhwc(pooled), golden[f"pool/{side}/{kernel}/{stride}"])
    layer = SameConv2d(4, 3, kernel, stride)
    weight = fixed.state(f"kernel {kernel}").randn(kernel, kernel, 4, 3).astype(np.float32)
    layer.load_state_dict({"weight": torch.from_numpy(weight.transpose(3, 2, 0, 1).copy()), "bias": torch.zeros(3)})
    np.testing.assert_allclose(nhwc(layer(x)), golden[f"conv/{side}/{kernel}/{stride}"], atol=TOLERANCE)


def test_local_response_normalisation_is_tensorflows(golden: Mapping[str, np.ndarray]) -> None:
    x = nchw(30 * fixed.state("lrn").randn(2, 3, 4, 64).astype(np.float32))
    normed = LocalResponseNorm(64, radius=4, bias=1.0, alpha=0.001 / 9, beta=0.75)(x)
    np.testing.assert_allclose(nhwc(normed), golden["lrn"], rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("beta", [0.75, 0.5])
def test_local_response_normalisation_is_its_formula(beta: float) -> None:
    x = np.random.RandomState(0).randn(2, 7, 3, 3)
    expected = np.empty_like(x)
    for channel in range(7):
        near = x[:, max(0, channel - 2) : channel + 3]
        expected[:, channel] = x[:, channel] / (2 + 0.3 * (near**2).sum(1)) ** beta
    normed = LocalResponseNorm(7, radius=2, bias=2.0, alpha=0.3, beta=beta)(torch.from_numpy(x).float())
    np.testing.assert_allclose(normed.numpy(), expected, atol=1e-6)


def test_per_image_standardisation_is_tensorflows(golden: Mapping[str, np.ndarray]) -> None:
    seen = Preprocessing((9, 7), standardize="per-image")(torch.from_numpy(fixed.pictures()))
    np.testing.assert_allclose(nhwc(seen), golden["standardized"], atol=1e-4)


def test_the_centre_crop_is_tensorflows(golden: Mapping[str, np.ndarray]) -> None:
    cropped = Preprocessing((9, 7), crop=4).cropped(torch.from_numpy(fixed.pictures()))
    np.testing.assert_array_equal(cropped.numpy(), golden["cropped"])


def test_the_moving_average_is_tensorflows_over_50_updates(golden: Mapping[str, np.ndarray]) -> None:
    start, changes = fixed.average_values()
    network = nn.Module()
    network.weight = nn.Parameter(torch.from_numpy(start.copy()))
    average = MovingAverage(network, 0.9)
    for step, change in enumerate(changes):
        with torch.no_grad():
            network.get_parameter("weight").add_(torch.from_numpy(change))
        average.update(step)
        np.testing.assert_allclose(
            average.network.get_parameter("weight").numpy(), golden["averages"][step], atol=TOLERANCE
        )


def test_the_cifar10_network_has_the_published_number_of_parameters() -> None:
    assert sum(p.numel() for p in models.build("cifar10", (3, 24, 24), 10).parameters()) == 1_068_298


def test_the_first_logged_loss_of_cifar10_is_tensorflows(
    golden: Mapping[str, np.ndarray], samples: Path, tmp_path: Path
) -> None:
    """4.68, as the tutorial says, in its first edition's initialisation; the draw of the weights moves it by 0.0024."""
    preprocess("rgb", tmp_path, samples, ImageFolderOptions(size=(32, 32), channels="3"))
    settings = ["data.dataset=rgb", "model.conv_std=1e-4", "train.steps=1", "train.evaluate_every=0"]
    run = train(load("cifar10", settings), tmp_path / "run", tmp_path, tracking=False)
    (loss,) = (point["loss"] for point in map(json.loads, run.metrics.read_text().splitlines()) if "loss" in point)
    assert golden["cifar10/first_loss"] == pytest.approx(4.68, abs=0.01)
    assert loss == pytest.approx(golden["cifar10/first_loss"], abs=0.01)


def im2col(x: np.ndarray, size: int) -> np.ndarray:
    """[batch, height, width, channels] to rows of patches, [batch, out, out, size * size * channels]."""
    out = x.shape[1] - size + 1
    patches = [x[:, i : i + out, j : j + out] for i in range(size) for j in range(size)]
    return np.stack(patches, 3).reshape(len(x), out, out, -1)


def test_simple_convnets_gradients_are_those_of_numpy_im2col() -> None:
    """Forward and backward by hand, as the book derives them, in float64."""
    w = {key: value.astype(np.float64) for key, value in fixed.weights("simple_convnet").items()}
    x, labels = fixed.images("simple_convnet").astype(np.float64), fixed.labels()
    columns = im2col(x, 5)
    conv = columns @ w["conv1.weight"].reshape(25, 30) + w["conv1.bias"]
    windows = np.maximum(conv, 0).reshape(8, 12, 2, 12, 2, 30).transpose(0, 1, 3, 5, 2, 4).reshape(8, 12, 12, 30, 4)
    flat = windows.max(-1).reshape(8, -1)
    hidden = np.maximum(flat @ w["affine1.weight"] + w["affine1.bias"], 0)
    logits = hidden @ w["affine2.weight"] + w["affine2.bias"]
    softmax = np.exp(logits - logits.max(1, keepdims=True))
    softmax /= softmax.sum(1, keepdims=True)
    delta = (softmax - np.eye(10)[labels]) / 8
    delta_hidden = delta @ w["affine2.weight"].T * (hidden > 0)
    delta_pooled = (delta_hidden @ w["affine1.weight"].T).reshape(8, 12, 12, 30, 1)
    won = np.arange(4) == windows.argmax(-1)[..., None]
    delta_conv = (won * delta_pooled).reshape(8, 12, 12, 30, 2, 2).transpose(0, 1, 4, 2, 5, 3).reshape(8, 24, 24, 30)
    delta_conv = delta_conv * (conv > 0)
    expected = {
        "conv1.weight": np.einsum("nijp,nijo->po", columns, delta_conv).reshape(5, 5, 1, 30),
        "conv1.bias": delta_conv.sum((0, 1, 2)),
        "affine1.weight": flat.T @ delta_hidden,
        "affine1.bias": delta_hidden.sum(0),
        "affine2.weight": hidden.T @ delta,
        "affine2.bias": delta.sum(0),
    }
    network = build("simple_convnet").double()
    F.cross_entropy(network(nchw(x)), torch.from_numpy(labels)).backward()
    for key, value in expected.items():
        actual = network.get_parameter(key).grad.numpy()
        derived = to_torch(key, value, FLATTENED["simple_convnet"].get(key))
        np.testing.assert_allclose(actual, derived, atol=1e-12, err_msg=key)
