"""ONNX classifiers made elsewhere: given class names and how they take pixels, they are served as our own are.

What `pipeline export` puts into the graph is put around it here: pixels as they are decoded go in, probabilities come
out.
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
from serving.score_output import Kind, Scores, find_scores, opset, score_nodes

OLDEST_OPSET = 7  # since then operators broadcast as NumPy does
TAKEN = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.UINT8)
PREFIX = "model/"
PROBED = 8  # images that shapes are found for where the batch is open
MAX_SIDE = 2**14


@dataclass(frozen=True)
class Preprocessing:
    """How a network takes pixels, in this order: `color` "rgb" or "bgr"; pixels from 0 to `range` (1 or 255); minus
    `mean`, divided by `std`, one value a channel, in that range; `layout` "nchw" or "nhwc" (None: as its input's shape
    tells). `size` (height, width) where its input does not tell; `resize` the shorter side before the centre is
    cropped (None: so that as little as possible is cropped); `fit`, `resample`, `jpeg` as in `ImageSpec`. `output`
    names what holds the scores (None: the only output that can), `scores` says what they are (None: as its last nodes
    tell).
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
    scores: Kind | None = None
    resize: int | None = None
    output: str | None = None

    @classmethod
    def parse(cls, settings: Sequence[str]) -> Preprocessing:
        """Of "KEY=VALUE" texts. Raises ConvlineError for a key that is given twice, or unknown, naming the known."""
        given: dict[str, Any] = {}
        for setting in settings:
            key, _, value = setting.partition("=")
            if key not in ACCEPTED:
                raise ConvlineError(f"--preprocess {setting}: there is no {key!r}; there are {', '.join(ACCEPTED)}")
            if key in given:
                raise ConvlineError(f"--preprocess {setting}: {key} is given twice; give it once")
            try:
                given[key] = _value(value, ACCEPTED[key])
            except ValueError as error:
                accepted = ACCEPTED[key]
                told = accepted if isinstance(accepted, str) else ", ".join(map(str, accepted))
                raise ConvlineError(f"--preprocess {setting}: {key} accepts {told}") from error
        return cls(**given)


SIZE, SIDE, NUMBERS, NAME = "32 or 32x48", "a number of pixels: 256", "numbers: 0.5,0.5,0.5", "the name of an output"
# what each key accepts: one of several values, or what is described
ACCEPTED: dict[str, str | tuple[Any, ...]] = {
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


def _value(text: str, accepted: str | tuple[Any, ...]) -> Any:
    """Raises ValueError for what is not accepted."""
    if accepted == SIZE:
        height, _, width = text.lower().partition("x")
        return _side(height), _side(width or height)
    if accepted == SIDE:
        return _side(text)
    if accepted == NUMBERS:
        return tuple(float(part) for part in text.split(","))
    if accepted == NAME and text:
        return text
    for choice in accepted if isinstance(accepted, tuple) else ():
        if str(choice) == text:
            return choice
    raise ValueError(text)


def _side(text: str) -> int:
    if not 1 <= int(text) <= MAX_SIDE:
        raise ValueError(text)
    return int(text)


@dataclass(frozen=True)
class ExternalModel:
    """What an external file does not say of itself. `classes_file` is where its classes were read from."""

    classes: tuple[str, ...]
    preprocessing: Preprocessing
    classes_file: Path | None = None

    def to_dict(self) -> dict[str, Any]:
        """In types of JSON, which come back from it as they went."""
        told = asdict(self.preprocessing)
        listed = {key: list(value) if isinstance(value, tuple) else value for key, value in told.items()}
        return {"classes": list(self.classes), "preprocessing": listed}

    @property
    def count(self) -> str:
        """How many classes were named, and where."""
        where = f" in {self.classes_file}" if self.classes_file else ""
        return f"{len(self.classes)} {'class was' if len(self.classes) == 1 else 'classes were'} named{where}"


@dataclass(frozen=True)
class Adapted:
    """A model with the inputs and outputs of our own, what it decodes, its batch size where that is fixed, and what
    its scores are."""

    model: onnx.ModelProto
    spec: ImageSpec
    batch: int | None
    scores: Scores


def adapt(model: onnx.ModelProto, external: ExternalModel, name: Path | str) -> Adapted:
    """Put preprocessing before a classifier, and what makes probabilities behind it, in `model` itself.

    Raises ModelError where it is no classifier of images, and where something is to be said of it.
    """
    if opset(model) < OLDEST_OPSET:
        raise ModelError(f"{name} is of opset {opset(model)}; {OLDEST_OPSET} is the oldest that is served")
    weights = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in weights]
    if len(inputs) != 1:
        names = ", ".join(value.name for value in inputs) or "none"
        raise ModelError(f"{name} has {len(inputs)} inputs ({names}); a classifier of images has one")
    kind = inputs[0].type.tensor_type.elem_type
    if kind not in TAKEN:
        taken = TensorProto.DataType.Name(kind) if kind else "no tensor"
        raise ModelError(f"{name} takes {taken}; float, double, float16 and uint8 are served")
    dims = [max(0, dim.dim_value) for dim in inputs[0].type.tensor_type.shape.dim] or [0, 0, 0, 0]
    told, spec = _complete(external.preprocessing, dims, kind, name)
    batch = dims[0] or None
    assert spec.height and spec.width
    sides = (spec.height, spec.width)
    shape = [batch or PROBED, *((spec.channels, *sides) if told.layout == "nchw" else (*sides, spec.channels))]
    scores = find_scores(model, shape, told.output, told.scores, external.classes, name)
    before = _before(PREFIX + inputs[0].name, told, spec, kind)
    graph = model.graph
    _add_prefix(graph)
    nodes = [*before, *graph.node, *score_nodes(PREFIX + scores.value, scores, batch)]
    kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:], graph.output[:], graph.value_info[:]
    graph.node.extend(kept)
    own = [value for value in graph.input if value.name in {PREFIX + weight for weight in weights}]
    declared = [onnx.ValueInfoProto.FromString(value.SerializeToString()) for value in own]
    del graph.input[:]
    pixels = [batch or "batch", spec.height, spec.width, spec.channels]
    graph.input.extend([helper.make_tensor_value_info("image", TensorProto.UINT8, pixels), *declared])
    outputs = [batch or "batch", len(external.classes)]
    graph.output.extend(helper.make_tensor_value_info(n, TensorProto.FLOAT, outputs) for n in ("probability", "logit"))
    return Adapted(model, spec, batch, scores)


def _add_prefix(graph: onnx.GraphProto) -> None:
    """To all names of tensors, those of inner graphs included: `onnx.compose` forgets what these take from outside."""
    for node in graph.node:
        node.input[:] = [name and PREFIX + name for name in node.input]
        node.output[:] = [name and PREFIX + name for name in node.output]
        for attribute in node.attribute:
            for inner in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
                _add_prefix(inner)
    sparse = (tensor for both in graph.sparse_initializer for tensor in (both.values, both.indices))
    for named in (*graph.input, *graph.output, *graph.value_info, *graph.initializer, *sparse):
        named.name = PREFIX + named.name


def _complete(told: Preprocessing, dims: list[int], kind: int, name: Path | str) -> tuple[Preprocessing, ImageSpec]:
    """What was told, with the layout as the input's shape tells, and how images are decoded; both checked."""
    shape = ", ".join(str(side or "?") for side in dims)
    if len(dims) != 4:
        raise ModelError(f"{name} takes {len(dims)} dimensions [{shape}]; images in a batch have 4")
    fits = {"nchw": dims[1] in (1, 3), "nhwc": dims[3] in (1, 3)}
    layouts: list[Literal["nchw", "nhwc"]] = [layout for layout in ("nchw", "nhwc") if fits[layout]]
    layout = told.layout or (layouts[0] if len(layouts) == 1 else None)
    if layout is None and (layouts or 0 in (dims[1], dims[3])):
        raise ModelError(f"{name} takes [{shape}], which does not tell where its channels are; set layout=nchw or nhwc")
    channels = dims[1] if layout == "nchw" else dims[3]
    if layout is None or channels not in (0, 1, 3):
        raise ModelError(
            f"{name} takes [{shape}], which has no 1 or 3 channels where {layout or 'nchw or nhwc'} has them; no "
            "others are served (where they are elsewhere, set layout=)"
        )
    channels = channels or 3
    height, width = dims[2:] if layout == "nchw" else dims[1:3]
    size = told.size or ((height, width) if height and width else None)
    if size is None:
        raise ModelError(f"{name} takes images of any size; say which by --preprocess size=HxW")
    if any(stated and stated != wanted for stated, wanted in zip((height, width), size, strict=True)):
        raise ModelError(f"{name} takes images of {height or '?'}x{width or '?'}, not of {size[0]}x{size[1]}")
    if told.resize is not None and (told.fit != "crop" or told.resize < max(size)):
        raise ModelError(
            f"resize={told.resize} is the shorter side before {size[0]}x{size[1]} are cropped out of the middle: it "
            "has to be as long as those, and goes with fit=crop"
        )
    _check_scaling(told, channels, kind, name)
    spec = ImageSpec(*size, channels, told.fit, told.resample, jpeg=told.jpeg, resize=told.resize)
    return replace(told, layout=layout, size=size), spec


def _check_scaling(told: Preprocessing, channels: int, kind: int, name: Path | str) -> None:
    """Raises ModelError for a mean or std that no pixels of the range have. A network that really wants such numbers
    gets them in the other range: (x - m) / s there is (255 x - 255 m) / (255 s) here.
    """
    for key, values in (("mean", told.mean), ("std", told.std)):
        if len(values) not in (0, 1, channels) or not np.isfinite(values).all() or (key == "std" and 0 in values):
            raise ModelError(f"{name} takes {channels} channels; {key} has {values}")
    if kind == TensorProto.UINT8 and (told.mean or told.std):
        raise ModelError(f"{name} takes pixels as bytes; leave out mean and std")
    given = " ".join(f"{key}={_numbers(values)}" for key, values in (("mean", told.mean), ("std", told.std)) if values)
    mean, std = np.array(told.mean or 0), np.abs(told.std or told.range)
    if told.range == 1 and (mean.min() > 1 or std.max() > 10):
        raise ModelError(f"{given} are of pixels from 0 to 255, but range=1 has them from 0 to 1; add range=255")
    if told.range == 255 and (0 < mean.max() <= 1 or std.max() < 1):
        raise ModelError(
            f"{given} are of pixels from 0 to 1, but range=255 has them from 0 to 255; leave out range=255"
        )
    # x - -0.125, divided by 1.25, is a scaling to 0.1 … 0.9; what pixels vary by is at most half of their range
    is_negative = mean.min() < 0 and (not told.std or std.max() <= told.range / 2)
    if mean.max() > told.range or is_negative:
        raise ModelError(f"{given}: no pixels from 0 to {told.range} have such a mean; give it as it is subtracted")


def _numbers(values: tuple[float, ...]) -> str:
    return ",".join(f"{value:g}" for value in values)


def _before(target: str, told: Preprocessing, spec: ImageSpec, kind: int) -> list[onnx.NodeProto]:
    """From uint8 `image` [n, height, width, channels] to what the network takes."""
    steps: list[tuple[str, list[Any], dict[str, Any]]] = []
    if told.color == "bgr" and spec.channels == 3:
        steps.append(("Gather", [np.array([2, 1, 0])], {"axis": 3}))
    if kind != TensorProto.UINT8:
        steps.append(("Cast", [], {"to": TensorProto.FLOAT}))
        steps += [("Div", [np.float32(255)], {})] if told.range == 1 else []
        steps += [("Sub", [np.array(told.mean, np.float32)], {})] if told.mean else []
        steps += [("Div", [np.array(told.std, np.float32)], {})] if told.std else []
        steps += [("Cast", [], {"to": kind})] if kind != TensorProto.FLOAT else []
    steps += [("Transpose", [], {"perm": [0, 3, 1, 2]})] if told.layout == "nchw" else []
    steps = steps or [("Identity", [], {})]
    nodes: list[onnx.NodeProto] = []
    value = "image"
    for number, (operator, constants, attributes) in enumerate(steps):
        names = [f"preprocessing/{number}.constant" for _ in constants]
        for constant, array in zip(names, constants, strict=True):
            tensor = numpy_helper.from_array(np.asarray(array), constant)
            nodes.append(helper.make_node("Constant", [], [constant], name=constant, value=tensor))
        last = target if number == len(steps) - 1 else f"preprocessing/{number}"
        node_name = f"preprocessing/{operator}_{number}"
        nodes.append(helper.make_node(operator, [value, *names], [last], name=node_name, **attributes))
        value = last
    return nodes
