"""Images and crops that are not square, from the source to the exported model."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from models.preprocessing import Preprocessing
from pipeline.network import build_network, load_network
from pipeline.preprocess import image_size_for
from pipeline.recipe import Recipe, load, parse
from pipeline.recipe_sections import AugmentSection
from pipeline.run import Run
from pipeline.training.augmentations import Augmentations
from serving import Classifier
from tests.conftest import run_command
from tests.pages import check
from tests.pipeline.helpers import dataset_meta, refused

QUIET = ("train.evaluate_every=0", "train.batch_size=8", "data.validation=0", "preprocess.standardize=scale")
CROP = "preprocess.crop=[24, 40]"
# settings, and the part of a stored image that the network sees: top, left, height, width
RUNS = {
    "whole": (["model.name=digits_convnet"], (0, 0, 48, 64)),
    "padded": (["model.name=deep_mnist", "augment.random_crop=true", "augment.padding=3"], (0, 0, 48, 64)),
    "crop": (["model.name=cifar10", CROP], (12, 12, 24, 40)),
    "random": (["model.name=cifar10_local", CROP, "augment.random_crop=true", "augment.flip=true"], (12, 12, 24, 40)),
    "resized": (["model.name=torchvision/resnet18", CROP, "augment.resized_crop={}", "augment.cutmix=1.0"],
                (12, 12, 24, 40)),
    "as wide as the image": (["model.name=slides_convnet", "preprocess.crop=[17, 64]"], (15, 0, 17, 64)),
}  # fmt: skip


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the dataset `shapes`, whose images are 48 pixels high and 64 wide."""
    folder = tmp_path_factory.mktemp("shapes")
    rng = np.random.default_rng(1)
    for label, colour in (("blue", (40, 60, 200)), ("red", (200, 60, 40))):
        for number in range(16):
            noise = rng.normal(0, 40, (60, 90, 3)) + colour
            path = folder / f"source/{'test' if number < 6 else 'train'}/{label}/{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.clip(noise, 0, 255).astype(np.uint8)).save(path)
    run_command(folder, "pipeline", "preprocess", "shapes", "--source", "source", "--image-size", "48x64")
    assert np.load(folder / "data/shapes/test.images.npy").shape == (12, 48, 64, 3)
    return folder


def train(folder: Path, run: str, *settings: str, status: int = 0) -> str:
    """The standard error of a training of a few steps."""
    overrides = [word for setting in (*QUIET, *settings) for word in ("--set", setting)]
    command = ("pipeline", "train", "digits", "--dataset", "shapes", "--run", run, "--steps", 3, "--tracking", "none")
    return run_command(folder, *command, *overrides, status=status).stderr


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in ("whole", "crop") else pytest.mark.all) for name in RUNS]
)
def test_rectangular_images_are_trained_on_exported_reported_and_classified(shapes: Path, name: str) -> None:
    settings, (top, left, height, width) = RUNS[name]
    run_name = name.replace(" ", "-")
    train(shapes, run_name, *settings)
    run = Run.open(shapes / "runs" / run_name)
    served, _ = load_network(run)
    images = np.load(shapes / "data/shapes/test.images.npy")
    seen = images[:, top : top + height, left : left + width].astype(np.float32) / 255
    with torch.inference_mode():
        logits = served.network(torch.from_numpy(seen).permute(0, 3, 1, 2))
    expected = torch.softmax(logits, 1).numpy()

    run_command(shapes, "pipeline", "export", run_name)
    assert json.loads((run.folder / "parity.json").read_text())["precision_at_1"]["onnx"] is not None
    assert Classifier(run.model).spec.width == 64
    np.testing.assert_allclose(Classifier(run.model).classify_arrays(images), expected, atol=1e-5)
    report = json.loads(run_command(shapes, "pipeline", "evaluate", run_name, "--onnx", "--json").stdout)
    labels = np.load(shapes / "data/shapes/test.labels.npy")
    assert report["precision_at_1"] == pytest.approx((expected.argmax(1) == labels).mean())
    table = run_command(shapes, "serving", "classify", "source/test", "--model", run.model, "--json").stdout
    by_path = {row["path"]: row for row in map(json.loads, table.splitlines())}
    paths = (shapes / "data/shapes/test.files.txt").read_text().splitlines()
    for path, probability in zip(paths, expected, strict=True):
        row = by_path[path.removeprefix("test/")]
        assert row["label"] == ("blue", "red")[int(probability.argmax())]
        assert row["probability"] == pytest.approx(float(probability.max()), abs=1e-5)
    run_command(shapes, "pipeline", "report", run_name)
    page = check(run.report_page)
    assert "The network" in page.texts("h2")


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_a_rectangular_crop_is_exported_at_lower_precision(shapes: Path, precision: str) -> None:
    if not (shapes / "runs/low/run.json").exists():
        train(shapes, "low", CROP)
    output = shapes / f"{precision}.onnx"
    run_command(shapes, "pipeline", "export", "low", "--precision", precision, "--output", output)
    assert Classifier(output).classify_arrays(np.zeros((1, 48, 64, 3), np.uint8)).shape == (1, 2)


def test_a_crop_of_two_sides_is_kept_in_the_runs_recipe_and_resumed(shapes: Path) -> None:
    settings = (CROP, "schedule.name=constant")
    train(shapes, "resumed", *settings)
    recipe = shapes / "runs/resumed/recipe.toml"
    assert tomllib.loads(recipe.read_text())["preprocess"]["crop"] == [24, 40]
    overrides = [word for setting in (*QUIET, *settings) for word in ("--set", setting)]
    command = ("pipeline", "train", "digits", "--dataset", "shapes", "--run", "resumed", "--tracking", "none")
    run_command(shapes, *command, "--steps", 5, "--resume", *overrides)
    assert load_network(Run.open(shapes / "runs/resumed"))[1] == 5
    other = [*overrides, "--set", "preprocess.crop=[24, 39]"]
    assert "preprocess.crop" in run_command(shapes, *command, "--steps", 6, "--resume", *other, status=1).stderr


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (["preprocess.crop=[24, 80]"], "a crop of 24x80 does not fit images of 48x64"),
        (["preprocess.crop=[49, 24]"], "a crop of 49x24 does not fit images of 48x64"),
        (["preprocess.crop=60"], "a crop of 60x60 does not fit images of 48x64"),
        (["preprocess.crop=[48, 64]", "augment.random_crop=true"], "random_crop has no effect: a crop of 48x64"),
        (["model.name=torchvision/vit_b_16", "preprocess.crop=[32, 48]"], "it takes square images only"),
    ],
)
def test_a_crop_that_cannot_be_used_is_refused_in_one_sentence(
    shapes: Path, settings: list[str], sentence: str
) -> None:
    error = train(shapes, "refused", *settings, status=1)
    assert sentence in error and error.count("\n") == 1
    assert not (shapes / "runs/refused").exists()


def test_samples_are_shown_as_a_rectangular_crop(shapes: Path) -> None:
    text = load("cifar10").model_copy(update={"published": load("digits").published}).to_toml()
    recipe = shapes / "wide.toml"
    recipe.write_text(text.replace("crop = 24\n", "crop = [24, 40]\n"))
    run_command(shapes, "pipeline", "samples", "shapes", "--recipe", recipe)
    with Image.open(shapes / "samples/shapes.seen.png") as sheet:
        assert sheet.width > sheet.height


def with_crop(crop: Any) -> Recipe:
    fields = load("digits").to_dict()
    return parse({**fields, "data": {"dataset": "mine"}, "preprocess": {"crop": crop}}, "recipe mine")


@pytest.mark.parametrize(("crop", "size"), [(224, (256, 256)), ([24, 40], (27, 45)), ([7, 6], (8, 6))])
def test_the_images_of_a_recipe_are_a_seventh_larger_than_its_crop(crop: Any, size: tuple[int, int]) -> None:
    assert image_size_for(with_crop(crop)) == size


def test_a_crop_stays_as_it_was_written() -> None:
    assert with_crop(24).to_dict()["preprocess"]["crop"] == 24 and with_crop(24).preprocess.crop_size == (24, 24)
    assert with_crop([24, 40]).to_dict()["preprocess"]["crop"] == [24, 40]
    assert parse(tomllib.loads(with_crop([24, 40]).to_toml()), "recipe").preprocess.crop_size == (24, 40)


@pytest.mark.parametrize("crop", [0, [24], [24, 0], [24, -1], [24, 40, 3], [], True, 24.0, "24", [24.0, 40], {}])
def test_a_crop_that_is_no_size_is_refused_with_what_is_accepted(crop: Any) -> None:
    with refused("recipe mine: preprocess.crop: use a side in pixels, such as 24, or [height, width]"):
        with_crop(crop)


def test_a_random_rectangular_crop_is_at_any_position_of_the_image() -> None:
    count = 400
    images = np.zeros((count, 7, 9, 3), np.uint8)
    images[..., 0], images[..., 1] = np.arange(7)[:, None], np.arange(9)
    augment = Augmentations(AugmentSection(random_crop=True), Preprocessing((7, 9), (4, 6)), 0, count)
    crops = augment(torch.from_numpy(images), 0).numpy()
    assert crops.shape == (count, 4, 6, 3)
    positions = {(int(crop[0, 0, 0]), int(crop[0, 0, 1])) for crop in crops}
    assert positions == {(top, left) for top in range(4) for left in range(4)}
    for crop in crops:
        top, left = crop[0, 0, 0], crop[0, 0, 1]
        assert np.array_equal(crop, images[0, top : top + 4, left : left + 6])


@pytest.mark.parametrize("name", ["mlp", "simple_convnet", "softmax_regression", "timm/mobilenetv3_small_050"])
def test_other_networks_take_a_rectangular_crop(name: str) -> None:
    fields = load("digits").to_dict() | {"preprocess": {"crop": [32, 64]}, "model": {"name": name}}
    served = build_network(parse(fields, "recipe"), dataset_meta((40, 72, 3), ["a", "b", "c"])).eval()
    assert served(torch.zeros((2, 40, 72, 3), dtype=torch.uint8))[0].shape == (2, 3)
