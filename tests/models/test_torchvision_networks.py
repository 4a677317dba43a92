"""Networks of torchvision by name. The test of the README's recipe trains and exports one."""

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision
from torchvision.models import resnet18
from torchvision.transforms._presets import ImageClassification

import models
from convline.errors import ConvlineError
from models.option_reader import torchvision_weights
from models.served_network import ServedNetwork
from pipeline.network import build_network, check_trains
from pipeline.pretrained.load import load_pretrained
from pipeline.pretrained.resolve import resolve_weights
from pipeline.recipe import Recipe, load
from tests.conftest import Cli, run_command, run_process
from tests.pipeline.helpers import dataset_meta

SIDES = {"inception_v3": 96, "maxvit_t": 224, "vit_b_32": 64}
# one of each family
FAMILIES = [
    "alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "googlenet", "inception_v3", "maxvit_t", "mnasnet0_5",
    "mobilenet_v2", "mobilenet_v3_small", "regnet_y_400mf", "resnext50_32x4d", "shufflenet_v2_x0_5", "squeezenet1_0",
    "swin_t", "swin_v2_t", "vgg11", "vit_b_32",
]  # fmt: skip


@pytest.fixture(scope="module")
def photographs(samples: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data/rgb32, RGB images of 32x32."""
    folder = tmp_path_factory.mktemp("photographs")
    run_command(folder, "pipeline", "preprocess", "rgb32", "--source", samples, "--channels", "3", "--image-size", "32")
    return folder


def test_a_classifier_of_torchvision_has_its_own_layer_names_and_our_classes() -> None:
    network = models.build("torchvision/resnet18", (3, 32, 32), 7)
    assert network(torch.zeros(2, 3, 32, 32)).shape == (2, 7)
    assert network.state_dict().keys() == resnet18().state_dict().keys()


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_of_torchvision_trains_and_exports(samples: Path, tmp_path: Path, name: str) -> None:
    side = SIDES.get(name, 64)
    run_process(tmp_path, "pipeline", "preprocess", "rgb", "--source", samples, "--channels", "3", "--image-size", side)
    settings = [f"model.name=torchvision/{name}", "train.batch_size=8", "train.evaluate_every=0"]
    overrides = [word for setting in settings for word in ("--set", setting)]
    common = ("--run", "one", "--steps", 2, "--tracking", "none")
    run_process(tmp_path, "pipeline", "train", "digits", "--dataset", "rgb", *common, *overrides)
    assert "parity passed" in run_process(tmp_path, "pipeline", "export", "one").stdout


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("resnet18", (1, 32, 32), "--channels 3"),
        ("vit_b_16", (3, 32, 48), "square"),
        ("vit_b_16", (3, 33, 33), "divisible"),
    ],
)
def test_images_that_a_network_cannot_take_are_refused(name: str, shape: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        models.build(f"torchvision/{name}", shape, 10)


def test_a_size_that_only_a_forward_pass_refuses_is_refused_before_anything_is_written(photographs: Path) -> None:
    options = ("--dataset", "rgb32", "--run", "small", "--set", "model.name=torchvision/alexnet", "--tracking", "none")
    error = run_command(photographs, "pipeline", "train", "digits", *options, status=1).stderr
    assert "torchvision/alexnet does not accept the dataset rgb32, whose images are 32x32x3" in error
    assert not (photographs / "runs/small").exists()


def test_checking_that_a_network_trains_leaves_it_as_it_was_initialised() -> None:
    recipe = load("digits", ["model.name=torchvision/resnet18", "train.batch_size=4"])
    image = {"height": 32, "width": 32, "channels": 3}
    meta = {"name": "rgb32", "image": image, "classes": ["a", "b"], "mean": [99.0] * 3, "std": [9.0] * 3}
    network = build_network(recipe, meta)
    initial = {name: value.clone() for name, value in network.state_dict().items()}
    check_trains(network, recipe, meta, 4)
    assert network.training
    assert all(torch.equal(initial[name], value) for name, value in network.state_dict().items())


def test_batches_too_small_to_be_normalised_are_refused_before_anything_is_written(photographs: Path) -> None:
    settings = ["model.name=torchvision/resnet18", "train.batch_size=1"]
    overrides = [word for setting in settings for word in ("--set", setting)]
    options = ("--dataset", "rgb32", "--run", "tiny", "--tracking", "none", *overrides)
    error = run_command(photographs, "pipeline", "train", "digits", *options, status=1).stderr
    assert "torchvision/resnet18 does not train on batches of 1" in error
    assert not (photographs / "runs/tiny").exists()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("model.weights=IMAGENET", "has no weights 'IMAGENET'; use one of none, default, IMAGENET1K_V1"),
        ("model.name=torchvision/resnet19", "there is no network 'torchvision/resnet19'; use one of cifar10,"),
        ("model.name=torchvision/fcn_resnet50", "there is no network"),
        ("model.depth=3", "model accepts name, weights"),
    ],
)
def test_a_name_or_option_that_torchvision_lacks_is_refused(setting: str, message: str) -> None:
    with pytest.raises(ConvlineError, match=message):
        load("digits", ["model.name=torchvision/resnet18", setting])


def start(folder: Path, name: str, weights: str, side: int = 32, classes: int = 10) -> tuple[Recipe, ServedNetwork]:
    """The network with these weights of torchvision, and its recipe with the pixels that they were trained with."""
    settings = [f"model.name=torchvision/{name}", f"model.weights={weights}", "preprocess.standardize=weights"]
    meta = dataset_meta((side, side, 3), [f"class {number}" for number in range(classes)])
    recipe, found = resolve_weights(load("digits", settings), meta, folder / "runs/new", starts_new=True)
    assert found is not None
    served = build_network(recipe, meta)
    load_pretrained(served, recipe.model, 3, meta["classes"], found)
    return recipe, served.eval()


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """Weights of resnet18 in the cache of torch, so that the test works offline."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub/checkpoints").mkdir(parents=True)
    weights = resnet18().state_dict()
    torch.save(weights, tmp_path / "hub/checkpoints/resnet18-f37072fd.pth")
    return weights


@pytest.mark.parametrize("weights", ["default", "IMAGENET1K_V1"])
def test_pretrained_weights_fill_all_but_the_last_layer(
    cached: dict[str, torch.Tensor], tmp_path: Path, weights: str
) -> None:
    _, served = start(tmp_path, "resnet18", weights)
    loaded = served.network.state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in cached.items() if not key.startswith("fc."))
    assert loaded["fc.weight"].shape == (10, 512) and not loaded["fc.bias"].any()


@pytest.mark.usefixtures("cached")
def test_pixels_are_standardised_as_torchvision_says(tmp_path: Path) -> None:
    _, served = start(tmp_path, "resnet18", "default", 224)
    image = torch.randint(256, (1, 224, 224, 3), dtype=torch.uint8)
    preset = ImageClassification(crop_size=224, resize_size=224)
    expected = preset(image.permute(0, 3, 1, 2))
    torch.testing.assert_close(served.preprocessing(image), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("name", "file", "side"),
    [("googlenet", "googlenet-1378be20.pth", 64), ("inception_v3", "inception_v3_google-0cc3c7bd.pth", 96)],
)
def test_networks_that_torchvision_gives_other_pixels_compute_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, file: str, side: int
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub/checkpoints").mkdir(parents=True)
    theirs = torchvision.models.get_model(name, transform_input=True, aux_logits=False, init_weights=True)
    for layer in theirs.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.momentum = 1.0
    theirs(torch.randn(8, 3, side, side))  # so that the images matter: with fresh statistics the signal vanishes
    theirs.eval()
    torch.save(theirs.state_dict(), tmp_path / "hub/checkpoints" / file)
    _, served = start(tmp_path, name, "default", side)
    theirs.fc = served.network.fc
    image = torch.randint(256, (2, side, side, 3), dtype=torch.uint8)
    preset = ImageClassification(crop_size=side, resize_size=side)
    with torch.inference_mode():
        found, expected = served(image)[1], theirs(preset(image.permute(0, 3, 1, 2)))
    torch.testing.assert_close(found / expected.abs().max(), expected / expected.abs().max(), atol=1e-4, rtol=0)


def test_older_files_of_densenet_have_other_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub/checkpoints").mkdir(parents=True)
    tensors = torchvision.models.densenet121().state_dict()
    renamed = {re.sub(r"(denselayer\d+\.(?:norm|conv))([12])", r"\1.\2", key): x for key, x in tensors.items()}
    renamed = {key: value for key, value in renamed.items() if not key.endswith("num_batches_tracked")}
    assert "features.denseblock1.denselayer1.norm.1.weight" in renamed
    torch.save(renamed, tmp_path / "hub/checkpoints/densenet121-a639ec97.pth")
    _, served = start(tmp_path, "densenet121", "default", 64)
    loaded = served.network.state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in tensors.items() if not key.startswith("classifier"))


def test_weights_that_cannot_be_downloaded_stop_the_training_in_one_sentence(
    photographs: Path, cli_process: Cli, tmp_path: Path
) -> None:
    settings = ["model.name=torchvision/resnet18", "model.weights=default", "preprocess.standardize=weights"]
    overrides = [word for setting in settings for word in ("--set", setting)]
    error = cli_process(
        "pipeline", "train", "digits", "--dataset", "rgb32", "--data-dir", photographs / "data", *overrides,
        "--tracking", "none", status=1, TORCH_HOME=str(tmp_path), https_proxy="http://127.0.0.1:9",
    ).stderr  # fmt: skip
    assert "cannot load the weights default of torchvision/resnet18" in error and "model.weights=none" in error
    path = tmp_path / "hub/checkpoints/resnet18-f37072fd.pth"
    assert f"{path} is missing, and https://download.pytorch.org/models/resnet18-f37072fd.pth cannot be down" in error
    assert "preprocess.standardize={mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225]}" in error
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("content", [b"", b"noise" * 999], ids=["empty", "noise"])
@pytest.mark.usefixtures("cached")
def test_a_damaged_weights_file_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "hub/checkpoints/resnet18-f37072fd.pth"
    path.write_bytes(content)
    with pytest.raises(ConvlineError, match=f"{path} is damaged .*delete it"):
        start(tmp_path, "resnet18", "default")


@pytest.mark.usefixtures("cached")
def test_weights_that_differ_beyond_the_last_layer_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "hub/checkpoints/resnet18-f37072fd.pth"
    torch.save(torch.load(path) | {"conv1.weight": torch.zeros(8, 3, 7, 7)}, path)
    with pytest.raises(ConvlineError, match=r"conv1\.weight has the shape \[8, .* trained on images of 224x224"):
        start(tmp_path, "resnet18", "default")


def test_torchvision_is_imported_only_for_its_own_networks() -> None:
    code = "import sys, models; models.build('mlp', (1, 4, 4), 2); sys.exit('torchvision' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_networks_of_torchvision_and_their_weights_are_known_without_importing_it() -> None:
    names = torchvision.models.list_models(torchvision.models)
    expected = {name: [weight.name for weight in torchvision.models.get_model_weights(name)] for name in names}
    assert len(expected) > 50
    assert {name: torchvision_weights(name) for name in expected} == expected
    with pytest.raises(KeyError):
        torchvision_weights("fasterrcnn_resnet50_fpn")  # not a classifier


@pytest.mark.parametrize("name", [*models.NETWORKS, "torchvision/resnet18"])
def test_the_options_of_a_network_are_those_of_its_signature(name: str) -> None:
    parameters = inspect.signature(models.builder(name), eval_str=True).parameters
    options = {key: value for key, value in parameters.items() if value.kind is value.KEYWORD_ONLY}
    assert models.options(name) == options
