"""The network of cifar10-fast and its whitened first layer."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import models
from models.cifar10_fast import Cifar10Fast
from models.whitening import WhiteningConv2d
from pipeline.dataset import Dataset
from pipeline.export import export
from pipeline.network import load_network
from pipeline.recipe import load
from pipeline.train import train
from tests.pipeline.small_datasets import pictures, write_dataset
from tests.trainings import final_state

SETTINGS = ("model.width=4", "train.batch_size=20", "train.epochs=0.1", "train.steps=3", "train.precision=float32")


def natural(count: int, size: int = 12) -> torch.Tensor:
    """Images whose neighbouring values and channels are alike, float32 [count, 3, size, size]."""
    noise = torch.from_numpy(np.random.default_rng(3).normal(size=(count, 3, size + 4, size + 4)))
    smooth = F.avg_pool2d(noise, 5, stride=1)
    return (smooth + smooth.mean(1, keepdim=True) + 0.3).float()


def test_whitened_patches_are_uncorrelated_with_a_second_moment_of_1() -> None:
    layer = WhiteningConv2d(3, 2)
    images = natural(500)
    layer.fit(images)
    assert layer.bias is not None
    with torch.no_grad():
        outputs = (layer(images) - layer.bias[:, None, None]).transpose(0, 1).flatten(1).double()
    half = len(outputs) // 2
    assert half == 12
    torch.testing.assert_close(outputs[:half], -outputs[half:], atol=1e-5, rtol=0)
    patches = images.unfold(2, 2, 1).unfold(3, 2, 1).permute(0, 2, 3, 1, 4, 5).reshape(-1, 12).double()
    variances = np.linalg.svd(patches.numpy() / len(patches) ** 0.5, compute_uv=False) ** 2  # largest first
    expected = np.sort(variances / (variances + 5e-4))
    moments = (outputs[:half] @ outputs[:half].T / outputs.shape[1]).numpy()
    np.testing.assert_allclose(moments, np.diag(np.diag(moments)), atol=1e-4)
    np.testing.assert_allclose(np.sort(np.diag(moments)), expected, atol=1e-4)


def test_the_whitening_is_not_trained_but_its_bias_is() -> None:
    network = models.build("cifar10_fast", (3, 32, 32), 10, width=8)
    assert "whiten.weight" in network.state_dict()
    assert [name for name, _ in network.named_parameters() if name.startswith("whiten")] == ["whiten.bias"]


def test_a_group_of_convolutions_begins_by_passing_its_input_on() -> None:
    network = models.build("cifar10_fast", (3, 32, 32), 10, width=64)
    assert isinstance(network, Cifar10Fast)
    image = torch.rand(2, 24, 6, 6)
    first = network.groups[0].get_submodule("conv1")
    torch.testing.assert_close(first(image)[:, :24], image)


def test_inference_is_the_mean_over_the_image_and_its_mirror_image() -> None:
    network = models.build("cifar10_fast", (3, 32, 32), 10, width=8).eval()
    single = models.build("cifar10_fast", (3, 32, 32), 10, width=8, mirror=False).eval()
    single.load_state_dict(network.state_dict())
    images = torch.rand(4, 3, 32, 32)
    with torch.no_grad():
        one, other = single(images), single(images.flip(3))
        assert (one - other).abs().max() > 1e-4
        torch.testing.assert_close(network(images), (one + other) / 2)
        torch.testing.assert_close(network(images), network(images.flip(3)))
        network.train(), single.train()
        assert torch.equal(network(images), single(images))


@pytest.mark.parametrize("size", [(8, 32), (32, 8)])
def test_images_that_cannot_be_halved_three_times_are_refused(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=f"images of {size[0]}x{size[1]} are too small; the network needs 9 a side"):
        models.build("cifar10_fast", (3, *size), 10)
    with torch.no_grad():
        assert models.build("cifar10_fast", (3, 9, 9), 10, width=4).eval()(torch.rand(1, 3, 9, 9)).shape == (1, 10)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fast") / "data"
    write_dataset(folder, "small", {"train": pictures([30, 30], 16), "test": pictures([5, 5], 16, seed=1)})
    return folder


def test_a_training_whitens_the_images_as_the_network_sees_them(data: Path, tmp_path: Path) -> None:
    dataset = Dataset.open(data, "small")
    run = train(load("cifar10-fast", [*SETTINGS, "data.dataset=small"]), tmp_path / "run", data, tracking=False)
    served, _ = load_network(run)
    expected = WhiteningConv2d(3, 2)
    split = dataset.split("train", 0, 0)
    expected.fit(served.preprocessing(torch.from_numpy(split.images[split.rows])))
    state = final_state(run.folder)
    for weights in ("raw", "averaged"):
        assert torch.equal(state[weights]["whiten.weight"], expected.weight)
    assert export(run, dataset).proofs[0].passed


@pytest.mark.parametrize("computes_in_bfloat16", [False, True])
def test_a_run_keeps_the_precision_that_it_was_started_with(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, computes_in_bfloat16: bool
) -> None:
    """ "auto" asks the processor; when the run goes on elsewhere, it goes on in the same precision."""
    recipe = load("cifar10-fast", [*SETTINGS[:-1], "train.checkpoint_every=1", "data.dataset=small"])
    monkeypatch.setattr("pipeline.device.computes_in_bfloat16", lambda _: computes_in_bfloat16)
    run = train(recipe, tmp_path / "run", data, tracking=False)
    expected = "bfloat16" if computes_in_bfloat16 else "float32"
    assert run.recipe.train.precision == expected
    assert f'precision = "{expected}"' in (run.folder / "recipe.toml").read_text()
    whole = final_state(run.folder)["raw"]
    (run.folder / "checkpoints/step-3.pt").unlink()
    monkeypatch.setattr("pipeline.device.computes_in_bfloat16", lambda _: not computes_in_bfloat16)
    assert train(recipe, tmp_path / "other", data, tracking=False).recipe.train.precision != expected
    resumed = train(recipe, run.folder, data, tracking=False, resume=True)
    assert resumed.recipe.train.precision == expected
    assert all(torch.equal(value, whole[name]) for name, value in final_state(run.folder)["raw"].items())
