"""ONNX classifiers made elsewhere: given class names and how they take pixels, they are served as our own are.

What `pipeline export` puts into the graph is put around it here: pixels as they are decoded go in, probabilities come
out.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from onnx import TensorProto, compose, helper, numpy_helper

from serving.errors import ConvlineError, ModelError
from serving.images import ImageSpec

OLDEST_OPSET = 7  # since then operators broadcast as NumPy does
FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16)
PREFIX = "model/"


@dataclass(frozen=True)
class Preprocessing:
    """How a network takes pixels, in this order: `color` "rgb" or "bgr"; pixels from 0 to `range` (1 or 255); minus
    `mean`, divided by `std`, one value a channel, in that range; `layout` "nchw" or "nhwc" (None: as its input's shape
    tells). `size` (height, width) where its input does not tell; `fit`, `resample`, `jpeg` as in `ImageSpec`; `scores`
    says what it gives (None: probabilities where its last node is a softmax, else logits).
    """

    size: tuple[int, int] | None = None
    layout: Literal["nchw", "nhwc"] | None = None
    range: Literal[1, 255] = 1
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    color: Literal["rgb", "bgr"] = "rgb"
    fit: Literal["crop", "stretch"] = "crop"
    resample: Literal["box", "bilinear", "bicubic", "lanczos"] = "bilinear"
    jpeg: Literal["full", "reduced"] = "full"
    scores: Literal["logits", "probabilities"] | None = None

    @classmethod
    def parse(cls, settings: Sequence[str]) -> Preprocessing:
        """Of "KEY=VALUE" texts. Raises ConvlineError for what is not known, naming what is."""
        given: dict[str, Any] = {}
        for setting in settings:
            key, _, value = setting.partition("=")
            if key not in ACCEPTED:
                raise ConvlineError(f"--preprocess {setting}: there is no {key!r}; there are {', '.join(ACCEPTED)}")
            choices = ACCEPTED[key]
            try:
                given[key] = _size(value) if key == "size" else _value(value, choices)
            except ValueError as error:
                accepted = ", ".join(map(str, choices)) or ("32 or 32x48" if key == "size" else "numbers: 0.5,0.5,0.5")
                raise ConvlineError(f"--preprocess {setting}: {key} accepts {accepted}") from error
        return cls(**given)


# what each key accepts; numbers where nothing is listed
ACCEPTED: dict[str, tuple[Any, ...]] = {
    "size": (),
    "layout": ("nchw", "nhwc"),
    "range": (1, 255),
    "mean": (),
    "std": (),
    "color": ("rgb", "bgr"),
    "fit": ("crop", "stretch"),
    "resample": ("box", "bilinear", "bicubic", "lanczos"),
    "jpeg": ("full", "reduced"),
    "scores": ("logits", "probabilities"),
}


@dataclass(frozen=True)
class Foreign:
    """What a foreign file does not say of itself."""

    classes: tuple[str, ...]
    preprocessing: Preprocessing

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def read_classes(path: Path) -> tuple[str, ...]:
    """Class names: a line each, or a JSON list. Raises ConvlineError for anything else."""
    try:
        text = path.read_text(encoding="utf-8-sig").strip()
    except (OSError, ValueError) as error:
        raise ConvlineError(f"{path} does not hold class names, a line each or a JSON list ({error})") from error
    try:
        names = json.loads(text)
    except ValueError:
        names = [name.strip() for name in text.split("\n")]
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names) or not names:
        raise ConvlineError(f"{path} does not hold class names, a line each or a JSON list")
    if repeated := [name for name, count in Counter(names).items() if count > 1]:
        raise ConvlineError(f"{path} names the class {repeated[0]!r} twice")
    return tuple(names)


@dataclass(frozen=True)
class Adapted:
    """A model with the inputs and outputs of our own, what it decodes, and its batch size where that is fixed."""

    model: onnx.ModelProto
    spec: ImageSpec
    batch: int | None


def adapt(model: onnx.ModelProto, foreign: Foreign, name: Path | str) -> Adapted:
    """Put preprocessing before a classifier and a softmax behind it. Raises ModelError where it is no such thing."""
    if (opset := next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 1)) < OLDEST_OPSET:
        raise ModelError(f"{name} is of opset {opset}; {OLDEST_OPSET} is the oldest that is served")
    weights = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in weights]
    if len(inputs) != 1 or not model.graph.output:
        raise ModelError(f"{name} has {len(inputs)} inputs; a classifier of images has one")
    kind = inputs[0].type.tensor_type.elem_type
    if kind not in (*FLOATS, TensorProto.UINT8):
        raise ModelError(f"{name} takes {TensorProto.DataType.Name(kind)}; float, float16 and uint8 are served")
    dims = [dim.dim_value for dim in inputs[0].type.tensor_type.shape.dim]
    told = _complete(foreign.preprocessing, dims, kind, name)
    assert told.size is not None
    spec = ImageSpec(*told.size, dims[1 if told.layout == "nchw" else 3], told.fit, told.resample, jpeg=told.jpeg)
    whole = compose.add_prefix(model, PREFIX)
    graph = whole.graph
    before = _before(PREFIX + inputs[0].name, told, spec, kind)
    behind = _behind(graph, told)
    nodes = [*before, *graph.node, *behind]
    kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:], graph.output[:], graph.value_info[:]
    graph.node.extend(kept)
    own = [value for value in graph.input if value.name in {PREFIX + weight for weight in weights}]
    declared = [onnx.ValueInfoProto.FromString(value.SerializeToString()) for value in own]
    del graph.input[:]
    batch = dims[0] or None
    shape = [batch or "batch", spec.height, spec.width, spec.channels]
    graph.input.extend([helper.make_tensor_value_info("image", TensorProto.UINT8, shape), *declared])
    scores = [batch or "batch", len(foreign.classes)]
    graph.output.extend(helper.make_tensor_value_info(n, TensorProto.FLOAT, scores) for n in ("probability", "logit"))
    return Adapted(whole, spec, batch)


def _complete(told: Preprocessing, dims: list[int], kind: int, name: Path | str) -> Preprocessing:
    """With layout and size as the input's shape tells; checked."""
    if len(dims) != 4:
        raise ModelError(f"{name} takes {len(dims)} dimensions; images in a batch have 4")
    fits = {"nchw": dims[1] in (1, 3), "nhwc": dims[3] in (1, 3)}
    layouts: list[Literal["nchw", "nhwc"]] = [layout for layout in ("nchw", "nhwc") if fits[layout]]
    layout = told.layout or (layouts[0] if len(layouts) == 1 else None)
    if layout is None or not fits[layout]:
        raise ModelError(f"{name} takes {dims}: its channels (1 or 3) are not where they should be; set layout=")
    height, width = dims[2:] if layout == "nchw" else dims[1:3]
    size = told.size or ((height, width) if height and width else None)
    if size is None:
        raise ModelError(f"{name} takes images of any size; say which by --preprocess size=HxW")
    if any(stated and stated != wanted for stated, wanted in zip((height, width), size, strict=True)):
        raise ModelError(f"{name} takes images of {height}x{width}, not of {size[0]}x{size[1]}")
    channels = dims[1] if layout == "nchw" else dims[3]
    for key, values in (("mean", told.mean), ("std", told.std)):
        if len(values) not in (0, 1, channels) or not np.isfinite(values).all() or (key == "std" and 0 in values):
            raise ModelError(f"{name} takes {channels} channels; {key} has {values}")
    if kind == TensorProto.UINT8 and (told.mean or told.std):
        raise ModelError(f"{name} takes pixels as bytes; leave out mean and std")
    return replace(told, layout=layout, size=size)


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


def _behind(graph: onnx.GraphProto, told: Preprocessing) -> list[onnx.NodeProto]:
    """From the network's first output to `logit` and `probability`."""
    output = graph.output[0].name
    is_probability = told.scores == "probabilities" or (told.scores is None and _ends_in_softmax(graph, output))
    own, derived = ("probability", "logit") if is_probability else ("logit", "probability")
    operator, attributes = ("Log", {}) if is_probability else ("Softmax", {"axis": 1})
    return [
        helper.make_node("Flatten", [output], ["scores.flat"], name="scores/Flatten", axis=1),
        helper.make_node("Cast", ["scores.flat"], [own], name=f"{own}/Cast", to=TensorProto.FLOAT),
        helper.make_node(operator, [own], [derived], name=f"{derived}/{operator}", **attributes),
    ]


def _ends_in_softmax(graph: onnx.GraphProto, output: str) -> bool:
    producers = {name: node for node in graph.node for name in node.output}
    node = producers.get(output)
    while node is not None and node.op_type in ("Identity", "Cast", "Reshape", "Flatten", "Squeeze"):
        node = producers.get(node.input[0])
    return node is not None and node.op_type == "Softmax"


def _size(text: str) -> tuple[int, int]:
    height, _, width = text.lower().partition("x")
    size = int(height), int(width or height)
    if min(size) < 1:
        raise ValueError(text)
    return size


def _value(text: str, choices: tuple[Any, ...]) -> Any:
    if not choices:
        return tuple(float(part) for part in text.split(","))
    for choice in choices:
        if str(choice) == text:
            return choice
    raise ValueError(text)
