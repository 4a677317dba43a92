"""ONNX classifiers made elsewhere, against the same computed with NumPy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from serving import Classifier
from serving.errors import ConvlineError, ModelError
from serving.foreign import Foreign, Preprocessing, read_classes
from serving.model import open_model
from tests.conftest import Cli
from tests.serving.helpers import csv_rows, encode, noise, write

CLASSES = ("cat", "dog", "horse")
SIDE = 6
WEIGHT = np.random.default_rng(1).normal(size=(SIDE * SIDE * 3, 3)).astype(np.float32) / 10


def classifier(
    path: Path,
    layout: str = "nchw",
    kind: int = TensorProto.FLOAT,
    softmax: bool = False,
    batch: int | str = "n",
    sides: tuple[Any, Any] = (SIDE, SIDE),
    opset: int = 17,
    name: str = "image",
) -> Path:
    """A linear classifier of RGB images, whose input is called as convline's own is."""
    shape = [batch, 3, *sides] if layout == "nchw" else [batch, *sides, 3]
    nodes = [helper.make_node("Cast", [name], ["floats"], to=TensorProto.FLOAT)]
    nodes += [helper.make_node("Flatten", ["floats"], ["flat"])]
    nodes += [helper.make_node("MatMul", ["flat", "weight"], ["scores" if softmax else "out"])]
    if softmax:  # and what converters leave behind it
        nodes += [helper.make_node("Softmax", ["scores"], ["soft"], axis=1)]
        nodes += [helper.make_node("Cast", ["soft"], ["same"], to=TensorProto.FLOAT)]
        nodes += [helper.make_node("Identity", ["same"], ["out"])]
    graph = helper.make_graph(
        nodes,
        "linear",
        [helper.make_tensor_value_info(name, kind, shape)],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(WEIGHT, "weight")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8), path)
    return path


def scores(pixels: NDArray[np.float64], layout: str = "nchw") -> NDArray[np.float64]:
    x = pixels.transpose(0, 3, 1, 2) if layout == "nchw" else pixels
    return x.reshape(len(x), -1) @ WEIGHT.astype(np.float64)


def softmax(logit: NDArray[np.float64]) -> NDArray[np.float64]:
    e = np.exp(logit - logit.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def opened(path: Path, *settings: str, classes: tuple[str, ...] = CLASSES) -> Classifier:
    return Classifier(path, foreign=Foreign(classes, Preprocessing.parse(settings)))


MEAN, STD = np.array([0.4, 0.5, 0.6]), np.array([0.2, 0.3, 0.25])


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("color", ["rgb", "bgr"])
@pytest.mark.parametrize("scale", [1, 255])
def test_pixels_reach_it_as_it_takes_them(tmp_path: Path, layout: str, color: str, scale: int) -> None:
    path, images = classifier(tmp_path / "m.onnx", layout), noise(5, SIDE, SIDE, 3)
    mean, std = MEAN * scale, STD * scale
    settings = [
        f"range={scale}",
        f"color={color}",
        f"mean={','.join(map(str, mean))}",
        f"std={','.join(map(str, std))}",
    ]
    pixels = images[..., ::-1] if color == "bgr" else images
    expected = softmax(scores((pixels / (255 / scale) - mean) / std, layout))
    with opened(path, *settings) as served:
        np.testing.assert_allclose(served.classify_arrays(images), expected, atol=1e-5)


def test_one_mean_for_all_channels(tmp_path: Path) -> None:
    images = noise(2, SIDE, SIDE, 3)
    with opened(classifier(tmp_path / "m.onnx"), "mean=0.5", "std=0.5") as served:
        np.testing.assert_allclose(
            served.classify_arrays(images), softmax(scores((images / 255 - 0.5) / 0.5)), atol=1e-5
        )


@pytest.mark.parametrize("says", [None, "probabilities"])
def test_probabilities_are_not_softened_twice(tmp_path: Path, says: str | None) -> None:
    images = noise(3, SIDE, SIDE, 3)
    settings = ["range=1"] + ([f"scores={says}"] if says else [])
    model = opened(classifier(tmp_path / "m.onnx", softmax=True), *settings).model
    probability, logit = model.run(images)
    np.testing.assert_allclose(probability, softmax(scores(images / 255)), atol=1e-5)
    np.testing.assert_allclose(softmax(logit.astype(np.float64)), probability, atol=1e-5)


def test_scores_that_may_be_either_are_asked_about(tmp_path: Path) -> None:
    path = classifier(tmp_path / "m.onnx")
    model = onnx.load(path)
    model.graph.node[-1].output[:] = ["raw"]
    model.graph.node.append(helper.make_node("Sigmoid", ["raw"], ["out"]))
    onnx.save(model, path)
    with pytest.raises(ModelError, match="scores=probabilities or scores=logits"):
        opened(path, "range=1")
    assert opened(path, "scores=logits").classes == CLASSES


@pytest.mark.parametrize("kind", [TensorProto.FLOAT16, TensorProto.UINT8])
def test_other_types_of_input(tmp_path: Path, kind: int) -> None:
    path, images = classifier(tmp_path / "m.onnx", kind=kind), noise(3, SIDE, SIDE, 3)
    divisor = 1 if kind == TensorProto.UINT8 else 255
    model = opened(path, "range=1").model
    expected = scores(images.astype(np.float64) / divisor)
    np.testing.assert_allclose(model.run(images)[1], expected, atol=2e-2 if kind == TensorProto.FLOAT16 else 1e-3)


def test_a_fixed_batch_is_filled_up(tmp_path: Path) -> None:
    images = noise(10, SIDE, SIDE, 3)
    with opened(classifier(tmp_path / "m.onnx", batch=4), "range=1") as served:
        assert served.batch_size == 4
        np.testing.assert_allclose(served.classify_arrays(images), softmax(scores(images / 255)), atol=1e-5)


def test_a_size_that_the_graph_leaves_open_is_asked_for(tmp_path: Path) -> None:
    path = classifier(tmp_path / "m.onnx", sides=("h", "w"))
    with pytest.raises(ModelError, match="size=HxW"):
        opened(path, "range=1")
    assert opened(path, f"size={SIDE}").spec.height == SIDE


@pytest.mark.parametrize(
    ("options", "settings", "message"),
    [
        ({}, ("size=7",), "takes images of 6x6, not of 7x7"),
        ({}, ("layout=nhwc",), "set layout="),
        ({}, ("mean=1,2",), r"takes 3 channels; mean has \(1.0, 2.0\)"),
        ({}, ("std=0",), "std has"),
        ({"kind": TensorProto.UINT8}, ("mean=1",), "leave out mean and std"),
        ({"kind": TensorProto.INT64}, ("range=1",), "takes INT64"),
        ({"opset": 6}, ("range=1",), "opset 6"),
    ],
)
def test_what_does_not_fit_is_explained(
    tmp_path: Path, options: dict[str, Any], settings: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        opened(classifier(tmp_path / "m.onnx", **options), *settings)


@pytest.mark.parametrize("count", [2, 4])
def test_a_wrong_number_of_classes_is_refused(tmp_path: Path, count: int) -> None:
    with pytest.raises(ModelError, match=rf"gives 3 scores an image, {count} classes were named"):
        opened(classifier(tmp_path / "m.onnx"), "range=1", classes=tuple("abcd"[:count]))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("men=1", "there is no 'men'; there are size, layout, range, mean"),
        ("layout=chw", "layout accepts nchw, nhwc"),
        ("range=2", "range accepts 1, 255"),
        ("mean=a", "mean accepts numbers"),
        ("size=0", "size accepts 32 or 32x48"),
        ("size", "size accepts"),
    ],
)
def test_a_setting_that_is_unknown_or_ill_typed_is_refused(setting: str, message: str) -> None:
    with pytest.raises(ConvlineError, match=message):
        Preprocessing.parse([setting])


def test_classes_are_lines_or_a_json_list(tmp_path: Path) -> None:
    lines, listed = write(tmp_path / "a.txt", b"cat\ndog\n"), write(tmp_path / "a.json", b'["cat", "dog"]')
    assert read_classes(lines) == read_classes(listed) == ("cat", "dog")
    assert read_classes(write(tmp_path / "windows.txt", b"\xef\xbb\xbf[unk]\r\ndog\r\n")) == ("[unk]", "dog")
    for content in (b"", b"[1, 2]", b"[]", b"cat\n\ndog\n", b"cat\ncat\n", b"\xff\xfe"):
        with pytest.raises(ConvlineError, match=r"does not hold class names|twice"):
            read_classes(write(tmp_path / "b.txt", content))
    with pytest.raises(ConvlineError, match="does not hold class names"):
        read_classes(tmp_path / "missing.txt")


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    for number in range(7):
        write(tmp_path / f"photographs/{number}.png", encode(noise(SIDE, SIDE, 3), "PNG"))
    return tmp_path / "photographs"


def test_a_folder_is_classified_with_a_foreign_model(cli: Cli, tmp_path: Path, photographs: Path) -> None:
    write(tmp_path / "classes.txt", "\n".join(CLASSES).encode())
    options = ("--model", classifier(tmp_path / "m.onnx"), "--classes", "classes.txt", "--output", "out.csv")
    cli("serving", "classify", photographs, *options, "--preprocess", "range=1")
    with opened(tmp_path / "m.onnx", "range=1") as served:
        expected = served.classify_files([photographs / f"{number}.png" for number in range(7)])
    assert [row["label"] for row in csv_rows(tmp_path / "out.csv")] == [entry.labels[0] for entry in expected]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "options", [("--classes", "classes.txt"), ("--preprocess", "range=1")], ids=["no-preprocessing", "no-classes"]
)
def test_both_options_are_needed(cli: Cli, tmp_path: Path, photographs: Path, options: tuple[str, ...]) -> None:
    write(tmp_path / "classes.txt", b"cat")
    result = cli("serving", "classify", photographs, "--model", "m.onnx", *options, status=2)
    assert "needs both" in result.stderr


def test_a_file_of_convline_needs_no_classes(model: Path) -> None:
    with pytest.raises(ModelError, match="leave out --classes"):
        open_model(model, foreign=Foreign(CLASSES, Preprocessing()))


def test_a_foreign_file_without_options_says_what_it_needs(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="--classes FILE and how it takes pixels by --preprocess"):
        open_model(classifier(tmp_path / "m.onnx"))


def external(path: Path, location: str) -> Path:
    """The classifier with its weights in another file, which the graph says is at `location`."""
    model = onnx.load(classifier(path))
    tensor = model.graph.initializer[0]
    (path.parent / "weights.bin").write_bytes(tensor.raw_data)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", location
    path.write_bytes(model.SerializeToString())
    return path


def test_weights_beside_a_foreign_file_are_taken(tmp_path: Path) -> None:
    images = noise(2, SIDE, SIDE, 3)
    with opened(external(tmp_path / "m.onnx", "weights.bin"), "range=1") as served:
        np.testing.assert_allclose(served.classify_arrays(images), softmax(scores(images / 255)), atol=1e-5)


@pytest.mark.parametrize("key", ["length", "offset"])
def test_weights_that_cannot_be_read_are_refused(tmp_path: Path, key: str) -> None:
    path = external(tmp_path / "m.onnx", "weights.bin")
    model = onnx.load(path, load_external_data=False)
    model.graph.initializer[0].external_data.add(key=key, value="many")
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ModelError, match=r"weights\.bin', which cannot be read"):
        opened(path, "range=1")


@pytest.mark.parametrize("location", ["../weights.bin", "/etc/hostname", "missing.bin", "link.bin", "", ".", "a\0b"])
def test_weights_outside_the_folder_are_refused(tmp_path: Path, location: str) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    write(tmp_path / "weights.bin", WEIGHT.tobytes())
    (folder / "link.bin").symlink_to(tmp_path / "weights.bin")
    with pytest.raises(ModelError, match=r"which is no file in .*; it is refused|cannot be read"):
        opened(external(folder / "m.onnx", location), "range=1")


def test_spec_travels(tmp_path: Path) -> None:
    spec = opened(classifier(tmp_path / "m.onnx"), "fit=stretch", "resample=bicubic").spec
    assert (spec.fit, spec.resample) == ("stretch", "bicubic")
    assert json.dumps(spec.to_dict())
