"""Networks of timm by name."""

from pathlib import Path

import pytest
import timm
import torch

import models
from convline.errors import ConvlineError
from models.option_reader import timm_names
from pipeline.recipe import load
from tests.conftest import run_process

# one of each kind, and the size of its images: timm's own small networks for tests first
SMALL = {"test_efficientnet": 32, "test_vit": 32}
FAMILIES = {
    "convnext_atto": 32, "edgenext_xx_small": 64, "efficientnet_lite0": 64, "levit_128s": 224,
    "mobilenetv4_conv_small": 64, "regnety_002": 32, "resnet18": 32, "swin_tiny_patch4_window7_224": 64,
    "tf_efficientnet_lite0": 64, "vit_tiny_patch16_224": 64,
}  # fmt: skip


def test_the_names_are_those_that_timm_lists() -> None:
    assert timm_names() == set(timm.list_models())


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("channels", [1, 3])
def test_a_network_of_timm_has_its_own_layer_names_and_our_classes(name: str, channels: int) -> None:
    network = models.build(f"timm/{name}", (channels, 64, 32), 7)
    assert network(torch.zeros(2, channels, 64, 32)).shape == (2, 7)
    assert network.state_dict().keys() == timm.create_model(name).state_dict().keys()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("model.name=timm/resnet19", "there is no network 'timm/resnet19'; use one of cifar10,"),
        ("model.depth=3", "model accepts name"),
    ],
)
def test_a_name_or_option_that_timm_lacks_is_refused(setting: str, message: str) -> None:
    with pytest.raises(ConvlineError, match=message):
        load("digits", ["model.name=timm/resnet18", setting])


def trained_and_exported(samples: Path, folder: Path, name: str, side: int) -> str:
    run_process(folder, "pipeline", "preprocess", "rgb", "--source", samples, "--channels", "3", "--image-size", side)
    settings = [f"model.name=timm/{name}", "train.batch_size=8", "train.evaluate_every=0"]
    overrides = [word for setting in settings for word in ("--set", setting)]
    common = ("--run", "one", "--steps", 2, "--tracking", "none")
    run_process(folder, "pipeline", "train", "digits", "--dataset", "rgb", *common, *overrides)
    return run_process(folder, "pipeline", "export", "one").stdout


@pytest.mark.parametrize(("name", "side"), SMALL.items())
def test_a_network_of_timm_trains_and_exports(samples: Path, tmp_path: Path, name: str, side: int) -> None:
    assert "parity passed" in trained_and_exported(samples, tmp_path, name, side)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "side"), FAMILIES.items())
def test_every_family_of_timm_trains_and_exports(samples: Path, tmp_path: Path, name: str, side: int) -> None:
    assert "parity passed" in trained_and_exported(samples, tmp_path, name, side)
