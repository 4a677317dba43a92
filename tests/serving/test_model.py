"""`open_model` opens files that convline exported, and refuses all others."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from convline.errors import ModelError
from pipeline.exporting.onnx_metadata import PROBE_TOLERANCE
from serving.inspect import inspect
from serving.model import LARGEST_TOLERANCE, open_model
from serving.session import provider_problem
from tests.serving.helpers import altered, noise, resealed, set_metadata

Edit = Callable[[onnx.ModelProto], object]

without_cuda = pytest.mark.skipif(provider_problem("cuda") is None, reason="CUDA works here")


def metadata(proto: onnx.ModelProto, key: str) -> str:
    return next(entry.value for entry in proto.metadata_props if entry.key == f"convline.{key}")


def change(key: str, edit: Callable[[Any], object]) -> Edit:
    """convline.<key>, parsed, goes through `edit`."""
    return lambda proto: set_metadata(key, json.dumps(edit(json.loads(metadata(proto, key)))))(proto)


def change_one(field: str, value: object) -> Callable[[Any], object]:
    """An edit for `change`: one field of a table."""
    return lambda table: {**table, field: value}


def change_weight(edit: Callable[[np.ndarray], object]) -> Edit:
    def apply(proto: onnx.ModelProto) -> None:
        tensor = next(tensor for tensor in proto.graph.initializer if tensor.name == "network.conv1.weight")
        weight = onnx.numpy_helper.to_array(tensor).copy()
        edit(weight)
        tensor.CopyFrom(onnx.numpy_helper.from_array(weight, tensor.name))

    return apply


def drop_all_metadata(proto: onnx.ModelProto) -> None:
    del proto.metadata_props[:]


def test_an_exported_model_opens(model: Path) -> None:
    opened = open_model(model)
    assert opened.classes == tuple("0123456789")
    assert (opened.spec.height, opened.spec.width, opened.spec.channels) == (8, 8, 1)
    assert opened.metadata["weights"] == "averaged"


def test_an_unchanged_copy_opens(model: Path, tmp_path: Path) -> None:
    assert open_model(altered(model, tmp_path / "copy.onnx", lambda _: None)).classes


@pytest.mark.parametrize("count", [1, 2, 3, 17, 64])
def test_the_batch_is_dynamic(model: Path, count: int) -> None:
    opened, images = open_model(model), noise(count, 8, 8, 1)
    probability, logit = opened.run(images)
    assert probability.shape == logit.shape == (count, 10)
    assert probability.dtype == logit.dtype == np.float32
    exponential = np.exp(logit.astype(np.float64))
    np.testing.assert_allclose(probability, exponential / exponential.sum(1, keepdims=True), atol=1e-6)


def test_a_result_does_not_depend_on_the_rest_of_its_batch(model: Path) -> None:
    opened, image = open_model(model), noise(8, 8, 1)
    (alone,), (alone_logit,) = opened.run_padded(image[None], 16)
    for position in range(16):
        images = noise(16, 8, 8, 1)
        images[position] = image
        for count in (position + 1, 16):
            probability, logit = opened.run_padded(images[:count], 16)
            assert probability.shape == (count, 10)
            assert probability[position].tobytes() == alone.tobytes()
            assert logit[position].tobytes() == alone_logit.tobytes()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        pytest.param(drop_all_metadata, "not exported by convline", id="external"),
        pytest.param(set_metadata("format", "2"), "upgrade", id="newer-format"),
        pytest.param(set_metadata("format", '"one"'), "model.onnx", id="format-of-another-type"),
        *[
            pytest.param(set_metadata(key, None), key, id=f"without-{key}")
            for key in ("format", "classes", "image", "weights", "probe")
        ],
        pytest.param(set_metadata("classes", '["0", "1"'), "damaged", id="damaged-json"),
        pytest.param(change("classes", lambda classes: classes[:-1]), "classes|outputs", id="fewer-classes"),
        pytest.param(set_metadata("classes", "10"), "model.onnx", id="classes-no-list"),
        pytest.param(change("image", lambda image: {**image, "height": 9}), "inputs", id="other-height"),
        pytest.param(change("image", lambda image: {**image, "channels": 3}), "inputs", id="other-channels"),
        pytest.param(change("image", lambda image: {**image, "height": None}), "model.onnx", id="no-height"),
        pytest.param(change("image", lambda image: {**image, "version": 3}), "spec|image", id="newer-image-spec"),
        pytest.param(set_metadata("image", "[]"), "model.onnx", id="image-no-table"),
    ],
)
def test_a_file_that_contradicts_itself_is_refused(model: Path, tmp_path: Path, edit: Edit, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        open_model(altered(model, tmp_path / "model.onnx", edit))


@pytest.mark.parametrize("value", [0.1, np.nan, np.inf])
def test_one_wrong_weight_fails_the_self_test(model: Path, tmp_path: Path, value: float) -> None:
    def edit(weight: np.ndarray) -> None:
        weight[0, 0, 1, 1] += np.float32(value)

    with pytest.raises(ModelError, match="self-test"):
        open_model(altered(model, tmp_path / "model.onnx", change_weight(edit)))


@pytest.mark.parametrize(
    "edit",
    [
        pytest.param(lambda _: {}, id="empty"),
        pytest.param(lambda _: [], id="list"),
        pytest.param(lambda _: None, id="null"),
        pytest.param(lambda probe: {"logits": probe["logits"]}, id="no-tolerance"),
        pytest.param(lambda probe: {**probe, "logits": probe["logits"][:-1]}, id="fewer-images"),
        pytest.param(lambda probe: {**probe, "logits": [[1.0], [1.0, 2.0]]}, id="ragged"),
        pytest.param(lambda probe: {**probe, "logits": "words"}, id="text"),
        pytest.param(lambda probe: {**probe, "logits": np.full((8, 10), np.nan).tolist()}, id="nan"),
        pytest.param(lambda probe: {**probe, "tolerance": np.nan}, id="nan-tolerance"),
        pytest.param(lambda probe: {**probe, "tolerance": np.inf}, id="infinite-tolerance"),
        pytest.param(lambda probe: {**probe, "tolerance": 1e30}, id="huge-tolerance"),
        pytest.param(lambda probe: {**probe, "tolerance": 0.021 * largest(probe)}, id="too-large-a-tolerance"),
        pytest.param(lambda probe: {**probe, "tolerance": -1}, id="negative-tolerance"),
        pytest.param(lambda probe: {**probe, "images": 0, "logits": []}, id="no-images"),
        pytest.param(lambda probe: {**probe, "images": 0}, id="images-that-are-not-counted"),
        pytest.param(lambda probe: {"logits": probe["logits"], "tolerance": probe["tolerance"]}, id="no-count"),
        pytest.param(lambda probe: {**probe, "logits": np.full((8, 10), np.inf).tolist()}, id="infinite"),
    ],
)
def test_a_damaged_probe_is_refused(model: Path, tmp_path: Path, edit: Callable[[object], object]) -> None:
    """By everything that reads the file, and before its graph is run."""
    path = resealed(model, tmp_path / "model.onnx", change("probe", edit))
    for read in (open_model, inspect):
        with pytest.raises(ModelError, match="probe"):
            read(path)


def largest(probe: Any) -> float:
    return max(1.0, float(np.abs(probe["logits"]).max()))


def test_the_tolerance_of_every_precision_is_accepted() -> None:
    assert max(PROBE_TOLERANCE.values()) <= LARGEST_TOLERANCE


def without(key: str) -> Callable[[Any], object]:
    return lambda table: {name: value for name, value in table.items() if name != key}


@pytest.mark.parametrize(
    ("key", "edit", "message"),
    [
        pytest.param("evaluation", lambda _: {}, r"evaluation\.split, evaluation\.fingerprint", id="empty-evaluation"),
        pytest.param("evaluation", without("fingerprint"), r"evaluation\.fingerprint", id="no-fingerprint"),
        *[
            pytest.param(
                "evaluation", change_one("precision_at_1", value), r"evaluation\.precision_at_1", id=f"{value}"
            )
            for value in (None, 1.5, -0.1, "0.99", True)
        ],
        pytest.param("evaluation", change_one("count", 99.5), r"evaluation\.count", id="half-an-image"),
        pytest.param("run", lambda _: {}, r"run\.id, run\.seed, run\.step", id="empty-run"),
        pytest.param("run", change_one("id", ""), r"run\.id", id="no-id"),
        pytest.param("run", change_one("step", -1), r"run\.step", id="negative-step"),
        pytest.param("run", change_one("seed", "one"), r"run\.seed", id="seed-in-words"),
        pytest.param("run", change_one("step", True), r"run\.step", id="step-true"),
        pytest.param("dataset", lambda _: {}, r"dataset\.name, dataset\.fingerprint", id="empty-dataset"),
    ],
)
def test_a_file_that_does_not_say_where_it_came_from_is_refused(
    model: Path, tmp_path: Path, key: str, edit: Callable[[object], object], message: str
) -> None:
    with pytest.raises(ModelError, match=f"missing or damaged metadata: {message}"):
        open_model(resealed(model, tmp_path / "model.onnx", change(key, edit)))


def test_a_proof_that_names_no_file_proves_nothing(model: Path, tmp_path: Path) -> None:
    path = altered(model, tmp_path / "model.onnx", change("parity", without("sha256_without_parity")))
    for read in (open_model, inspect):
        with pytest.raises(ModelError, match="without the hash of the proven file"):
            read(path)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999"])
def test_numbers_that_json_does_not_have_are_refused(model: Path, tmp_path: Path, number: str) -> None:
    with pytest.raises(ModelError, match=rf"damaged metadata convline\.versions \({number} is not a JSON number"):
        open_model(resealed(model, tmp_path / "model.onnx", set_metadata("versions", f'{{"onnx": {number}}}')))


def test_a_missing_file_is_refused_with_its_path(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"nowhere\.onnx"):
        open_model(tmp_path / "nowhere.onnx")


@pytest.mark.parametrize("part", [0, 0.5, 0.99])
def test_a_cut_file_is_refused(model: Path, tmp_path: Path, part: float) -> None:
    cut = tmp_path / "cut.onnx"
    cut.write_bytes(model.read_bytes()[: int(part * model.stat().st_size)])
    with pytest.raises(ModelError, match=r"cut\.onnx"):
        open_model(cut)


def test_garbage_is_refused(tmp_path: Path) -> None:
    garbage = tmp_path / "garbage.onnx"
    garbage.write_bytes(noise(10_000).tobytes())
    with pytest.raises(ModelError, match=r"garbage\.onnx"):
        open_model(garbage)


CONTRACT = ("recipe", "dataset", "run", "evaluation", "parity", "versions")


@pytest.mark.parametrize("key", CONTRACT)
def test_a_file_that_lacks_any_of_its_metadata_is_refused(model: Path, tmp_path: Path, key: str) -> None:
    with pytest.raises(ModelError, match=f"missing or damaged metadata: {key}"):
        open_model(altered(model, tmp_path / "model.onnx", set_metadata(key, None)))


@pytest.mark.parametrize(
    "edit",
    [
        pytest.param(change("classes", lambda names: [names[1], names[0], *names[2:]]), id="class-order"),
        pytest.param(change("evaluation", lambda told: {**told, "precision_at_1": 1.0}), id="precision"),
        pytest.param(change("probe", lambda probe: {**probe, "tolerance": probe["tolerance"] * 1.5}), id="tolerance"),
    ],
)
def test_a_file_changed_after_its_proof_is_refused(model: Path, tmp_path: Path, edit: Edit) -> None:
    with pytest.raises(ModelError, match="was changed after its proof"):
        open_model(altered(model, tmp_path / "model.onnx", edit))


@pytest.mark.parametrize(
    "edit",
    [
        pytest.param(change("parity", lambda proof: {**proof, "passed": False}), id="failed"),
        pytest.param(set_metadata("parity", "{}"), id="none"),
        pytest.param(set_metadata("weights", '"raw"'), id="raw"),
    ],
)
def test_a_file_that_did_not_pass_its_proof_is_refused(model: Path, tmp_path: Path, edit: Edit) -> None:
    with pytest.raises(ModelError, match="did not pass its proof"):
        open_model(altered(model, tmp_path / "model.onnx", edit))


@pytest.mark.parametrize(
    "edit",
    [
        pytest.param(set_metadata("classes", "[" * 100_000), id="nested"),
        pytest.param(set_metadata("format", "1" * 5000), id="long-number"),
        pytest.param(set_metadata("format", "true"), id="format-true"),
        pytest.param(set_metadata("format", "-3"), id="format-negative"),
        pytest.param(set_metadata("classes", "[]"), id="no-classes"),
        pytest.param(set_metadata("classes", '[null, {"a": 1}]'), id="classes-no-names"),
        pytest.param(change("classes", lambda names: [names[0]] * len(names)), id="classes-twice"),
        pytest.param(change("image", lambda image: {**image, "height": 8.0}), id="height-no-integer"),
        pytest.param(change("image", lambda image: {**image, "height": 60000, "width": 60000}), id="huge-images"),
        pytest.param(change("image", lambda image: {**image, "height": None, "width": None}), id="no-size"),
        pytest.param(lambda proto: proto.metadata_props.add(key="convline.classes", value="[]"), id="key-twice"),
    ],
)
def test_inconsistent_metadata_are_refused(model: Path, tmp_path: Path, edit: Edit) -> None:
    with pytest.raises(ModelError, match=r"model\.onnx"):
        open_model(resealed(model, tmp_path / "model.onnx", edit))


def test_a_graph_with_a_fixed_batch_is_refused(model: Path, tmp_path: Path) -> None:
    def fix(proto: onnx.ModelProto) -> None:
        shape = next(tensor for tensor in proto.graph.initializer if tensor.name.startswith("val_"))
        shape.CopyFrom(onnx.numpy_helper.from_array(np.array([1, 256]), shape.name))

    with pytest.raises(ModelError, match="does not run on 8 images"):
        open_model(altered(model, tmp_path / "model.onnx", fix))


@pytest.mark.parametrize("place", ["sparse", "function", "training"])
def test_weights_in_another_file_are_found_wherever_they_are(model: Path, tmp_path: Path, place: str) -> None:
    external = onnx.TensorProto(name="secret", data_type=onnx.TensorProto.FLOAT, dims=[1])
    external.data_location = onnx.TensorProto.EXTERNAL
    external.external_data.add(key="location", value="secret.bin")
    proto = onnx.load(model)
    node = onnx.NodeProto(op_type="Constant", output=["unused"])
    if place == "sparse":
        attribute = node.attribute.add(name="sparse_value", type=onnx.AttributeProto.SPARSE_TENSOR)
        attribute.sparse_tensor.values.CopyFrom(external)
        proto.graph.node.insert(0, node)
    elif place == "function":
        attribute = node.attribute.add(name="value", type=onnx.AttributeProto.TENSOR)
        attribute.t.CopyFrom(external)
        proto.functions.add(name="f", domain="d").node.append(node)
    else:
        proto.training_info.add().initialization.initializer.append(external)
    path = tmp_path / "model.onnx"
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(ModelError, match=r"keeps secret in another file \(secret\.bin\)"):
        open_model(path)


def test_weights_in_another_file_are_refused(model: Path, tmp_path: Path) -> None:
    """In any folder: a convline file holds all its weights."""

    def edit(proto: onnx.ModelProto) -> None:
        tensor = next(tensor for tensor in proto.graph.initializer if tensor.name == "network.conv1.weight")
        (tmp_path / "weights.bin").write_bytes(tensor.raw_data)
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        entry = tensor.external_data.add()
        entry.key, entry.value = "location", "weights.bin"

    proto = onnx.load(model)
    edit(proto)
    path = tmp_path / "model.onnx"
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(ModelError, match=r"keeps network\.conv1\.weight in another file \(weights\.bin\)"):
        open_model(path)


def test_a_constant_in_another_file_is_refused_too(model: Path, tmp_path: Path) -> None:
    proto = onnx.load(model)
    hidden = onnx.helper.make_node("Constant", [], ["unused"], value=onnx.numpy_helper.from_array(np.zeros(1, "f")))
    tensor = hidden.attribute[0].t
    tensor.data_location = onnx.TensorProto.EXTERNAL
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", "/etc/hostname"
    proto.graph.node.insert(0, hidden)
    path = tmp_path / "model.onnx"
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(ModelError, match="/etc/hostname"):
        open_model(path)


def test_a_file_over_the_limit_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "large.onnx"
    with path.open("wb") as file:
        file.truncate(2**31)  # sparse: it takes no room
    with pytest.raises(ModelError, match=f"takes {2**31} bytes, the limit is {2**31 - 1}"):
        open_model(path)


@pytest.mark.parametrize("name", ["models:/digits", "models:/digits/one", "models:/@champion", "models:/a/b/3"])
def test_a_name_that_the_registry_cannot_have_is_refused(name: str) -> None:
    with pytest.raises(ModelError, match="models:/NAME@champion or models:/NAME/3"):
        open_model(name)


@without_cuda
@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_a_provider_that_was_asked_for_and_does_not_load_is_an_error(model: Path, provider: str) -> None:
    with pytest.raises(ModelError, match=rf"{provider} did not load: .*(\.so|onnxruntime-gpu)"):
        open_model(model, provider)  # type: ignore[arg-type]


@without_cuda
def test_auto_takes_the_cpu_where_there_is_no_gpu_and_says_so(model: Path) -> None:
    assert open_model(model, "auto").provider == "cpu"


@pytest.mark.skipif(provider_problem("cuda") is not None, reason="CUDA does not work here")
def test_auto_takes_a_gpu_that_works(model: Path) -> None:
    assert open_model(model, "auto").provider == "cuda"
