"""Which output of a graph made elsewhere holds the scores of the classes, and what those scores are.

Nothing is guessed: where two outputs could be it, or the scores could be one thing or the other, the user is asked.
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

Kind = Literal["logits", "probabilities"]

FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.BFLOAT16)
# what converters and exporters leave between the scores and the output, which changes no score
NEUTRAL = (
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
# one score a class of these may be a probability of its own (multi-label), or an odd logit
UNCLEAR = ("Sigmoid", "HardSigmoid", "Softplus", "Tanh")
LARGE = 1024  # values of a tensor on which no shape depends

Shape = tuple[int | None, ...]  # None: a side of unknown size


@dataclass(frozen=True)
class Scores:
    """`value`: the tensor that holds the scores. `kind` None where nothing tells what they are. `is_single`: one score
    for two classes, that of the second. `is_softmax`: they are a softmax's, and add up to 1.
    """

    value: str
    kind: Kind | None
    is_single: bool
    is_softmax: bool

    @property
    def are_probabilities(self) -> bool:
        return self.kind == "probabilities"


def find_scores(
    model: onnx.ModelProto,
    image_shape: Sequence[int],
    named: str | None,
    told: Kind | None,
    classes: Sequence[str],
    name: object,
) -> Scores:
    """The scores of a graph whose input takes `image_shape`; `named` is the output, `told` what it holds.

    Raises ModelError where nobody says which output or what it holds, and for a softmax that is not over the classes.
    """
    shapes = _shapes(model, image_shape)
    producers = {output: node for node in model.graph.node for output in node.output}
    outputs = [_output(value, producers, shapes, image_shape[0]) for value in model.graph.output]
    output = _chosen(outputs, named, len(classes), name)
    _check_order(producers.get(output.name), classes, name)
    value, made_by = _traced(output.value, producers)
    operator = made_by.op_type if made_by is not None else ""
    is_single = output.columns == 1 and len(classes) == 2
    if operator == "Softmax" and output.columns == 1:
        raise ModelError(f"{name} ends in a softmax over one score, which is 1 whatever the image; export it without")
    if len(classes) == output.columns == 1:
        raise ModelError(
            f"{name} gives one score an image, and one class was named; name both, first the one that a low score means"
        )
    if made_by is not None and operator == "Softmax" and not _is_over_classes(made_by, shapes, model):
        raise ModelError(
            f"{name} ends in a softmax that is not over its classes; export it with the axis of the classes"
        )
    if told is not None:
        return Scores(output.value, told, is_single, operator == "Softmax" and told == "probabilities")
    if operator == "Softmax" or (is_single and operator in ("Sigmoid", "HardSigmoid")):
        return Scores(value, "probabilities", is_single, operator == "Softmax")
    if operator in UNCLEAR:
        raise ModelError(f"{name} ends in {operator}: {ASK}")
    # the softmax of logarithms of probabilities is the probabilities
    return Scores(value, "logits" if operator == "LogSoftmax" else None, is_single, False)


ASK = "say by --preprocess scores=probabilities or scores=logits what its scores are"


@dataclass(frozen=True)
class _Output:
    """An output, and the tensor behind it with its type and its shape for so many images, where they are known."""

    name: str
    value: str
    kind: int
    shape: Shape | None

    images: int

    @property
    def columns(self) -> int | None:
        """Values an image; None where the graph does not say."""
        values = None if self.shape is None else _product(self.shape)
        return None if values is None else values // self.images

    def __str__(self) -> str:
        if not self.kind:
            return f"{self.name} (no tensor)"
        sides = ["?" if side is None else str(side) for side in self.shape or ()]
        sides[:1] = ["batch"] if sides[:1] == [str(self.images)] else sides[:1]
        shape = f"[{', '.join(sides)}]" if self.shape is not None else "of unknown shape"
        return f"{self.name} ({TensorProto.DataType.Name(self.kind).lower()} {shape})"


def _product(sides: Shape) -> int | None:
    return None if None in sides else prod(side for side in sides if side is not None)


def _output(value: onnx.ValueInfoProto, producers: Producers, shapes: Shapes, images: int) -> _Output:
    """A ZipMap makes maps from class to probability: what counts is the tensor that it makes them of."""
    node = producers.get(value.name)
    tensor = _input(node) if node is not None and node.op_type == "ZipMap" else value.name
    return _Output(value.name, tensor, *shapes.get(tensor, (0, None)), images)


def _chosen(outputs: Sequence[_Output], named: str | None, classes: int, name: object) -> _Output:
    """The output that was named, or the only one that could hold the scores."""
    there = "; ".join(map(str, outputs))
    of_scores = list({output.value: output for output in outputs if output.kind in FLOATS}.values())
    if named is not None:
        found = [output for output in outputs if output.name == named and output.kind in FLOATS]
        if not found:
            raise ModelError(f"{name} has no output of scores that is called {named}; its outputs: {there}")
        return found[0]
    if not of_scores:
        raise ModelError(f"{name} gives no scores; export it with its logits or probabilities; its outputs: {there}")
    possible = {None, classes, 1 if classes == 2 else classes}
    fitting = [output for output in of_scores if output.columns in possible]
    if len(fitting) == 1 or len(of_scores) == 1:
        return (fitting or of_scores)[0]
    count = len(fitting) or "no"
    raise ModelError(
        f"{name} has {count} outputs that could be the scores of {classes} classes; say by --preprocess output=NAME "
        f"which holds them: {there}"
    )


def _check_order(zip_map: onnx.NodeProto | None, classes: Sequence[str], name: object) -> None:
    """Raises ModelError where a ZipMap names the columns itself, in another order."""
    told = {} if zip_map is None else {attribute.name: attribute for attribute in zip_map.attribute}
    if "classlabels_strings" in told:
        own = [label.decode("utf-8", "replace") for label in told["classlabels_strings"].strings]
        if set(own) == set(classes) and own != list(classes):
            raise ModelError(f"{name} has its classes in the order {', '.join(own)}; name them in that order")
    if "classlabels_int64s" in told and (numbers := list(told["classlabels_int64s"].ints)) != sorted(numbers):
        raise ModelError(f"{name} has its classes in the order {numbers}; its scores cannot be matched with names")


def _traced(value: str, producers: Producers) -> tuple[str, onnx.NodeProto | None]:
    """The node that made the scores, and their tensor; the logarithm of a softmax gives way to the softmax."""
    left = dict(producers)  # each but once: the nodes of a damaged graph may go round in a circle
    node = left.pop(value, None)
    while node is not None and node.op_type in NEUTRAL:
        node = left.pop(_input(node), None)
    if node is not None and node.op_type == "Log":
        within, made_by = _traced(_input(node), left)
        if made_by is not None and made_by.op_type == "Softmax":
            return within, made_by
    return value, node


def _input(node: onnx.NodeProto) -> str:
    """The first; a damaged graph may have none."""
    return node.input[0] if node.input else ""


def _is_over_classes(softmax: onnx.NodeProto, shapes: Shapes, model: onnx.ModelProto) -> bool:
    """Whether it is over all values of an image, as far as its shape is known."""
    _, shape = shapes.get(softmax.output[0], (0, None))
    if shape is None or len(shape) < 2 or (all_values := _product(shape[1:])) is None:
        return True
    is_old = opset(model) < 13  # it was over its axis and all behind it
    told = {attribute.name: attribute.i for attribute in softmax.attribute}
    axis = told.get("axis", 1 if is_old else -1) % len(shape)
    return axis > 0 and _product(shape[axis:] if is_old else shape[axis : axis + 1]) == all_values


def opset(model: onnx.ModelProto) -> int:
    """Of the standard operators."""
    return next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 1)


Producers = dict[str, onnx.NodeProto]  # the node that makes each tensor
Shapes = dict[str, tuple[int, Shape | None]]  # type and shape of each tensor


def _shapes(model: onnx.ModelProto, image_shape: Sequence[int]) -> Shapes:
    """As far as they follow from the graph, for images of a shape."""
    light = onnx.ModelProto()
    light.CopyFrom(model)
    for tensor in light.graph.initializer:
        if prod(tensor.dims) > LARGE:
            for field in ("raw_data", "float_data", "double_data", "int32_data", "int64_data", "uint64_data"):
                tensor.ClearField(field)
    weights = {tensor.name for tensor in light.graph.initializer}
    for value in light.graph.input:
        if value.name not in weights:
            for dim, side in zip(value.type.tensor_type.shape.dim, image_shape, strict=True):
                dim.dim_value = side
    with suppress(Exception):  # of a graph that makes no sense: onnxruntime says so better
        light = onnx.shape_inference.infer_shapes(light)
    return {
        value.name: (value.type.tensor_type.elem_type, _shape(value.type.tensor_type))
        for value in (*light.graph.value_info, *light.graph.input, *light.graph.output)
    }


def _shape(tensor: onnx.TypeProto.Tensor) -> Shape | None:
    if not tensor.HasField("shape"):
        return None
    return tuple(dim.dim_value if dim.dim_value > 0 else None for dim in tensor.shape.dim)


def score_nodes(value: str, scores: Scores, batch: int | None) -> Iterator[onnx.NodeProto]:
    """From the tensor of the scores, called `value`, to `probability` and `logit`, float32 [batch, classes]."""
    axis = 0 if batch == 1 else 1  # what takes one image at a time may leave out the batch
    own, derived = ("probability", "logit") if scores.are_probabilities else ("logit", "probability")
    told = "scores.second" if scores.is_single else own
    yield helper.make_node("Flatten", [value], ["scores.flat"], name="scores/Flatten", axis=axis)
    yield helper.make_node("Cast", ["scores.flat"], [told], name=f"{told}/Cast", to=TensorProto.FLOAT)
    if scores.is_single:  # [1 - p, p], or [0, logit], whose softmax is [1 - sigmoid, sigmoid]
        yield _constant("scores.one", 1)
        minuend = "scores.one" if scores.are_probabilities else told
        yield helper.make_node("Sub", [minuend, told], ["scores.first"], name="scores/Sub")
        yield helper.make_node("Concat", ["scores.first", told], [own], name=f"{own}/Concat", axis=1)
    if not scores.are_probabilities:
        yield helper.make_node("Softmax", [own], [derived], name=f"{derived}/Softmax", axis=1)
        return
    yield _constant("scores.tiny", float(np.finfo(np.float32).tiny))  # the logarithm of a probability of 0 is finite
    yield helper.make_node("Relu", [own], ["scores.positive"], name="scores/Relu")
    yield helper.make_node("Add", ["scores.positive", "scores.tiny"], ["scores.sum"], name="scores/Add")
    yield helper.make_node("Log", ["scores.sum"], [derived], name=f"{derived}/Log")


def _constant(name: str, value: float) -> onnx.NodeProto:
    return helper.make_node("Constant", [], [name], name=name, value=numpy_helper.from_array(np.float32(value), name))


def check_scores(scores: Scores, probability: NDArray[np.float32], logit: NDArray[np.float32], name: object) -> None:
    """Look at the scores of some images, [batch, classes]. Raises ModelError where they are not what they should be."""
    finite = np.isfinite(probability).all(1) & np.isfinite(logit).all(1)
    values = (probability if scores.are_probabilities else logit)[finite, int(scores.is_single) :]
    if not values.size:
        return
    least, most = float(values.min()), float(values.max())
    if scores.kind is None and least >= 0 and most <= 1:
        raise ModelError(f"{name} gives numbers from 0 to 1: {ASK}")
    if scores.are_probabilities and (least < -0.01 or most > 1.01):
        raise ModelError(
            f"{name} gives numbers from {least:.3g} to {most:.3g}, which are no probabilities; say by --preprocess "
            "scores=logits that they are none"
        )
    if scores.is_softmax and np.abs(values.sum(1) - 1).max() > 0.5:  # 8-bit integers round each probability
        raise ModelError(f"{name} gives probabilities that do not add up to 1: its softmax is not over its classes")
