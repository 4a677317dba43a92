"""`serving inspect`: the classes, metadata and proof of an ONNX file, its multiply-adds and its memory."""

from __future__ import annotations

import hashlib
from collections import Counter
from math import prod
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto, helper

from convline.errors import ModelError
from serving.batch_size import SERVING_BATCH
from serving.model import read_description, takes_any_size
from serving.model_file import CONSTANT_PREFIX, parse_model, read_model
from serving.score_output import opset
from serving.session import one_line_message

BATCH_SIZES = (1, SERVING_BATCH)
FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16)

ValueTypes = dict[str, tuple[tuple[int, ...], int]]  # shape and element type of each value


def inspect(name: Path | str) -> dict[str, Any]:
    """Graph, cost, metadata and proof of a model. The model is not run: `serving classify` tests it when it opens it.

    Multiply-adds are counted for one image in convolutions and in products with trained weights. Memory, in bytes, is
    that of the weights and of the values that are alive at the same time, at its peak, if the nodes run in the order of
    the graph (onnxruntime fuses nodes and needs less, apart from its own workspace). Both are for images of the stored
    size, which are not resized. Raises ModelError as `open_model` does.
    """
    data = read_model(name)
    description = read_description(data, name)
    if description.proof_problem is not None:
        raise ModelError(description.proof_problem)
    spec, metadata = description.spec, description.metadata
    try:
        cost = _cost(parse_model(data, name), (spec.height or 0, spec.width or 0))
    # onnx raises many kinds of exceptions for malformed graphs
    except Exception as error:
        raise ModelError(f"{name} has a malformed graph ({one_line_message(error)}); export it again") from error
    return {
        "file": {"name": str(name), "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()},
        "classes": list(description.classes),
        "image": spec.to_dict(),
        "any_size": takes_any_size(metadata),
        **cost,
        "metadata": {k: v for k, v in metadata.items() if k not in ("classes", "image", "any_size", "probe", "parity")},
        "parity": metadata.get("parity"),
        "self_test": "not run",
    }


def _cost(model: onnx.ModelProto, size: tuple[int, int]) -> dict[str, Any]:
    """The operators of a graph, its parameters, and the multiply-adds and memory for images of `size`."""
    graph = model.graph
    shapes = {batch: _value_types(model, batch, size) for batch in BATCH_SIZES}
    weights = sum(_bytes(tuple(tensor.dims), tensor.data_type) for tensor in graph.initializer)
    return {
        "graph": {
            "opset": opset(model),
            "ir_version": model.ir_version,
            "operators": dict(sorted(Counter(node.op_type for node in graph.node).items())),
            "parameters": _parameters(graph),
            "multiply_adds": _multiply_adds(graph, shapes[1]),
        },
        "memory_bytes": {
            "weights": weights,
            **{f"batch_{batch}": weights + _peak_bytes(graph, shapes[batch]) for batch in BATCH_SIZES},
        },
    }


def _value_types(model: onnx.ModelProto, batch: int, size: tuple[int, int]) -> ValueTypes:
    """Shape and element type of all values, for a batch of so many images of (height, width) `size`."""
    sized = onnx.ModelProto.FromString(model.SerializeToString())
    for value in (*sized.graph.input, *sized.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = batch
    for value in sized.graph.input:  # of any size, in a file exported with --any-size
        for axis, side in zip((1, 2), size, strict=True):
            value.type.tensor_type.shape.dim[axis].dim_value = side
    del sized.graph.value_info[:]  # its shapes have a symbol instead of the batch size
    inferred = onnx.shape_inference.infer_shapes(sized, data_prop=True).graph
    values = (*inferred.input, *inferred.output, *inferred.value_info)
    types = {
        value.name: (tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim), value.type.tensor_type.elem_type)
        for value in values
    }
    return types | {tensor.name: (tuple(tensor.dims), tensor.data_type) for tensor in model.graph.initializer}


def _parameters(graph: onnx.GraphProto) -> int:
    """The number of trained values: floats and quantised integers, without scales and constants."""
    quantizing = [node for node in graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    scales = {name for node in quantizing for name in node.input[1:]}
    quantized = {node.input[0] for node in quantizing}
    return sum(
        prod(tensor.dims)
        for tensor in graph.initializer
        if tensor.dims
        and tensor.name not in scales
        and not tensor.name.startswith(CONSTANT_PREFIX)
        and (tensor.data_type in FLOATS or tensor.name in quantized)
    )


def _multiply_adds(graph: onnx.GraphProto, shapes: ValueTypes) -> int:
    quantized = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "DequantizeLinear"}
    total = 0
    for node in graph.node:
        if node.op_type in ("Conv", "Gemm", "MatMul"):
            weight = quantized.get(node.input[1], node.input[1])
            if not weight.startswith(CONSTANT_PREFIX):
                # a convolution's weight is [out, in, height, width]: an output value sums over all but the first
                terms = prod(shapes[weight][0][1:]) if node.op_type == "Conv" else shapes[node.input[0]][0][-1]
                total += prod(shapes[node.output[0]][0]) * terms
    return total


def _peak_bytes(graph: onnx.GraphProto, shapes: ValueTypes) -> int:
    """The largest number of bytes that values other than weights take at the same time."""
    last_use = {name: index for index, node in enumerate(graph.node) for name in node.input}
    last_use |= {output.name: len(graph.node) for output in graph.output}
    weights = {tensor.name for tensor in graph.initializer}
    # onnxruntime computes with quantised weights directly
    weights |= {
        node.output[0] for node in graph.node if node.op_type == "DequantizeLinear" and node.input[0] in weights
    }
    alive = {value.name for value in graph.input}
    peak = 0
    for index, node in enumerate(graph.node):
        alive |= {name for name in node.output if name}
        peak = max(peak, sum(_bytes(*shapes[name]) for name in alive - weights if name in shapes))
        alive = {name for name in alive if last_use.get(name, -1) > index}
    return peak


def _bytes(shape: tuple[int, ...], kind: int) -> int:
    return prod(shape) * helper.tensor_dtype_to_np_dtype(kind).itemsize
