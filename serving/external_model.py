"""External models: ONNX classifiers of other tools, with `--classes` and `--preprocess` (mean, std, range, layout, …).

The graph gets preprocessing in front and a softmax behind, as `pipeline export` builds them into its own files: it
takes decoded pixels and gives probabilities.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from convline.errors import ConvlineError, ModelError
from convline.images import ImageSpec
from serving.score_output import ScoreKind, ScoreOutput, find_score_output, opset, score_nodes
from serving.session import OUTPUTS

OLDEST_OPSET = 7  # operators broadcast as in NumPy since then
INPUT_TYPES = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.UINT8)
GRAPH_PREFIX = "model/"  # of all names in the external graph, so that they differ from the nodes added here
ASSUMED_BATCH = 8  # images, to infer the shapes of a graph that takes any batch size
MAX_SIDE = 2**14


@dataclass(frozen=True)
class ExternalPreprocessing:
    """How an external network takes pixels. Applied in this order: `color` "rgb" or "bgr"; scale to 0 … `range` (1 or
    255); subtract `mean`, divide by `std` (one value per channel, in that range); `layout` "nchw" or "nhwc" (None: as
    the shape of its input says).

    `size` is (height, width), needed if the shape of the input leaves it open. `resize` is the length of the shorter
    side before the centre is cropped (None: crop as little as possible). `fit`, `resample` and `jpeg` are those of
    `ImageSpec`. `output` names the output with the scores (None: the only possible one), `scores` says what they are
    (None: as the last nodes of the graph say).
    """

    size: tuple[int, int] | None = None
    layout: Literal["nchw", "nhwc"] | None = None
    range: Literal[1, 255] = 1
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    color: Literal["rgb", "bgr"] = "rgb"
    fit: Literal["crop", "stretch", "pad"] = "crop"
    resample: Literal["box", "bilinear", "bicubic", "lanczos"] = "bilinear"
    jpeg: Literal["full", "reduced"] = "full"
    scores: ScoreKind | None = None
    resize: int | None = None
    output: str | None = None

    @classmethod
    def parse(cls, settings: Sequence[str]) -> ExternalPreprocessing:
        """Parse "KEY=VALUE" settings. Raises ConvlineError for an unknown key, a repeated key and an invalid value."""
        values: dict[str, Any] = {}
        for setting in settings:
            key, _, value = setting.partition("=")
            if key not in ACCEPTED_VALUES:
                keys = ", ".join(ACCEPTED_VALUES)
                raise ConvlineError(f"--preprocess {setting}: there is no {key!r}; there are {keys}")
            if key in values:
                raise ConvlineError(f"--preprocess {setting}: {key} is given twice; give it once")
            accepted = ACCEPTED_VALUES[key]
            try:
                values[key] = _parse_value(value, accepted)
            except ValueError as error:
                description = accepted if isinstance(accepted, str) else ", ".join(map(str, accepted))
                raise ConvlineError(f"--preprocess {setting}: {key} accepts {description}") from error
        return cls(**values)


SIZE, SIDE, NUMBERS, NAME = "32 or 32x48", "a number of pixels: 256", "numbers: 0.5,0.5,0.5", "the name of an output"
# for each key, a tuple of all its values, or a description of them
ACCEPTED_VALUES: dict[str, str | tuple[Any, ...]] = {
    "size": SIZE,
    "layout": ("nchw", "nhwc"),
    "range": (1, 255),
    "mean": NUMBERS,
    "std": NUMBERS,
    "color": ("rgb", "bgr"),
    "resize": SIDE,
    "fit": ("crop", "stretch", "pad"),
    "resample": ("box", "bilinear", "bicubic", "lanczos"),
    "jpeg": ("full", "reduced"),
    "output": NAME,
    "scores": ("logits", "probabilities"),
}


def _parse_value(text: str, accepted: str | tuple[Any, ...]) -> Any:
    """Raises ValueError for a text that is not accepted."""
    if accepted == SIZE:
        height, _, width = text.lower().partition("x")
        return _parse_side(height), _parse_side(width or height)
    if accepted == SIDE:
        return _parse_side(text)
    if accepted == NUMBERS:
        return tuple(float(part) for part in text.split(","))
    if accepted == NAME and text:
        return text
    for choice in accepted if isinstance(accepted, tuple) else ():
        if str(choice) == text:
            return choice
    raise ValueError(text)


def _parse_side(text: str) -> int:
    if not 1 <= int(text) <= MAX_SIDE:
        raise ValueError(text)
    return int(text)


@dataclass(frozen=True)
class ExternalModel:
    """The user's description of an ONNX file of another tool. `classes_file` is the file of its class names."""

    classes: tuple[str, ...]
    preprocessing: ExternalPreprocessing
    classes_file: Path | None = None

    def to_dict(self) -> dict[str, Any]:
        """In JSON types only: lists instead of tuples."""
        fields = asdict(self.preprocessing).items()
        preprocessing = {key: list(value) if isinstance(value, tuple) else value for key, value in fields}
        return {"classes": list(self.classes), "preprocessing": preprocessing}

    @property
    def class_count(self) -> str:
        """How many classes were named, and in which file, for messages."""
        where = f" in {self.classes_file}" if self.classes_file else ""
        return f"{len(self.classes)} {'class was' if len(self.classes) == 1 else 'classes were'} named{where}"


@dataclass(frozen=True)
class AdaptedModel:
    """An external model with the inputs and outputs of convline's files; `batch` is None if it takes any batch size."""

    model: onnx.ModelProto
    spec: ImageSpec
    batch: int | None
    scores: ScoreOutput


def adapt(model: onnx.ModelProto, external: ExternalModel, name: Path | str) -> AdaptedModel:
    """Add preprocessing before and probabilities behind a classifier; changes `model` itself.

    Raises ModelError for a graph that is not an image classifier, and for settings that are missing or do not fit it.
    """
    if opset(model) < OLDEST_OPSET:
        raise ModelError(f"{name} is of opset {opset(model)}; {OLDEST_OPSET} is the oldest that is supported")
    weights = {tensor.name for tensor in model.graph.initializer}
    image_input = _image_input(model, weights, name)
    input_type = image_input.type.tensor_type.elem_type
    dims = [max(0, dim.dim_value) for dim in image_input.type.tensor_type.shape.dim] or [0, 0, 0, 0]
    settings, spec = _complete_settings(external.preprocessing, dims, input_type, name)
    batch = dims[0] or None
    assert spec.height and spec.width
    sides = (spec.height, spec.width)
    shape = [
        batch or ASSUMED_BATCH,
        *((spec.channels, *sides) if settings.layout == "nchw" else (*sides, spec.channels)),
    ]
    scores = find_score_output(model, shape, settings.output, settings.scores, external.classes, name)
    preprocessing = _preprocessing_nodes(GRAPH_PREFIX + image_input.name, settings, spec, input_type)
    graph = model.graph
    _add_prefix(graph)
    all_nodes = [*preprocessing, *graph.node, *score_nodes(GRAPH_PREFIX + scores.value, scores, batch)]
    nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in all_nodes]
    del graph.node[:], graph.output[:], graph.value_info[:]
    graph.node.extend(nodes)
    weight_names = {GRAPH_PREFIX + weight for weight in weights}  # old files declare weights as inputs, too
    weight_inputs = [
        onnx.ValueInfoProto.FromString(value.SerializeToString()) for value in graph.input if value.name in weight_names
    ]
    del graph.input[:]
    image_shape = [batch or "batch", spec.height, spec.width, spec.channels]
    graph.input.extend([helper.make_tensor_value_info("image", TensorProto.UINT8, image_shape), *weight_inputs])
    output_shape = [batch or "batch", len(external.classes)]
    graph.output.extend(helper.make_tensor_value_info(n, TensorProto.FLOAT, output_shape) for n in OUTPUTS)
    return AdaptedModel(model, spec, batch, scores)


def _image_input(model: onnx.ModelProto, weights: set[str], name: Path | str) -> onnx.ValueInfoProto:
    """The input for the images. Raises ModelError if there is not exactly one, or if its type is not supported."""
    inputs = [value for value in model.graph.input if value.name not in weights]
    if len(inputs) != 1:
        names = ", ".join(value.name for value in inputs) or "none"
        raise ModelError(f"{name} has {len(inputs)} inputs ({names}); an image classifier has one")
    input_type = inputs[0].type.tensor_type.elem_type
    if input_type not in INPUT_TYPES:
        type_name = TensorProto.DataType.Name(input_type) if input_type else "no tensor"
        raise ModelError(f"{name} takes {type_name}; float, double, float16 and uint8 are supported")
    return inputs[0]


def _add_prefix(graph: onnx.GraphProto) -> None:
    """Add the prefix to the names of all tensors, also in inner graphs: `onnx.compose` skips the names there that come
    from the outer graph.
    """
    for node in graph.node:
        node.input[:] = [name and GRAPH_PREFIX + name for name in node.input]
        node.output[:] = [name and GRAPH_PREFIX + name for name in node.output]
        for attribute in node.attribute:
            for inner in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
                _add_prefix(inner)
    sparse = (tensor for both in graph.sparse_initializer for tensor in (both.values, both.indices))
    for named in (*graph.input, *graph.output, *graph.value_info, *graph.initializer, *sparse):
        named.name = GRAPH_PREFIX + named.name


def _complete_settings(
    settings: ExternalPreprocessing, dims: list[int], input_type: int, name: Path | str
) -> tuple[ExternalPreprocessing, ImageSpec]:
    """The settings with their layout and size, taken from the shape of the input where needed, and the image spec.

    `dims` is the shape of the input, with 0 for open dimensions. Raises ModelError for settings that do not fit it.
    """
    layout, channels = _layout(settings, dims, name)
    height, width = dims[2:] if layout == "nchw" else dims[1:3]
    size = settings.size or ((height, width) if height and width else None)
    if size is None:
        raise ModelError(f"{name} takes images of any size; choose one by --preprocess size=HxW")
    if any(fixed and fixed != wanted for fixed, wanted in zip((height, width), size, strict=True)):
        raise ModelError(f"{name} takes images of {height or '?'}x{width or '?'}, not of {size[0]}x{size[1]}")
    if settings.resize is not None and (settings.fit != "crop" or settings.resize < max(size)):
        raise ModelError(
            f"resize={settings.resize} is the shorter side before the centre of {size[0]}x{size[1]} is cropped: it "
            "must be at least as long as that, and needs fit=crop"
        )
    _check_scaling(settings, channels, input_type, name)
    spec = ImageSpec(*size, channels, settings.fit, settings.resample, jpeg=settings.jpeg, resize=settings.resize)
    return replace(settings, layout=layout, size=size), spec


def _layout(settings: ExternalPreprocessing, dims: list[int], name: Path | str) -> tuple[Literal["nchw", "nhwc"], int]:
    """The layout of the input and its number of channels. Raises ModelError if the shape does not tell them."""
    shape = ", ".join(str(side or "?") for side in dims)
    if len(dims) != 4:
        raise ModelError(f"{name} takes {len(dims)} dimensions [{shape}]; a batch of images has 4")
    fits = {"nchw": dims[1] in (1, 3), "nhwc": dims[3] in (1, 3)}
    layouts: list[Literal["nchw", "nhwc"]] = [layout for layout in ("nchw", "nhwc") if fits[layout]]
    layout = settings.layout or (layouts[0] if len(layouts) == 1 else None)
    if layout is None and (layouts or 0 in (dims[1], dims[3])):
        raise ModelError(f"{name} takes [{shape}], where the channels cannot be told; set layout=nchw or nhwc")
    channels = dims[1] if layout == "nchw" else dims[3]
    if layout is None or channels not in (0, 1, 3):
        raise ModelError(
            f"{name} takes [{shape}], which does not have 1 or 3 channels in the place of {layout or 'nchw or nhwc'}; "
            "other numbers are not supported (if the channels are in another place, set layout=)"
        )
    return layout, channels or 3


def _check_scaling(settings: ExternalPreprocessing, channels: int, input_type: int, name: Path | str) -> None:
    """Raises ModelError for a mean or std that pixels in the range cannot have.

    A network that needs such numbers anyway can be described in the other range: (x - m) / s for 0 to 1 is
    (255 x - 255 m) / (255 s) for 0 to 255.
    """
    for key, values in (("mean", settings.mean), ("std", settings.std)):
        if len(values) not in (0, 1, channels) or not np.isfinite(values).all() or (key == "std" and 0 in values):
            raise ModelError(f"{name} takes {channels} channels; {key} has {values}")
    if input_type == TensorProto.UINT8 and (settings.mean or settings.std):
        raise ModelError(f"{name} takes pixels as bytes; leave out mean and std")
    pairs = [("mean", settings.mean), ("std", settings.std)]
    text = " ".join(f"{key}={_numbers(values)}" for key, values in pairs if values)
    mean, std = np.array(settings.mean or 0), np.abs(settings.std or settings.range)
    if settings.range == 1 and (mean.min() > 1 or std.max() > 10):
        raise ModelError(f"{text} is for pixels from 0 to 255, but range=1 has them from 0 to 1; add range=255")
    if settings.range == 255 and (0 < mean.max() <= 1 or std.max() < 1):
        raise ModelError(f"{text} is for pixels from 0 to 1, but range=255 has them from 0 to 255; leave out range=255")
    # the std of pixels is at most half of their range; a larger one belongs to another scaling, where a negative mean
    # is possible: (x - -0.125) / 1.25 scales to 0.1 … 0.9
    is_negative = mean.min() < 0 and (not settings.std or std.max() <= settings.range / 2)
    if mean.max() > settings.range or is_negative:
        raise ModelError(
            f"{text}: pixels from 0 to {settings.range} cannot have such a mean; give the number that is subtracted"
        )


def _numbers(values: tuple[float, ...]) -> str:
    return ",".join(f"{value:g}" for value in values)


def _preprocessing_nodes(
    target: str, settings: ExternalPreprocessing, spec: ImageSpec, input_type: int
) -> list[onnx.NodeProto]:
    """Nodes from uint8 `image` [n, height, width, channels] to `target`, the input of the network."""
    steps: list[tuple[str, list[Any], dict[str, Any]]] = []  # operator, constants, attributes
    if settings.color == "bgr" and spec.channels == 3:
        steps.append(("Gather", [np.array([2, 1, 0])], {"axis": 3}))
    if input_type != TensorProto.UINT8:
        steps.append(("Cast", [], {"to": TensorProto.FLOAT}))
        steps += [("Div", [np.float32(255)], {})] if settings.range == 1 else []
        steps += [("Sub", [np.array(settings.mean, np.float32)], {})] if settings.mean else []
        steps += [("Div", [np.array(settings.std, np.float32)], {})] if settings.std else []
        steps += [("Cast", [], {"to": input_type})] if input_type != TensorProto.FLOAT else []
    steps += [("Transpose", [], {"perm": [0, 3, 1, 2]})] if settings.layout == "nchw" else []
    steps = steps or [("Identity", [], {})]
    nodes: list[onnx.NodeProto] = []
    value = "image"
    for number, (operator, constants, attributes) in enumerate(steps):
        names = [f"preprocessing/{number}.constant" for _ in constants]
        for constant, array in zip(names, constants, strict=True):
            tensor = numpy_helper.from_array(np.asarray(array), constant)
            nodes.append(helper.make_node("Constant", [], [constant], name=constant, value=tensor))
        output = target if number == len(steps) - 1 else f"preprocessing/{number}"
        node_name = f"preprocessing/{operator}_{number}"
        nodes.append(helper.make_node(operator, [value, *names], [output], name=node_name, **attributes))
        value = output
    return nodes
