"""Find the score output of an external model, and whether its scores are logits or probabilities.

Nothing is guessed: if two outputs are possible, or the scores could be either, an error asks the user.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from typing import Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from convline.errors import ModelError

ScoreKind = Literal["logits", "probabilities"]

FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.BFLOAT16)
# nodes that converters and exporters put between the scores and the output; they change no score
NEUTRAL_OPERATORS = (
    "Identity",
    "Cast",
    "Reshape",
    "Flatten",
    "Squeeze",
    "Unsqueeze",
    "Dropout",
    "QuantizeLinear",
    "DequantizeLinear",
)
# the outputs of these may be independent probabilities (multi-label) or unusual logits
AMBIGUOUS_OPERATORS = ("Sigmoid", "HardSigmoid", "Softplus", "Tanh")
LARGE_TENSOR = 1024  # values; no shape depends on the values of larger tensors

Shape = tuple[int | None, ...]  # None: a dimension of unknown size


@dataclass(frozen=True)
class ScoreOutput:
    """`value` is the tensor with the scores. `kind` is None if the graph does not tell. `is_single`: there is one score
    for two classes, that of the second. `is_softmax`: the scores come from a softmax and add up to 1.
    """

    value: str
    kind: ScoreKind | None
    is_single: bool
    is_softmax: bool

    @property
    def are_probabilities(self) -> bool:
        return self.kind == "probabilities"


def find_score_output(
    model: onnx.ModelProto,
    image_shape: Sequence[int],
    output_name: str | None,
    kind: ScoreKind | None,
    classes: Sequence[str],
    name: object,
) -> ScoreOutput:
    """The score output of a graph whose input has the shape `image_shape`.

    `output_name` and `kind` are what the user says, None if nothing. Raises ModelError if neither the user nor the
    graph tells which output it is and what it holds, and for a softmax that is not over the classes.
    """
    shapes = _shapes(model, image_shape)
    producers = {output: node for node in model.graph.node for output in node.output}
    outputs = [_output(value, producers, shapes, image_shape[0]) for value in model.graph.output]
    output = _choose_output(outputs, output_name, len(classes), name)
    _check_class_order(producers.get(output.name), classes, name)
    value, producer = _trace_scores(output.value, producers)
    operator = producer.op_type if producer is not None else ""
    is_single = output.columns == 1 and len(classes) == 2
    if operator == "Softmax" and output.columns == 1:
        raise ModelError(f"{name} ends in a softmax over one score, which is always 1; export it without the softmax")
    if len(classes) == output.columns == 1:
        raise ModelError(
            f"{name} gives one score per image, but only one class was named; name both classes, first the one that a "
            "low score stands for"
        )
    if producer is not None and operator == "Softmax" and not _is_over_classes(producer, shapes, model):
        raise ModelError(
            f"{name} ends in a softmax that is not over its classes; export it with the axis of the classes"
        )
    if kind is not None:
        return ScoreOutput(output.value, kind, is_single, operator == "Softmax" and kind == "probabilities")
    if operator == "Softmax" or (is_single and operator in ("Sigmoid", "HardSigmoid")):
        return ScoreOutput(value, "probabilities", is_single, operator == "Softmax")
    if operator in AMBIGUOUS_OPERATORS:
        raise ModelError(f"{name} ends in {operator}: {STATE_SCORES}")
    # LogSoftmax counts as logits: the softmax of the logarithms of probabilities gives the probabilities again
    return ScoreOutput(value, "logits" if operator == "LogSoftmax" else None, is_single, False)


STATE_SCORES = "state what its scores are by --preprocess scores=probabilities or scores=logits"


@dataclass(frozen=True)
class _Output:
    """An output of the graph, and the tensor `value` behind it, with its type and its shape for a batch of `images`.

    `element_type` is 0 if it is not a tensor.
    """

    name: str
    value: str
    element_type: int
    shape: Shape | None

    images: int

    @property
    def columns(self) -> int | None:
        """Values per image; None if the graph does not tell."""
        values = None if self.shape is None else _product(self.shape)
        return None if values is None else values // self.images

    def __str__(self) -> str:
        if not self.element_type:
            return f"{self.name} (no tensor)"
        sides = ["?" if side is None else str(side) for side in self.shape or ()]
        sides[:1] = ["batch"] if sides[:1] == [str(self.images)] else sides[:1]
        shape = f"[{', '.join(sides)}]" if self.shape is not None else "of unknown shape"
        return f"{self.name} ({TensorProto.DataType.Name(self.element_type).lower()} {shape})"


def _product(sides: Shape) -> int | None:
    return None if None in sides else prod(side for side in sides if side is not None)


def _output(value: onnx.ValueInfoProto, producers: Producers, shapes: TensorTypes, images: int) -> _Output:
    """For a ZipMap, which makes maps from class to probability, the tensor before it counts."""
    node = producers.get(value.name)
    tensor = _first_input(node) if node is not None and node.op_type == "ZipMap" else value.name
    return _Output(value.name, tensor, *shapes.get(tensor, (0, None)), images)


def _choose_output(outputs: Sequence[_Output], output_name: str | None, classes: int, name: object) -> _Output:
    """The output that the user named, or the only one that could hold the scores."""
    listed = "; ".join(map(str, outputs))
    float_outputs = list({output.value: output for output in outputs if output.element_type in FLOATS}.values())
    if output_name is not None:
        matches = [output for output in outputs if output.name == output_name and output.element_type in FLOATS]
        if not matches:
            raise ModelError(f"{name} has no output of scores that is called {output_name}; its outputs: {listed}")
        return matches[0]
    if not float_outputs:
        raise ModelError(f"{name} gives no scores; export it with its logits or probabilities; its outputs: {listed}")
    possible_columns = {None, classes, 1 if classes == 2 else classes}
    candidates = [output for output in float_outputs if output.columns in possible_columns]
    if len(candidates) == 1 or len(float_outputs) == 1:
        return (candidates or float_outputs)[0]
    count = len(candidates) or "no"
    raise ModelError(
        f"{name} has {count} outputs that could be the scores of {classes} classes; choose the right one by "
        f"--preprocess output=NAME from: {listed}"
    )


def _check_class_order(zip_map: onnx.NodeProto | None, classes: Sequence[str], name: object) -> None:
    """Raises ModelError if a ZipMap has the classes in another order than the user."""
    attributes = {} if zip_map is None else {attribute.name: attribute for attribute in zip_map.attribute}
    if "classlabels_strings" in attributes:
        labels = [label.decode("utf-8", "replace") for label in attributes["classlabels_strings"].strings]
        if set(labels) == set(classes) and labels != list(classes):
            raise ModelError(f"{name} has its classes in the order {', '.join(labels)}; name them in that order")
    if "classlabels_int64s" in attributes:
        numbers = list(attributes["classlabels_int64s"].ints)
        if numbers != sorted(numbers):
            raise ModelError(f"{name} has its classes in the order {numbers}; its scores cannot be matched with names")


def _trace_scores(value: str, producers: Producers) -> tuple[str, onnx.NodeProto | None]:
    """The tensor of the scores and the node that computed them; of Softmax followed by Log, the softmax counts."""
    unvisited = dict(producers)  # each node once: a damaged graph may have a cycle
    node = unvisited.pop(value, None)
    while node is not None and node.op_type in NEUTRAL_OPERATORS:
        node = unvisited.pop(_first_input(node), None)
    if node is not None and node.op_type == "Log":
        log_input, producer = _trace_scores(_first_input(node), unvisited)
        if producer is not None and producer.op_type == "Softmax":
            return log_input, producer
    return value, node


def _first_input(node: onnx.NodeProto) -> str:
    return node.input[0] if node.input else ""  # a damaged graph may have a node without inputs


def _is_over_classes(softmax: onnx.NodeProto, shapes: TensorTypes, model: onnx.ModelProto) -> bool:
    """Whether a softmax is over all values of an image; True if its shape is unknown."""
    _, shape = shapes.get(softmax.output[0], (0, None))
    if shape is None or len(shape) < 2 or (values_per_image := _product(shape[1:])) is None:
        return True
    is_old = opset(model) < 13  # then a softmax is over its axis and all later ones
    attributes = {attribute.name: attribute.i for attribute in softmax.attribute}
    axis = attributes.get("axis", 1 if is_old else -1) % len(shape)
    return axis > 0 and _product(shape[axis:] if is_old else shape[axis : axis + 1]) == values_per_image


def opset(model: onnx.ModelProto) -> int:
    """The version of the standard operators."""
    return next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 1)


Producers = dict[str, onnx.NodeProto]  # for each tensor, the node that computes it
TensorTypes = dict[str, tuple[int, Shape | None]]  # for each tensor, its element type and its shape


def _shapes(model: onnx.ModelProto, image_shape: Sequence[int]) -> TensorTypes:
    """The types and shapes that can be inferred for an input of `image_shape`."""
    light = onnx.ModelProto()
    light.CopyFrom(model)
    for tensor in light.graph.initializer:
        if prod(tensor.dims) > LARGE_TENSOR:
            for field in ("raw_data", "float_data", "double_data", "int32_data", "int64_data", "uint64_data"):
                tensor.ClearField(field)
    weights = {tensor.name for tensor in light.graph.initializer}
    for value in light.graph.input:
        if value.name not in weights:
            for dim, side in zip(value.type.tensor_type.shape.dim, image_shape, strict=True):
                dim.dim_value = side
    with suppress(Exception):  # for a malformed graph, onnxruntime's error, which comes later, says more
        light = onnx.shape_inference.infer_shapes(light)
    return {
        value.name: (value.type.tensor_type.elem_type, _shape(value.type.tensor_type))
        for value in (*light.graph.value_info, *light.graph.input, *light.graph.output)
    }


def _shape(tensor: onnx.TypeProto.Tensor) -> Shape | None:
    if not tensor.HasField("shape"):
        return None
    return tuple(dim.dim_value if dim.dim_value > 0 else None for dim in tensor.shape.dim)


def score_nodes(value: str, scores: ScoreOutput, batch: int | None) -> Iterator[onnx.NodeProto]:
    """Nodes from `value`, the tensor of the scores, to `probability` and `logit`, each float32 [batch, classes]."""
    axis = 0 if batch == 1 else 1  # the output of a model for single images may have no batch dimension
    given, derived = ("probability", "logit") if scores.are_probabilities else ("logit", "probability")
    column = "scores.second" if scores.is_single else given
    yield helper.make_node("Flatten", [value], ["scores.flat"], name="scores/Flatten", axis=axis)
    yield helper.make_node("Cast", ["scores.flat"], [column], name=f"{column}/Cast", to=TensorProto.FLOAT)
    if scores.is_single:  # [1 - p, p], or [0, logit], whose softmax is [1 - sigmoid, sigmoid]
        yield _constant("scores.one", 1)
        minuend = "scores.one" if scores.are_probabilities else column
        yield helper.make_node("Sub", [minuend, column], ["scores.first"], name="scores/Sub")
        yield helper.make_node("Concat", ["scores.first", column], [given], name=f"{given}/Concat", axis=1)
    if not scores.are_probabilities:
        yield helper.make_node("Softmax", [given], [derived], name=f"{derived}/Softmax", axis=1)
        return
    # added so that the logarithm of a probability of 0 is finite
    yield _constant("scores.tiny", float(np.finfo(np.float32).tiny))
    yield helper.make_node("Relu", [given], ["scores.positive"], name="scores/Relu")
    yield helper.make_node("Add", ["scores.positive", "scores.tiny"], ["scores.sum"], name="scores/Add")
    yield helper.make_node("Log", ["scores.sum"], [derived], name=f"{derived}/Log")


def _constant(name: str, value: float) -> onnx.NodeProto:
    return helper.make_node("Constant", [], [name], name=name, value=numpy_helper.from_array(np.float32(value), name))


def check_scores(
    scores: ScoreOutput, probability: NDArray[np.float32], logit: NDArray[np.float32], name: object
) -> None:
    """Raises ModelError if the scores of some images, [batch, classes], cannot be what `scores` says."""
    finite = np.isfinite(probability).all(1) & np.isfinite(logit).all(1)
    values = (probability if scores.are_probabilities else logit)[finite, int(scores.is_single) :]
    if not values.size:
        return
    least, most = float(values.min()), float(values.max())
    if scores.kind is None and least >= 0 and most <= 1:
        raise ModelError(f"{name} gives numbers from 0 to 1: {STATE_SCORES}")
    if scores.are_probabilities and (least < -0.01 or most > 1.01):
        raise ModelError(
            f"{name} gives numbers from {least:.3g} to {most:.3g}, which are not probabilities; use --preprocess "
            "scores=logits if they are logits"
        )
    if scores.is_softmax and np.abs(values.sum(1) - 1).max() > 0.5:  # 8-bit integers round each probability
        raise ModelError(f"{name} gives probabilities that do not add up to 1: its softmax is not over its classes")
