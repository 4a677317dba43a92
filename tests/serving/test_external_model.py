"""ONNX classifiers of other tools, compared with NumPy."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from PIL import Image, ImageOps
from torchvision.transforms import v2

from convline.errors import ConvlineError, ModelError
from serving import Classifier, Prediction
from serving.classify import classify
from serving.external_model import ExternalModel, ExternalPreprocessing
from serving.job import Job, journal_header
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
    channels: int | str = 3,
) -> Path:
    """A linear classifier of RGB images; its input has the name that convline uses."""
    shape = [batch, channels, *sides] if layout == "nchw" else [batch, *sides, channels]
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
    return Classifier(path, external=ExternalModel(classes, ExternalPreprocessing.parse(settings)))


MEAN, STD = np.array([0.4, 0.5, 0.6]), np.array([0.2, 0.3, 0.25])


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("color", ["rgb", "bgr"])
@pytest.mark.parametrize("scale", [1, 255])
def test_pixels_are_preprocessed_as_the_settings_say(tmp_path: Path, layout: str, color: str, scale: int) -> None:
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


@pytest.mark.parametrize("batch", [1, 4, 16])
def test_a_fixed_batch_is_filled_up(tmp_path: Path, batch: int) -> None:
    images = noise(10, SIDE, SIDE, 3)
    with opened(classifier(tmp_path / "m.onnx", batch=batch), "range=1") as served:
        assert served.batch_size == batch
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
        ({"kind": TensorProto.INT8}, ("range=1",), "takes INT8"),
        ({"sides": (2**13, 2**13)}, ("range=1",), "the limit is 16777216 pixels"),
        ({"channels": 4}, ("range=1",), r"takes \[\?, 4, 6, 6\], which does not have 1 or 3 channels"),
        ({"channels": "c"}, ("range=1",), "where the channels cannot be told; set layout="),
        ({}, ("resize=5",), "must be at least as long as that, and needs fit=crop"),
        ({}, ("resize=7", "fit=stretch"), "needs fit=crop"),
        ({"opset": 6}, ("range=1",), "opset 6"),
    ],
)
def test_what_does_not_fit_is_explained(
    tmp_path: Path, options: dict[str, Any], settings: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        opened(classifier(tmp_path / "m.onnx", **options), *settings)


CAFFE, IMAGENET = "mean=123.675,116.28,103.53 std=58.395,57.12,57.375", "mean=0.485,0.456,0.406 std=0.229,0.224,0.225"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (CAFFE, "from 0 to 255, but range=1 has them from 0 to 1; add range=255"),
        ("mean=127.5 std=127.5", "add range=255"),
        ("std=255", "add range=255"),
        (f"range=255 {IMAGENET}", "from 0 to 1, but range=255 has them from 0 to 255; leave out range=255"),
        ("range=255 mean=0.5 std=0.5", "leave out range=255"),
        ("range=255 std=0.225", "leave out range=255"),
        ("range=255 mean=0.449", "leave out range=255"),
        ("range=255 mean=300", "pixels from 0 to 255 cannot have such a mean"),
        ("range=255 mean=-103.939,-116.779,-123.68", "give the number that is subtracted"),
        ("mean=-0.485,-0.456,-0.406 std=0.229,0.224,0.225", "give the number that is subtracted"),
    ],
)
def test_a_mean_that_no_pixel_of_the_range_has_is_refused(tmp_path: Path, settings: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        opened(classifier(tmp_path / "m.onnx"), *settings.split())


@pytest.mark.parametrize(
    ("settings", "scaling"),
    [
        (f"range=255 {CAFFE}", lambda x: (x - [123.675, 116.28, 103.53]) / [58.395, 57.12, 57.375]),
        (IMAGENET, lambda x: (x / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]),
        ("mean=0.5 std=0.5", lambda x: x / 127.5 - 1),
        ("range=255 mean=127.5 std=127.5", lambda x: x / 127.5 - 1),
        ("range=255 mean=0 std=1", lambda x: x),
        ("range=255 std=255", lambda x: x / 255),
        ("range=255 std=65025", lambda x: x / 255 / 255),  # of a network that was trained by mistake
        ("range=255 mean=103.939,116.779,123.68", lambda x: x - [103.939, 116.779, 123.68]),
        ("mean=1 std=-1", lambda x: 1 - x / 255),
        ("mean=-0.125 std=1.25", lambda x: 0.1 + 0.8 * x / 255),
    ],
)
def test_scalings_that_networks_take(tmp_path: Path, settings: str, scaling: Any) -> None:
    images = noise(2, SIDE, SIDE, 3)
    logit = opened(classifier(tmp_path / "m.onnx"), *settings.split()).model.run(images)[1]
    expected = scores(scaling(images.astype(np.float64)))
    np.testing.assert_allclose(logit, expected, atol=1e-5 * max(1, np.abs(expected).max()))


@pytest.mark.parametrize("shape", [(20, 31, 3), (31, 20, 3), (9, 9, 3), (5, 40, 3)])
@pytest.mark.parametrize(
    ("settings", "transform"),
    [
        ("resize=9", [v2.Resize(9), v2.CenterCrop(SIDE)]),
        ("resize=6", [v2.Resize(SIDE), v2.CenterCrop(SIDE)]),
        (
            "resize=11 resample=bicubic",
            [v2.Resize(11, v2.InterpolationMode.BICUBIC), v2.CenterCrop(SIDE)],
        ),
        ("", [v2.Resize(SIDE), v2.CenterCrop(SIDE)]),
        ("fit=stretch", [v2.Resize((SIDE, SIDE))]),
        ("fit=pad", [lambda image: ImageOps.pad(image, (SIDE, SIDE), Image.Resampling.BILINEAR)]),
    ],
    ids=lambda told: told.replace(" ", "-") or "default" if isinstance(told, str) else "",
)
def test_images_are_resized_as_torchvision_does(
    tmp_path: Path, shape: tuple[int, ...], settings: str, transform: list[Any]
) -> None:
    pixels = noise(*shape)
    seen = np.asarray(v2.Compose(transform)(Image.fromarray(pixels)))
    with opened(classifier(tmp_path / "m.onnx"), f"size={SIDE}", *settings.split()) as served:
        (entry,) = served.classify([pixels], top_k=3)
        expected = softmax(scores(seen[None] / 255))[0]
        assert isinstance(entry, Prediction)
        assert entry.labels == tuple(CLASSES[i] for i in np.argsort(-expected))
        np.testing.assert_allclose(entry.probabilities, np.sort(expected)[::-1], atol=1e-5)


def test_channels_that_the_graph_leaves_open_are_red_green_and_blue(tmp_path: Path) -> None:
    images = noise(2, SIDE, SIDE, 3)
    path = classifier(tmp_path / "m.onnx", channels="c", sides=("h", "w"), batch=-1)
    with opened(path, "layout=nchw", f"size={SIDE}") as served:
        np.testing.assert_allclose(served.classify_arrays(images), softmax(scores(images / 255)), atol=1e-5)


def test_a_key_that_is_given_twice_is_refused() -> None:
    with pytest.raises(ConvlineError, match="mean is given twice"):
        ExternalPreprocessing.parse(["mean=0.5", "range=1", "mean=0.4"])


def test_what_onnxruntime_says_is_one_line(tmp_path: Path) -> None:
    path = classifier(tmp_path / "m.onnx")
    model = onnx.load(path)
    model.graph.initializer.append(numpy_helper.from_array(np.array([1, SIDE * SIDE * 3]), "one"))
    model.graph.node[1].CopyFrom(helper.make_node("Reshape", ["floats", "one"], ["flat"]))
    onnx.save(model, path)
    with pytest.raises(ModelError, match=r"does not run on 8 images of 6x6: .*cannot be reshaped") as refused:
        opened(path, "range=1")
    model.ir_version = 99
    onnx.save(model, path)
    with pytest.raises(ModelError, match=r"cannot load .*: Unsupported model IR version: 99") as unloaded:
        opened(path, "range=1")
    for told in (str(refused.value), str(unloaded.value)):
        assert "\n" not in told and "onnxruntime_src" not in told and "ONNXRuntimeError" not in told
        assert "export it again" not in told


def test_a_job_is_resumed(tmp_path: Path, photographs: Path) -> None:
    """The journal stores the description of the model, and only a job with the same one may continue it."""
    external = ExternalModel(CLASSES, ExternalPreprocessing.parse([f"size={SIDE}", "mean=0.5,0.4,0.3", "std=0.2"]))
    job = Job(
        [str(photographs)], classifier(tmp_path / "m.onnx"), tmp_path / "out.csv", external=external, batch_size=2
    )
    classify(job)
    whole = (tmp_path / "out.csv").read_bytes()
    (tmp_path / "out.csv").unlink()
    with Classifier(job.model, external=external, batch_size=2) as served:
        header = journal_header(job, served)
    write(tmp_path / "out.csv.partial", json.dumps(header).encode() + b"\n")
    classify(replace(job, resume=True))
    assert (tmp_path / "out.csv").read_bytes() == whole
    other = replace(external, preprocessing=ExternalPreprocessing.parse(["mean=0.5"]))
    write(tmp_path / "out.csv.partial", json.dumps(header).encode() + b"\n")
    with pytest.raises(ConvlineError, match="different settings: --classes or --preprocess;"):
        classify(replace(job, external=other, resume=True, output=tmp_path / "out.csv"))


@pytest.mark.parametrize("count", [2, 4])
def test_a_wrong_number_of_classes_is_refused(tmp_path: Path, count: int) -> None:
    with pytest.raises(
        ModelError, match=rf"gives 3 scores per image, {count} classes were named; name as many classes"
    ):
        opened(classifier(tmp_path / "m.onnx"), "range=1", classes=tuple("abcd"[:count]))
    external = ExternalModel(tuple("abcd"[:count]), ExternalPreprocessing(), Path("names.txt"))
    with pytest.raises(ModelError, match=rf"{count} classes were named in names\.txt"):
        Classifier(classifier(tmp_path / "m.onnx"), external=external)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("men=1", "there is no 'men'; there are size, layout, range, mean"),
        ("layout=chw", "layout accepts nchw, nhwc"),
        ("range=2", "range accepts 1, 255"),
        ("mean=a", "mean accepts numbers"),
        ("size=0", "size accepts 32 or 32x48"),
        ("resize=256x256", "resize accepts a number of pixels"),
        ("output=", "output accepts the name of an output"),
        ("fit=letterbox", "fit accepts crop, stretch, pad"),
        ("size", "size accepts"),
    ],
)
def test_a_setting_that_is_unknown_or_ill_typed_is_refused(setting: str, message: str) -> None:
    with pytest.raises(ConvlineError, match=message):
        ExternalPreprocessing.parse([setting])


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    for number in range(7):
        write(tmp_path / f"photographs/{number}.png", encode(noise(SIDE, SIDE, 3), "PNG"))
    return tmp_path / "photographs"


def test_a_folder_is_classified_with_an_external_model(cli: Cli, tmp_path: Path, photographs: Path) -> None:
    write(tmp_path / "classes.txt", "\n".join(CLASSES).encode())
    options = ("--model", classifier(tmp_path / "m.onnx"), "--classes", "classes.txt", "--output", "out.csv")
    cli("serving", "classify", photographs, *options, "--preprocess", "range=1")
    with opened(tmp_path / "m.onnx", "range=1") as served:
        expected = served.classify_files([photographs / f"{number}.png" for number in range(7)])
    assert [row["label"] for row in csv_rows(tmp_path / "out.csv")] == [entry.labels[0] for entry in expected]


@pytest.mark.parametrize(
    "options", [("--classes", "classes.txt"), ("--preprocess", "range=1")], ids=["no-preprocessing", "no-classes"]
)
def test_both_options_are_needed(cli: Cli, tmp_path: Path, photographs: Path, options: tuple[str, ...]) -> None:
    write(tmp_path / "classes.txt", b"cat")
    result = cli("serving", "classify", photographs, "--model", "m.onnx", *options, status=2)
    assert "needs both" in result.stderr


def test_a_file_of_convline_needs_no_classes(model: Path) -> None:
    with pytest.raises(ModelError, match="leave out --classes"):
        open_model(model, external=ExternalModel(CLASSES, ExternalPreprocessing()))


def test_an_external_file_without_options_says_what_it_needs(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="--classes FILE and describe its input by --preprocess"):
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


def test_weights_beside_an_external_file_are_loaded(tmp_path: Path) -> None:
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
    with pytest.raises(ModelError, match=r"which is not a file in .*; it is refused|cannot be read"):
        opened(external(folder / "m.onnx", location), "range=1")


def test_spec_travels(tmp_path: Path) -> None:
    spec = opened(classifier(tmp_path / "m.onnx"), "fit=stretch", "resample=bicubic").spec
    assert (spec.fit, spec.resample) == ("stretch", "bicubic")
    assert json.dumps(spec.to_dict())
