"""Which output of an external model is served, and as what kind of scores; compared with NumPy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnx.helper import make_node, make_tensor_value_info

from convline.errors import ModelError
from serving import Classifier
from serving.external_model import ExternalModel, ExternalPreprocessing
from tests.serving.helpers import noise

SIDE = 4
RNG = np.random.default_rng(5)
PIXELS = noise(6, SIDE, SIDE, 3)
MEANS = PIXELS.astype(np.float64).mean((1, 2)) / 255  # what the graphs begin with: [n, 3]
WEIGHT = {columns: RNG.normal(size=(3, columns)) * 4 for columns in (1, 2, 3, 5)}

Build = Callable[..., Classifier]


@pytest.fixture
def build(tmp_path: Path) -> Build:
    """`build(nodes, outputs, ...)` -> a classifier of the mean red, green and blue, `f`, times `w1` … `w5`."""

    def call(
        nodes: Sequence[onnx.NodeProto],
        outputs: Sequence[tuple[str, Any, Any] | onnx.ValueInfoProto],
        *settings: str,
        classes: Sequence[str] = ("cat", "dog", "horse"),
        batch: Any = "n",
        opset: int = 17,
    ) -> Classifier:
        first = [make_node("GlobalAveragePool", ["x"], ["p"]), make_node("Flatten", ["p"], ["f"], axis=1)]
        graph = helper.make_graph(
            [*first, *nodes],
            "tiny",
            [make_tensor_value_info("x", TensorProto.FLOAT, [batch, 3, SIDE, SIDE])],
            [make_tensor_value_info(*told) if isinstance(told, tuple) else told for told in outputs],
            [numpy_helper.from_array(w.astype(np.float32), f"w{columns}") for columns, w in WEIGHT.items()]
            + [numpy_helper.from_array(np.array([-1, 3, 1, 1]), "as maps")],
        )
        opsets = [helper.make_opsetid("", opset), helper.make_opsetid("ai.onnx.ml", 1)]
        path = tmp_path / "model.onnx"
        onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), path)
        external = ExternalModel(tuple(classes), ExternalPreprocessing.parse(settings or ("range=1",)))
        return Classifier(path, "cpu", threads=1, external=external)

    return call


def product(columns: int, name: str = "y") -> onnx.NodeProto:
    return make_node("MatMul", ["f", f"w{columns}"], [name])


def floats(name: str = "y", shape: Any = None) -> tuple[str, int, Any]:
    return name, TensorProto.FLOAT, shape


def softmax(logit: NDArray[np.float64]) -> NDArray[np.float64]:
    e = np.exp(logit - logit.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def sigmoid(logit: NDArray[np.float64]) -> NDArray[np.float64]:
    """[1 - p, p] of [n, 1]."""
    p = 1 / (1 + np.exp(-logit))
    return np.concatenate([1 - p, p], 1)


@pytest.mark.parametrize(
    ("nodes", "shape"),
    [
        pytest.param([product(1)], ["n", 1], id="logit"),
        pytest.param([product(1)], None, id="logit-of-unknown-shape"),
        pytest.param([product(1, "z"), make_node("Squeeze", ["z"], ["y"])], ["n"], id="squeezed"),
        pytest.param([product(1, "z"), make_node("Sigmoid", ["z"], ["y"])], ["n", 1], id="sigmoid"),
        pytest.param(
            [product(1, "z"), make_node("Sigmoid", ["z"], ["s"]), make_node("Squeeze", ["s"], ["y"])], ["n"], id="both"
        ),
    ],
)
def test_one_score_is_that_of_the_second_of_two_classes(build: Build, nodes: Any, shape: Any) -> None:
    served = build(nodes, [floats("y", shape)], classes=("cat", "dog"))
    expected = sigmoid(MEANS @ WEIGHT[1])
    np.testing.assert_allclose(served.classify_arrays(PIXELS), expected, atol=1e-5)
    labels = [entry.labels[0] for entry in served.classify(list(PIXELS))]
    assert labels == [("cat", "dog")[int(row[1] > 0.5)] for row in expected]


def test_one_score_that_may_be_either_is_asked_about(build: Build) -> None:
    nodes = [make_node("ReduceMean", ["f"], ["y"], axes=[1])]
    with pytest.raises(ModelError, match="scores=probabilities or scores=logits"):
        build(nodes, [floats()], classes=("cat", "dog"))
    served = build(nodes, [floats()], "scores=probabilities", classes=("cat", "dog"))
    np.testing.assert_allclose(served.classify_arrays(PIXELS)[:, 1], MEANS.mean(1), atol=1e-5)


@pytest.mark.parametrize(
    ("nodes", "classes", "message"),
    [
        ([product(1)], "a", "gives one score per image, but only one class was named; name both"),
        ([product(1)], "abc", "gives 1 score per image, 3 classes were named"),
        ([product(3)], "a", "gives 3 scores per image, 1 class was named"),
        ([product(1, "z"), make_node("Softmax", ["z"], ["y"])], "ab", "softmax over one score, which is always 1"),
        (
            [product(2, "z"), make_node("Sigmoid", ["z"], ["y"])],
            "ab",
            "ends in Sigmoid: state what its scores are by --preprocess",
        ),
        ([product(3, "z"), make_node("HardSigmoid", ["z"], ["y"])], "abc", "ends in HardSigmoid: state"),
        ([product(3, "z"), make_node("Softplus", ["z"], ["y"])], "abc", "ends in Softplus: state"),
        ([product(1, "z"), make_node("Tanh", ["z"], ["y"])], "ab", "ends in Tanh: state"),
        ([product(3, "z"), make_node("Softmax", ["z"], ["y"], axis=0)], "abc", "softmax that is not over its classes"),
    ],
)
def test_ambiguous_scores_are_refused(build: Build, nodes: Any, classes: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        build(nodes, [floats()], classes=classes)


def test_several_sigmoids_are_what_the_user_says(build: Build) -> None:
    served = build([product(3, "z"), make_node("Sigmoid", ["z"], ["y"])], [floats()], "scores=probabilities")
    np.testing.assert_allclose(served.classify_arrays(PIXELS), 1 / (1 + np.exp(-MEANS @ WEIGHT[3])), atol=1e-5)


def test_numbers_outside_0_to_1_are_refused_as_probabilities(build: Build) -> None:
    with pytest.raises(ModelError, match="which are not probabilities; use --preprocess scores=logits"):
        build([product(3)], [floats()], "scores=probabilities")


@pytest.mark.parametrize("opset", [7, 12, 17])
def test_a_softmax_over_maps_of_one_pixel(build: Build, opset: int) -> None:
    nodes = [product(3, "z"), make_node("Reshape", ["z", "as maps"], ["r"])]
    served = build([*nodes, make_node("Softmax", ["r"], ["y"], axis=1)], [floats("y", ["n", 3, 1, 1])], opset=opset)
    np.testing.assert_allclose(served.classify_arrays(PIXELS), softmax(MEANS @ WEIGHT[3]), atol=1e-5)
    if opset >= 13:
        with pytest.raises(ModelError, match="softmax that is not over its classes"):
            build([*nodes, make_node("Softmax", ["r"], ["y"])], [floats("y", ["n", 3, 1, 1])], opset=opset)


@pytest.mark.parametrize("ending", [("LogSoftmax",), ("Softmax", "Log")])
def test_logarithms_of_probabilities(build: Build, ending: tuple[str, ...]) -> None:
    names = ["z", *map(str, range(len(ending) - 1)), "y"]
    steps = [make_node(op, [before], [behind]) for op, before, behind in zip(ending, names, names[1:], strict=False)]
    served = build([product(3, "z"), *steps], [floats()])
    np.testing.assert_allclose(served.classify_arrays(PIXELS), softmax(MEANS @ WEIGHT[3]), atol=1e-5)


def test_a_probability_of_0_does_not_reject_the_image(build: Build) -> None:
    """exp(-200) is 0 in float32, and its logarithm -inf."""
    nodes = [product(3, "z"), make_node("Mul", ["z", "k"], ["s"]), make_node("Softmax", ["s"], ["y"])]
    k = numpy_helper.from_array(np.float32(1000), "k")
    served = build([make_node("Constant", [], ["k"], value=k), *nodes], [floats()])
    assert (served.classify_arrays(PIXELS).max(1) == 1).all()


TWO = ([product(5, "e"), product(3)], [floats("e", ["n", 5]), floats("y", ["n", 3])])


def test_the_only_output_with_as_many_columns_as_classes_is_taken(build: Build) -> None:
    expected = softmax(MEANS @ WEIGHT[3])
    np.testing.assert_allclose(build(*TWO).classify_arrays(PIXELS), expected, atol=1e-5)
    argmax = make_node("ArgMax", ["y"], ["l"], axis=1, keepdims=0)
    labelled = build([product(3), argmax], [("l", TensorProto.INT64, ["n"]), floats()])
    np.testing.assert_allclose(labelled.classify_arrays(PIXELS), expected, atol=1e-5)


def test_an_output_is_named_where_two_could_be_it(build: Build) -> None:
    nodes, outputs = [make_node("Neg", ["f"], ["e"]), product(3)], [floats("e", ["n", 3]), floats("y", ["n", 3])]
    listed = r"2 outputs that could be .* output=NAME .*: e \(float \[batch, 3\]\); y \(float \[batch, 3\]\)"
    with pytest.raises(ModelError, match=listed):
        build(nodes, outputs)
    np.testing.assert_allclose(
        build(nodes, outputs, "output=y").classify_arrays(PIXELS), softmax(MEANS @ WEIGHT[3]), atol=1e-5
    )
    np.testing.assert_allclose(build(nodes, outputs, "output=e").classify_arrays(PIXELS), softmax(-MEANS), atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "classes", "message"),
    [
        (("output=q",), "abc", r"no output of scores that is called q; its outputs: e \(float \[batch, 5\]\)"),
        (("output=e",), "abc", "gives 5 scores per image, 3 classes were named"),
        ((), "abcd", r"no outputs that could be the scores of 4 classes.*y \(float \[batch, 3\]\)"),
    ],
)
def test_an_impossible_output_is_explained(build: Build, settings: tuple[str, ...], classes: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        build(*TWO, *settings, classes=classes)


def test_labels_alone_are_no_scores(build: Build) -> None:
    argmax = make_node("ArgMax", ["z"], ["y"], axis=1, keepdims=0)
    with pytest.raises(ModelError, match=r"gives no scores; .*its outputs: y \(int64 \[batch\]\)"):
        build([product(3, "z"), argmax], [("y", TensorProto.INT64, ["n"])])


@pytest.mark.parametrize("own", [("cat", "dog", "horse"), (0, 1, 2), ("horse", "cat", "dog"), (2, 0, 1)])
def test_a_zip_map_is_passed_over(build: Build, own: tuple[Any, ...]) -> None:
    kind, key = ("strings", TensorProto.STRING) if isinstance(own[0], str) else ("int64s", TensorProto.INT64)
    floats_by_class = helper.make_map_type_proto(key, helper.make_tensor_type_proto(TensorProto.FLOAT, []))
    output = helper.make_value_info("z", helper.make_sequence_type_proto(floats_by_class))
    zip_map = make_node("ZipMap", ["s"], ["z"], domain="ai.onnx.ml", **{f"classlabels_{kind}": own})
    nodes = [product(3), make_node("Softmax", ["y"], ["s"]), zip_map]
    if own[0] in ("horse", 2):
        with pytest.raises(ModelError, match=r"has its classes in the order .*(horse, cat, dog|2, 0, 1)"):
            build(nodes, [output])
        return
    np.testing.assert_allclose(build(nodes, [output]).classify_arrays(PIXELS), softmax(MEANS @ WEIGHT[3]), atol=1e-5)


def test_a_graph_for_one_image_may_leave_out_the_batch(build: Build) -> None:
    served = build([product(3, "z"), make_node("Squeeze", ["z"], ["y"])], [floats("y", [3])], batch=1)
    np.testing.assert_allclose(served.classify_arrays(PIXELS), softmax(MEANS @ WEIGHT[3]), atol=1e-5)


def test_scores_of_other_images_are_refused(build: Build) -> None:
    with pytest.raises(ModelError, match="gives 3 rows of scores for 8 images"):
        build([product(3, "z"), make_node("Transpose", ["z"], ["y"])], [floats()])


def test_inner_graphs_keep_what_they_take_from_outside(build: Build) -> None:
    inner = [
        helper.make_graph([product(3, "t")], "then", [], [make_tensor_value_info("t", TensorProto.FLOAT, None)]),
        helper.make_graph(
            [make_node("Identity", ["f"], ["e"])], "else", [], [make_tensor_value_info("e", TensorProto.FLOAT, None)]
        ),
    ]
    true = make_node("Constant", [], ["c"], value=numpy_helper.from_array(np.array(True), "c"))
    served = build([true, make_node("If", ["c"], ["y"], then_branch=inner[0], else_branch=inner[1])], [floats()])
    np.testing.assert_allclose(served.classify_arrays(PIXELS), softmax(MEANS @ WEIGHT[3]), atol=1e-5)


def test_outputs_may_have_the_names_that_convline_uses(build: Build) -> None:
    nodes = [product(3, "logit"), make_node("Softmax", ["logit"], ["probability"])]
    served = build(nodes, [floats("probability")])
    np.testing.assert_allclose(served.classify_arrays(PIXELS), softmax(MEANS @ WEIGHT[3]), atol=1e-5)


@pytest.mark.parametrize(
    "nodes",
    [
        pytest.param([make_node("Identity", ["y"], ["y"])], id="itself"),
        pytest.param([make_node("Log", ["y"], ["y"])], id="its-logarithm"),
        pytest.param([make_node("Cast", [], ["y"], to=1)], id="of-nothing"),
        pytest.param(
            [make_node("ZipMap", [], ["y"], domain="ai.onnx.ml", classlabels_int64s=[0])], id="zip-map-of-nothing"
        ),
    ],
)
def test_a_damaged_graph_is_one_sentence(build: Build, nodes: Any) -> None:
    with pytest.raises(ModelError, match=r"cannot load|gives no scores"):
        build(nodes, [floats("y", ["n", 3])])
