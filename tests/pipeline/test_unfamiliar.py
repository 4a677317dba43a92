"""`export --unfamiliar`: how far an image is from the training images, by scikit-learn's principal components."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
import torchvision
from numpy.typing import NDArray
from onnx import numpy_helper
from sklearn.decomposition import PCA
from sklearn.metrics import roc_auc_score
from torch.nn import functional as F

from convline.errors import ModelError
from pipeline.dataset import Dataset
from pipeline.exporting.tolerances import TOLERANCES
from pipeline.exporting.unfamiliar_fit import last_maps
from pipeline.exporting.unfamiliar_proof import UnfamiliarProof
from pipeline.network import load_network
from pipeline.run import Run
from serving.model import open_model
from tests.conftest import run_command
from tests.serving.helpers import resealed
from tests.shared import shared_folder

TRAIN = ("pipeline", "train", "digits", "--steps", 200, "--tracking", "none")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose run has validation images, exported with --unfamiliar. Do not change it."""

    def make(folder: Path) -> None:
        run_command(folder, *TRAIN, "--set", "data.validation=300")
        exported = run_command(folder, "pipeline", "export", "--unfamiliar")
        (folder / "printed").write_text(exported.stdout)

    return shared_folder(tmp_path_factory, "unfamiliar", make)


@pytest.fixture(scope="module")
def model(project: Path) -> Path:
    return project / "runs/digits/model.onnx"


def metadata(path: Path) -> dict[str, Any]:
    return {entry.key.removeprefix("convline."): json.loads(entry.value) for entry in onnx.load(path).metadata_props}


def images_of(project: Path, split: str) -> NDArray[np.uint8]:
    run = Run.open(project / "runs/digits")
    chosen = run.split(Dataset.open(project / "data", "digits"), split)
    return chosen.images[chosen.rows]


def distances(path: Path, images: NDArray[np.uint8]) -> NDArray[np.float32]:
    (found,) = onnxruntime.InferenceSession(path).run(["unfamiliar"], {"image": images})
    return found


@torch.inference_mode()
def features(project: Path, images: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Mean and maximum of each channel of both convolutions, and what the last layer takes in, each of length 1."""
    served, _ = load_network(Run.open(project / "runs/digits"))
    network: Any = served.network
    conv1 = F.conv2d(
        served.preprocessing(torch.from_numpy(images)), network.conv1.weight, network.conv1.bias, padding=1
    )
    conv2 = F.conv2d(F.max_pool2d(conv1.relu(), 2), network.conv2.weight, network.conv2.bias, padding=1)
    hidden = F.linear(F.max_pool2d(conv2.relu(), 2).flatten(1), network.fc1.weight, network.fc1.bias).relu()
    parts = [np.concatenate([x.mean((2, 3)), x.amax((2, 3))], 1) for x in (conv1, conv2)] + [hidden.numpy()]
    return np.concatenate([x / np.linalg.norm(x, axis=1, keepdims=True) for x in parts], 1).astype(np.float64)


def test_distances_are_those_of_scikit_learns_probabilistic_components(project: Path, model: Path) -> None:
    training = features(project, images_of(project, "train"))
    components = metadata(model)["unfamiliar"]["components"]
    assert components == min(256, min(training.shape) // 2)
    fitted = PCA(components, svd_solver="full").fit(training)

    def mahalanobis(images: NDArray[np.uint8]) -> NDArray[np.float64]:
        centred = features(project, images) - fitted.mean_
        return np.sqrt(np.einsum("ij,jk,ik->i", centred, fitted.get_precision(), centred))

    unit = np.quantile(mahalanobis(images_of(project, "validation")), 0.99, method="higher")
    noise = np.random.default_rng(0).integers(0, 256, (50, 8, 8, 1), np.uint8)
    for images in (images_of(project, "test"), noise):
        assert distances(model, images) == pytest.approx(mahalanobis(images) / unit, rel=1e-3)


def test_99_of_100_validation_images_are_below_1_and_the_shares_are_stated(project: Path, model: Path) -> None:
    found = metadata(model)["unfamiliar"]
    for split, count in (("validation", 300), ("test", 359)):
        above = int((distances(model, images_of(project, split)) > 1).sum())
        assert (found[split]["count"], found[split]["above_1"]) == (count, above)
    assert found["validation"]["above_1"] in (2, 3)  # the 99% quantile of 300 is the third from above
    low, high = found["test"]["interval"]
    assert low < found["test"]["above_1"] / 359 < high
    printed = (project / "printed").read_text()
    assert f"validation {found['validation']['above_1']} of 300" in printed and "|Δunfamiliar|" in printed


def test_images_of_another_kind_are_told_from_digits(project: Path, model: Path) -> None:
    rng = np.random.default_rng(1)
    test = distances(model, images_of(project, "test"))
    flat = np.broadcast_to(rng.integers(0, 256, (200, 1, 1, 1), np.uint8), (200, 8, 8, 1))
    noise = rng.integers(0, 256, (200, 8, 8, 1), np.uint8)
    for others in (np.ascontiguousarray(flat), noise, 255 - images_of(project, "test")[:200]):
        scores = np.concatenate([test, distances(model, others)])
        assert roc_auc_score(np.arange(len(scores)) >= len(test), scores) > 0.95


def test_the_file_answers_as_without_it(project: Path, model: Path, tmp_path: Path) -> None:
    run_command(project, "pipeline", "export", "--output", tmp_path / "plain.onnx", "--tracking", "none")
    images = images_of(project, "test")
    plain, telling = (onnxruntime.InferenceSession(path) for path in (tmp_path / "plain.onnx", model))
    assert [value.name for value in plain.get_outputs()] == ["probability", "logit"]
    for expected, found in zip(
        plain.run(None, {"image": images}), telling.run(["probability", "logit"], {"image": images}), strict=True
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", [("--precision", "fp16"), ("--precision", "int8", "--any-size")])
def test_other_precisions_set_their_own_unit(project: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    path = tmp_path / "m.onnx"
    run_command(project, "pipeline", "export", "--unfamiliar", *options, "--output", path, "--tracking", "none")
    validation = distances(path, images_of(project, "validation"))
    assert (validation > 1).sum() in (2, 3) and np.isfinite(validation).all()
    assert open_model(path, "cpu").tells_unfamiliar  # the self-test has passed


def test_a_published_file_is_proven_again_with_its_own_constants(project: Path, model: Path) -> None:
    assert "|Δunfamiliar|" in run_command(project, "pipeline", "parity", model).stdout


def test_serving_refuses_a_file_that_tells_other_distances(model: Path, tmp_path: Path) -> None:
    def double(proto: onnx.ModelProto) -> None:
        (tensor,) = (t for t in proto.graph.initializer if t.name == "constant.unfamiliarity.deviations")
        tensor.CopyFrom(numpy_helper.from_array(2 * numpy_helper.to_array(tensor), tensor.name))

    with pytest.raises(ModelError, match=r"self-test.*unfamiliar differ"):
        open_model(resealed(model, tmp_path / "m.onnx", double), "cpu")


def test_a_proof_fails_for_other_distances_and_for_nan() -> None:
    expected = np.array([0.5, 0.9999, 3.0], np.float32)

    def problems(found: list[float], precision: Any = "fp32") -> list[str]:
        proof = UnfamiliarProof(TOLERANCES[precision])
        proof.add(expected, np.array(found, np.float32))
        return proof.problems

    assert not problems([0.5005, 1.0, 3.002])
    assert "1.7e-03 of the distance" in problems([0.5, 1.0, 3.005])[0]
    for precision in ("fp32", "fp16", "int8"):
        assert "finite" in problems([0.5, np.nan, 3.0], precision)[0]
    assert not problems([0.9, 1.1, 2.0], "int8")  # one image on the other side of 1
    proof = UnfamiliarProof(TOLERANCES["int8"])
    proof.add(np.full(1000, 0.5, np.float32), np.repeat(np.array([0.5, 1.5], np.float32), [979, 21]))
    assert "21 of 1000 images are on the other side" in proof.problems[0]


@pytest.mark.parametrize(
    ("network", "size", "head", "expected"),
    [
        (
            timm.create_model("tf_efficientnet_lite0"),
            64,
            "classifier",
            ["blocks.0", "blocks.1", "blocks.2", "blocks.4", "blocks"],
        ),
        (torchvision.models.resnet18(), 64, "fc", ["relu", "layer1", "layer2", "layer3"]),
        (timm.create_model("swin_tiny_patch4_window7_224"), 224, "head.fc", ["patch_embed.proj"]),  # channels last
        (torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 2)), 8, "1", []),
    ],
    ids=["efficientnet", "resnet", "swin", "linear"],
)
def test_the_last_map_of_each_resolution_is_looked_at(
    network: torch.nn.Module, size: int, head: str, expected: list[str]
) -> None:
    assert last_maps(network.eval(), (3, size, size), head) == expected
