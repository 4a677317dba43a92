"""`export --any-size`: put the resizing and cropping of `convline.images` in front of an exported graph.

Pillow resizes in two passes, one for each axis, and rounds to bytes after each. Here a pass is a product with a matrix
of weights (`resize_weights`). Sums of bytes and weights of 22 bits do not fit the 24 bits of float32, so each weight is
split into two halves, and the sums of both are exact. Rounded sums would change up to 3% of the values of an enlarged
image by 1 of 255, wherever the exact sum ends in one half.
"""

from __future__ import annotations

from functools import partial

import onnx
from onnx import TensorProto, helper

from convline.errors import ConvlineError
from convline.images import ImageSpec
from pipeline.exporting.graph_values import Nodes, Value
from pipeline.exporting.resize_weights import HALF, Axis

PREFIX = "resize/"
RESIZED = f"{PREFIX}image"  # the value with the stored size, uint8 [batch, height, width, channels]
Weights = tuple[Value, Value]


def check_supported(spec: ImageSpec) -> None:
    """Raises ConvlineError for a policy that would change images of the stored size, which serving passes."""
    height, width = _stored_size(spec)
    if spec.resize not in (None, min(height, width)):
        raise ConvlineError(
            f"--any-size does not support a resize of the shorter side to {spec.resize} before a crop to "
            f"{height}x{width}: images that are prepared already would be resized again; export without --any-size"
        )


def add_resize(model: onnx.ModelProto, spec: ImageSpec) -> onnx.ModelProto:
    """A copy of a graph that takes images of any size, uint8 [batch, height, width, channels].

    Images of the stored size are passed on as they are.
    """
    resizing = onnx.ModelProto.FromString(model.SerializeToString())
    graph = resizing.graph
    for node in graph.node:
        node.input[:] = [RESIZED if name == "image" else name for name in node.input]
    nodes = [
        *_resize_unless_stored_size(spec).nodes,
        *(onnx.NodeProto.FromString(node.SerializeToString()) for node in graph.node),
    ]
    del graph.node[:]
    graph.node.extend(nodes)
    (image,) = (value for value in graph.input if value.name == "image")
    for axis, name in ((1, "height"), (2, "width")):
        image.type.tensor_type.shape.dim[axis].dim_param = name
    onnx.checker.check_model(resizing, full_check=True)
    return resizing


def resizing_part(model: onnx.ModelProto) -> onnx.ModelProto:
    """The part of such a graph that resizes: its only output are the pixels that the network gets."""
    part = onnx.ModelProto.FromString(model.SerializeToString())
    last = next(index for index, node in enumerate(part.graph.node) if RESIZED in node.output)
    del part.graph.node[last + 1 :], part.graph.initializer[:], part.graph.value_info[:], part.graph.output[:]
    part.graph.output.append(helper.make_tensor_value_info(RESIZED, TensorProto.UINT8, [None] * 4))
    return part


def _stored_size(spec: ImageSpec) -> tuple[int, int]:
    assert spec.height is not None and spec.width is not None
    return spec.height, spec.width


def _resize_unless_stored_size(spec: ImageSpec) -> Nodes:
    height, width = _stored_size(spec)
    nodes = Nodes(PREFIX)
    image = Value(nodes, "image", "uint8")
    pixels = nodes.either(
        image.axis(1).equals(height) & image.axis(2).equals(width),
        lambda branch: image.within(branch).unary("Identity"),
        lambda branch: _resize(image.within(branch), spec),
    )
    # states the shape, which the branches hide from the inference of shapes
    batch = nodes.value("Shape", image, dtype="int64", start=0, end=1)
    shape = nodes.concat(batch, nodes.constant([height, width, spec.channels], "int64"))
    nodes.value("Reshape", pixels, shape, dtype="uint8")
    nodes.nodes[-1].output[:] = [RESIZED]
    return nodes


def _resize(image: Value, spec: ImageSpec) -> Value:
    """uint8 [batch, height, width, channels] of the stored size, of an image of any size."""
    nodes = image.nodes
    lengths = image.axis(1), image.axis(2)
    axes = [
        Axis(length, resized, _offset(resized, target, spec), target, spec.resample)
        for length, resized, target in zip(lengths, _resized_size(*lengths, spec), _stored_size(spec), strict=True)
    ]
    rows, columns = axes
    bounds = [
        nodes.concat(*(bound.reshaped(1) for bound in pair))
        for pair in zip(rows.pixels_read(), columns.pixels_read(), strict=True)
    ]
    pixels = nodes.value("Slice", image, *bounds, nodes.constant([1, 2], "int64"), dtype="uint8")
    pixels = pixels.unary("Transpose", perm=[0, 3, 1, 2]).to("float32")
    down, across = (partial(_pass_down, weights=rows.weights()), partial(_pass_across, weights=columns.weights()))
    shrinks = rows.length - rows.resized
    resized = nodes.either(  # the order of Pillow 13
        (shrinks > 0) & (shrinks > (columns.length - columns.resized) * 2),
        lambda branch: across(down(pixels.within(branch))),
        lambda branch: down(across(pixels.within(branch))),
    )
    return resized.to("uint8").unary("Transpose", perm=[0, 2, 3, 1])


def _resized_size(height: Value, width: Value, spec: ImageSpec) -> tuple[Value, Value]:
    """(height, width) before the crop, with the integers and the rounding of `convline.images`."""
    target_height, target_width = (height.nodes.constant(side, "int64") for side in _stored_size(spec))
    if spec.fit == "stretch":
        return target_height, target_width
    if spec.version == 1:
        return _covering_size_rounded(height, width, target_height, target_width)
    if spec.fit == "pad":
        return _contained_size(height, width, target_height, target_width)
    if spec.resize is not None:
        target_height = target_width = height.nodes.constant(spec.resize, "int64")
    is_tall = target_width * height >= target_height * width
    return (
        is_tall.where(target_width * height // width, target_height),
        is_tall.where(target_width, target_height * width // height),
    )


def _covering_size_rounded(
    height: Value, width: Value, target_height: Value, target_width: Value
) -> tuple[Value, Value]:
    """As `spec.version` 1."""
    sides, targets = [side.to("float64") for side in (height, width)], (target_height, target_width)
    ratios = [target.to("float64") / side for side, target in zip(sides, targets, strict=True)]
    scale = ratios[0].at_least(ratios[1])
    resized = [
        (side * scale).rounded().to("int64").at_least(target) for side, target in zip(sides, targets, strict=True)
    ]
    return resized[0], resized[1]


def _contained_size(height: Value, width: Value, target_height: Value, target_width: Value) -> tuple[Value, Value]:
    real_height, real_width = height.to("float64"), width.to("float64")
    fitted_height = (real_height / real_width * target_width.to("float64")).rounded().to("int64").at_least(1)
    fitted_width = (real_width / real_height * target_height.to("float64")).rounded().to("int64").at_least(1)
    is_wide = width * target_height >= height * target_width
    return is_wide.where(fitted_height, target_height), is_wide.where(target_width, fitted_width)


def _offset(side: Value, target: int, spec: ImageSpec) -> Value:
    """Where the central `target` pixels of a resized side begin; negative if it has fewer pixels."""
    if spec.version == 1:
        return (side - target) // 2
    centred = ((side - target).to("float64") / 2).rounded().to("int64")
    if spec.fit == "pad":
        return centred
    missing = -side + target
    return (side < target).where(-(missing // 2), centred)


def _pass_across(pixels: Value, weights: Weights) -> Value:
    """Resize each row of [batch, channels, height, width]."""
    high, low = (half.within(pixels.nodes).unary("Transpose", perm=[1, 0]) for half in weights)
    return _to_bytes(pixels @ high, pixels @ low)


def _pass_down(pixels: Value, weights: Weights) -> Value:
    """Resize each column of [batch, channels, height, width]."""
    high, low = (half.within(pixels.nodes) for half in weights)
    return _to_bytes(high @ pixels, low @ pixels)


def _to_bytes(high: Value, low: Value) -> Value:
    """(high * 2^11 + low) / 2^22, rounded, from 0 to 255, in float32. Each step is exact."""
    return (((low / HALF).floor() + high + HALF / 2) / HALF).floor().at_least(0).at_most(255)
