"""What an ONNX file says of itself, and what it costs: `serving inspect`."""

from __future__ import annotations

import hashlib
from collections import Counter
from math import prod
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto, helper

from convline.errors import ModelError
from serving.model import read_described
from serving.model_file import parse_model, read_model
from serving.score_output import opset
from serving.session import message

CONSTANT = "constant."  # what `pipeline export` calls weights that were never trained
BATCHES = (1, 64)
FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16)

Shapes = dict[str, tuple[tuple[int, ...], int]]  # shape and element type of each value


def inspect(name: Path | str) -> dict[str, Any]:
    """Graph, cost, metadata and proof of a model, which is not run: `serving classify` tests it when it opens it.

    Multiply-adds are those of one image in convolutions and products with trained weights. Memory is in bytes: the
    weights, and the most that values need which are alive at once, in the graph's order (onnxruntime fuses nodes and
    needs less, but for its own workspace). Raises ModelError as `open_model` does.
    """
    data = read_model(name)
    told = read_described(data, name)
    if told.unproven is not None:
        raise ModelError(told.unproven)
    try:
        cost = _cost(parse_model(data, name))
    # onnx raises whatever a malformed graph makes it stumble over
    except Exception as error:
        raise ModelError(f"{name} has a graph that makes no sense ({message(error)}); export it again") from error
    return {
        "file": {"name": str(name), "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()},
        "classes": list(told.classes),
        "image": told.spec.to_dict(),
        **cost,
        "metadata": {k: v for k, v in told.metadata.items() if k not in ("classes", "image", "probe", "parity")},
        "parity": told.metadata.get("parity"),
        "self_test": "not run",
    }


def _cost(model: onnx.ModelProto) -> dict[str, Any]:
    """What the graph is made of, and what it takes."""
    graph = model.graph
    shapes = {batch: _shapes(model, batch) for batch in BATCHES}
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
            **{f"batch_{batch}": weights + _peak(graph, shapes[batch]) for batch in BATCHES},
        },
    }


def _shapes(model: onnx.ModelProto, batch: int) -> Shapes:
    """Of all values, at a batch size."""
    sized = onnx.ModelProto.FromString(model.SerializeToString())
    for value in (*sized.graph.input, *sized.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = batch
    del sized.graph.value_info[:]  # which names the batch without saying how large it is
    inferred = onnx.shape_inference.infer_shapes(sized, data_prop=True).graph
    values = (*inferred.input, *inferred.output, *inferred.value_info)
    known = {
        value.name: (tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim), value.type.tensor_type.elem_type)
        for value in values
    }
    return known | {tensor.name: (tuple(tensor.dims), tensor.data_type) for tensor in model.graph.initializer}


def _parameters(graph: onnx.GraphProto) -> int:
    """Trained values: floats, or integers that stand for them, but no scales and no constants."""
    quantizing = [node for node in graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    scales = {name for node in quantizing for name in node.input[1:]}
    quantized = {node.input[0] for node in quantizing}
    return sum(
        prod(tensor.dims)
        for tensor in graph.initializer
        if tensor.dims
        and tensor.name not in scales
        and not tensor.name.startswith(CONSTANT)
        and (tensor.data_type in FLOATS or tensor.name in quantized)
    )


def _multiply_adds(graph: onnx.GraphProto, shapes: Shapes) -> int:
    made_of = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "DequantizeLinear"}
    total = 0
    for node in graph.node:
        if node.op_type in ("Conv", "Gemm", "MatMul"):
            weight = made_of.get(node.input[1], node.input[1])
            if not weight.startswith(CONSTANT):
                # a convolution's weight is [out, in, height, width]: one output value takes all but the first
                taken = prod(shapes[weight][0][1:]) if node.op_type == "Conv" else shapes[node.input[0]][0][-1]
                total += prod(shapes[node.output[0]][0]) * taken
    return total


def _peak(graph: onnx.GraphProto, shapes: Shapes) -> int:
    """The most bytes of values, other than weights, that are alive at once."""
    last_use = {name: place for place, node in enumerate(graph.node) for name in node.input}
    last_use |= {output.name: len(graph.node) for output in graph.output}
    weights = {tensor.name for tensor in graph.initializer}
    # onnxruntime computes with quantized weights as they are
    weights |= {
        node.output[0] for node in graph.node if node.op_type == "DequantizeLinear" and node.input[0] in weights
    }
    alive = {value.name for value in graph.input}
    most = 0
    for place, node in enumerate(graph.node):
        alive |= {name for name in node.output if name}
        most = max(most, sum(_bytes(*shapes[name]) for name in alive - weights if name in shapes))
        alive = {name for name in alive if last_use.get(name, -1) > place}
    return most


def _bytes(shape: tuple[int, ...], kind: int) -> int:
    return prod(shape) * helper.tensor_dtype_to_np_dtype(kind).itemsize
