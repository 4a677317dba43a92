"""Correct the biases of int8 layers: rounded weights shift the mean of a layer's outputs, and its bias takes that back.

Source: Nagel et al., Data-Free Quantization Through Weight Equalization and Bias Correction (2019), section 4.2, with
means over calibration images. Depthwise convolutions gain most, whose outputs are sums of few products.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from serving.session import open_session


@dataclass(frozen=True)
class Correction:
    """What is added to the bias of a layer: float32 [outputs]. `layer` and `bias` are names of a node and a tensor."""

    layer: str
    bias: str
    change: NDArray[np.float32]


def bias_corrections(
    model: onnx.ModelProto, quantized: onnx.ModelProto, layers: Collection[str], images: Iterator[NDArray[np.uint8]]
) -> list[Correction]:
    """For each of the `layers`: the mean, over images and positions, of its outputs if its weights were their errors.

    An error is a weight of `model` less the same in `quantized`. Layers without a bias, and those that share their
    weights or their bias with another node, have no correction. `images` are batches as stored, uint8
    [n, height, width, channels].
    """
    biases = _own_biases(model, layers)
    if not biases:
        return []
    nodes = [node for node in model.graph.node if node.name in biases]
    session, _ = open_session(_error_model(model, quantized, nodes).SerializeToString(), "cpu")
    sums: list[NDArray[np.float64]] = [np.zeros(())] * len(nodes)
    count = 0
    for batch in images:
        means = session.run(None, {"image": batch})
        sums = [total + mean.astype(np.float64) * len(batch) for total, mean in zip(sums, means, strict=True)]
        count += len(batch)
    changes = [(total / count).astype(np.float32) for total in sums]
    return [Correction(node.name, biases[node.name], change) for node, change in zip(nodes, changes, strict=True)]


def corrected(
    model: onnx.ModelProto, corrections: Collection[Correction], float_layers: Collection[str]
) -> onnx.ModelProto:
    """A copy of `model`, which is in float32, with the biases of all layers corrected but those of `float_layers`."""
    result = onnx.ModelProto.FromString(model.SerializeToString())
    tensors = {tensor.name: tensor for tensor in result.graph.initializer}
    for correction in corrections:
        if correction.layer not in float_layers:
            bias = tensors[correction.bias]
            bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias) + correction.change, bias.name))
    return result


def _own_biases(model: onnx.ModelProto, layers: Collection[str]) -> dict[str, str]:
    """By layer, the tensor that is its bias: its third input, or what the next node adds to a product of matrices."""
    uses = Counter(name for node in model.graph.node for name in node.input)
    own = {tensor.name for tensor in model.graph.initializer if uses[tensor.name] == 1}
    vectors = own & {tensor.name for tensor in model.graph.initializer if len(tensor.dims) == 1}
    additions = {name: node for node in model.graph.node if node.op_type == "Add" for name in node.input}
    biases: dict[str, str] = {}
    for node in model.graph.node:
        if node.name not in layers or node.input[1] not in own:
            continue
        candidates = node.input[2:]
        if node.op_type == "MatMul" and uses[node.output[0]] == 1 and node.output[0] in additions:
            candidates = additions[node.output[0]].input
        biases.update((node.name, name) for name in candidates if name in vectors)
    return biases


def _error_model(
    model: onnx.ModelProto, quantized: onnx.ModelProto, layers: Collection[onnx.NodeProto]
) -> onnx.ModelProto:
    """`model` with a twin of each layer that has the same input, and the errors of its weights as weights. The graph's
    outputs are the means of the twins' outputs, [outputs] each."""
    result = onnx.ModelProto.FromString(model.SerializeToString())
    graph = result.graph
    del graph.output[:]
    ranks = {tensor.name: len(tensor.dims) for tensor in model.graph.initializer}
    stored = {tensor.name: tensor for tensor in quantized.graph.initializer}
    dequantizers = {node.input[0]: node for node in quantized.graph.node if node.op_type == "DequantizeLinear"}
    for layer in layers:
        weight, prefix = layer.input[1], f"{layer.name}/error"
        dequantizer = dequantizers[f"{weight}_quantized"]
        twin = onnx.NodeProto.FromString(layer.SerializeToString())
        del twin.input[:], twin.output[:]
        twin.name = f"{prefix}/layer"
        twin.input.extend([layer.input[0], f"{prefix}/weight"])
        twin.output.append(f"{prefix}/output")
        graph.initializer.extend(stored[name] for name in dequantizer.input)
        graph.node.extend(
            [dequantizer, helper.make_node("Sub", [weight, dequantizer.output[0]], [f"{prefix}/weight"]), twin]
        )
        rows, axes = twin.output[0], [axis for axis in range(ranks[weight]) if axis != 1]
        if layer.op_type == "MatMul":  # the only one whose outputs lie along its last axis
            rows, axes = f"{prefix}/rows", [0]
            graph.node.append(helper.make_node("Flatten", [twin.output[0]], [rows], axis=-1))
        graph.initializer.append(numpy_helper.from_array(np.array(axes), f"{prefix}/axes"))
        graph.node.append(helper.make_node("ReduceMean", [rows, f"{prefix}/axes"], [f"{prefix}/mean"], keepdims=0))
        graph.output.append(helper.make_tensor_value_info(f"{prefix}/mean", TensorProto.FLOAT, None))
    return result
