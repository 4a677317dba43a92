"""`export --any-size`: the file takes images of any height and width, and resizes them as Pillow does."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper
from PIL import Image, ImageOps
from sklearn.datasets import load_sample_image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as torchvision

from convline.errors import ConvlineError, ModelError
from convline.images import Fit, ImageSpec, Resample, fit_pixels
from pipeline import export
from pipeline.exporting import resize_graph
from pipeline.exporting.any_size_proof import SIZES
from pipeline.exporting.resize_graph import add_resize, check_supported, resizing_part
from pipeline.run import Run
from serving.inspect import inspect
from serving.model import open_model, probe_images
from tests.conftest import run_command
from tests.serving.helpers import csv_rows, resealed, set_metadata

RESAMPLES: tuple[Resample, ...] = ("bilinear", "bicubic", "lanczos", "box")


@pytest.fixture(scope="module")
def any_size(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits model, exported with --any-size. Do not change it."""
    path = tmp_path_factory.mktemp("any-size") / "any-size.onnx"
    run_command(project, "pipeline", "export", "digits", "--any-size", "--output", path, "--tracking", "none")
    return path


def resizer(spec: ImageSpec) -> onnxruntime.InferenceSession:
    """The resizing alone."""
    shape = ["batch", spec.height, spec.width, spec.channels]
    image, copy = (helper.make_tensor_value_info(name, TensorProto.UINT8, shape) for name in ("image", "copy"))
    graph = helper.make_graph([helper.make_node("Identity", ["image"], ["copy"])], "copy", [image], [copy])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    data = resizing_part(add_resize(model, spec)).SerializeToString()
    return onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])


def resized(session: onnxruntime.InferenceSession, *images: Image.Image) -> NDArray[np.uint8]:
    pixels = np.stack([np.asarray(image).reshape(image.height, image.width, -1) for image in images])
    return session.run(None, {"image": pixels})[0]


def photograph(height: int, width: int) -> Image.Image:
    return Image.fromarray(load_sample_image("flower.jpg")).resize((width, height), Image.Resampling.BICUBIC)


def by_pillow(image: Image.Image, spec: ImageSpec) -> Image.Image:
    """Without code of ours: `crop` by torchvision, which resizes by Pillow."""
    size, method = (spec.width or 0, spec.height or 0), Image.Resampling[spec.resample.upper()]
    if spec.fit == "stretch":
        return image.resize(size, method)
    if spec.fit == "pad":
        return ImageOps.pad(image, size, method)
    image = torchvision.resize(image, [size[0]], InterpolationMode(spec.resample))
    return torchvision.center_crop(image, [size[0]])


@pytest.mark.parametrize("fit", ["crop", "stretch", "pad"])
@pytest.mark.parametrize("resample", RESAMPLES)
def test_the_graph_resizes_as_pillow_does(fit: Fit, resample: Resample) -> None:
    spec = ImageSpec(56, 56, 3, fit, resample)
    session = resizer(spec)
    for height, width in SIZES[:-1]:
        if fit == "pad" and max(height, width) == 300:
            continue  # ImageOps.pad fails: nothing is left of the shorter side
        image = photograph(height, width)
        np.testing.assert_array_equal(resized(session, image)[0], np.asarray(by_pillow(image, spec)), f"{image.size}")


@pytest.mark.parametrize(
    "spec",
    [
        ImageSpec(20, 33, 1),
        ImageSpec(20, 33, 1, "pad", "bicubic"),
        ImageSpec(20, 33, 1, "crop", "lanczos", version=1),
        ImageSpec(20, 33, 1, "crop", resize=20),  # narrow images get black borders
    ],
    ids=["crop", "pad", "version 1", "borders"],
)
def test_sizes_and_offsets_are_those_of_serving(spec: ImageSpec) -> None:
    """Of noise of 80 sizes, where a pixel that is off by one would change everything."""
    session = resizer(spec)
    rng = np.random.default_rng(1)
    for height, width in rng.integers(1, 90, (80, 2)).tolist():
        image = Image.fromarray(rng.integers(0, 256, (height, width), np.uint8))
        np.testing.assert_array_equal(resized(session, image)[0], fit_pixels(image, spec), f"{height}x{width}")


def test_the_images_of_a_batch_are_resized_like_single_ones() -> None:
    session = resizer(ImageSpec(24, 24, 3))
    images = [photograph(100, 70), Image.effect_noise((70, 100), 90).convert("RGB")]
    both = resized(session, *images)
    assert both.shape == (2, 24, 24, 3)
    for image, pixels in zip(images, both, strict=True):
        np.testing.assert_array_equal(resized(session, image)[0], pixels)


def test_images_of_the_stored_size_are_not_changed() -> None:
    image = Image.effect_noise((31, 24), 90)
    np.testing.assert_array_equal(resized(resizer(ImageSpec(24, 31, 1)), image)[0, ..., 0], np.asarray(image))


def test_a_crop_after_another_resize_is_refused() -> None:
    with pytest.raises(
        ConvlineError, match="does not support a resize of the shorter side to 256 before a crop to 224"
    ):
        check_supported(ImageSpec(224, 224, 3, resize=256))


def test_the_file_says_that_it_takes_any_size(any_size: Path, model: Path) -> None:
    dimensions = onnx.load(any_size).graph.input[0].type.tensor_type.shape.dim
    assert [d.dim_param or d.dim_value for d in dimensions] == ["batch", "height", "width", 1]
    opened, default = open_model(any_size), open_model(model)
    assert opened.any_size and opened.metadata["any_size"] is True and opened.spec == default.spec
    assert not default.any_size and "any_size" not in default.metadata
    told, expected = inspect(any_size), inspect(model)
    assert (told["any_size"], expected["any_size"]) == (True, False)
    assert told["memory_bytes"] == expected["memory_bytes"]
    assert all(told["graph"][key] == expected["graph"][key] for key in ("parameters", "multiply_adds"))


def test_the_proof_holds_the_sizes_from_one_pixel_to_12_megapixels(any_size: Path) -> None:
    proof = json.loads(any_size.with_suffix(".parity.json").read_text())["any_size"]
    assert [(size["height"], size["width"]) for size in proof["sizes"]] == [*SIZES, (8, 8)]
    assert all(size["pixels"] <= 1 and size["probability"] <= 2e-3 for size in proof["sizes"])
    assert any(size["height"] * size["width"] == 12_000_000 for size in proof["sizes"])
    assert open_model(any_size).metadata["parity"]["any_size"] == proof


def test_answers_equal_those_of_the_default_file(any_size: Path, model: Path, project: Path, samples: Path) -> None:
    images = probe_images(open_model(model).spec)
    for answer, expected in zip(open_model(any_size).run(images), open_model(model).run(images), strict=True):
        np.testing.assert_array_equal(answer, expected)
    tables = []
    for path in (any_size, model):
        output = any_size.with_name(f"{path.stem}.csv")
        run_command(project, "serving", "classify", samples, "--model", path, "--output", output)
        tables.append(csv_rows(output))
    assert tables[0] == tables[1] and len(tables[0]) == 100


def test_parity_proves_the_file_again(any_size: Path, project: Path) -> None:
    result = run_command(project, "pipeline", "parity", any_size)
    assert "9 sizes: pixels differ by at most 0 of 255, |Δprobability| 0.0e+00" in result.stdout


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_resizing_keeps_its_precision_in_smaller_files(project: Path, tmp_path: Path, precision: str) -> None:
    path = tmp_path / "small.onnx"
    options = ("--any-size", "--precision", precision, "--output", path, "--tracking", "none")
    assert "pixels differ by at most 0 of 255" in run_command(project, "pipeline", "export", *options).stdout


def test_a_file_that_crops_elsewhere_is_not_published(own_project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run.open(own_project / "runs/digits")
    before = run.model.read_bytes()
    right = resize_graph._offset
    monkeypatch.setattr(resize_graph, "_offset", lambda *arguments: right(*arguments) + 1)
    with pytest.raises(ConvlineError, match=r"parity FAILED.*pixels of images of 1x300 differ by \d+ of 255"):
        export.export(run, run.dataset(own_project / "data"), options=export.ExportOptions(any_size=True))
    assert run.model.read_bytes() == before


def test_a_graph_that_takes_other_sizes_than_its_metadata_say_is_refused(
    any_size: Path, model: Path, tmp_path: Path
) -> None:
    def state(proto: onnx.ModelProto) -> None:
        helper.set_model_props(proto, {entry.key: entry.value for entry in proto.metadata_props} | stated)

    stated = {"convline.any_size": "true"}
    for path, edit in ((any_size, set_metadata("any_size", None)), (model, state)):
        with pytest.raises(ModelError, match="has the inputs"):
            open_model(resealed(path, tmp_path / "other.onnx", edit))
