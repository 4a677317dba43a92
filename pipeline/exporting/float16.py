"""A float32 ONNX graph in float16."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

FLOAT, HALF = TensorProto.FLOAT, TensorProto.FLOAT16


def to_float16(model: onnx.ModelProto, floats: Collection[str]) -> onnx.ModelProto:
    """A copy whose weights and activations are float16, but for the nodes named in `floats`.

    Inputs and outputs keep their types; casts stand only where the precision changes. What an operator does not take
    as float16, by its schema, stays float32, and so does what has a constant that float16 cannot hold (a smallest
    divisor of 1e-12), with the nodes that it feeds.
    """
    half = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    graph, opset = half.graph, half.opset_import[0].version
    outputs = {output.name for output in graph.output}
    weights = {tensor.name: tensor for tensor in graph.initializer}
    types = {value.name: value.type.tensor_type.elem_type for value in (*graph.input, *graph.output, *graph.value_info)}
    types |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    floats = {*floats, *_beyond_float16(graph)}
    nodes: list[onnx.NodeProto] = []

    def in_type(name: str, wanted: int) -> str:
        """The name of a float value in the wanted type; a weight is converted, anything else cast."""
        if types[name] == wanted:
            return name
        other = f"{name}.{'float16' if wanted == HALF else 'float32'}"
        if other not in types and name in weights:
            weights[other] = numpy_helper.from_array(numpy_helper.to_array(weights[name]).astype(np.float16), other)
        elif other not in types:
            nodes.append(_cast(name, other, wanted))
        types[other] = wanted
        return other

    for node in graph.node:
        places = set() if node.name in floats else _narrowable(node, opset)
        for place, name in enumerate(node.input):
            if types.get(name) in (FLOAT, HALF):
                node.input[place] = in_type(name, HALF if place in places else FLOAT)
        nodes.append(node)
        if not places or node.op_type == "Cast":  # which says its output's type itself
            continue
        for place, name in enumerate(node.output):
            if name in outputs:
                node.output[place] = f"{name}.float16"
                nodes.append(_cast(node.output[place], name, FLOAT))
            if types.get(name) == FLOAT:
                types[node.output[place]] = HALF
    used = {name for node in nodes for name in node.input}
    kept = [tensor for name, tensor in weights.items() if name in used]
    for field, values in ((graph.node, nodes), (graph.initializer, kept), (graph.value_info, [])):
        copies = [type(value).FromString(value.SerializeToString()) for value in values]  # they are of this very field
        del field[:]
        field.extend(copies)
    return half


def _beyond_float16(graph: onnx.GraphProto) -> set[str]:
    """Nodes with a weight that overflows, or a single value that vanishes, in float16; and those next to them."""
    beyond = set()
    for tensor in graph.initializer:
        if tensor.data_type == FLOAT:
            values = numpy_helper.to_array(tensor)
            with np.errstate(over="ignore"):
                half = values.astype(np.float16)
            vanishes = values.size == 1 and (half == 0).all() and (values != 0).all()
            if vanishes or (np.isinf(half) & np.isfinite(values)).any():
                beyond.add(tensor.name)
    names = set()
    for node in graph.node:  # in topological order
        if beyond & set(node.input):
            names.add(node.name)
    fed = {name for node in graph.node if node.name in names for name in node.output}
    return names | {node.name for node in graph.node if fed & set(node.input)}


def _cast(name: str, to: str, wanted: int) -> onnx.NodeProto:
    return helper.make_node("Cast", [name], [to], name=f"{to}/Cast", to=wanted)


def _narrowable(node: onnx.NodeProto, opset: int) -> set[int]:
    """The places of a node's inputs whose type may be float16, and whose type its outputs share."""
    schema = onnx.defs.get_schema(node.op_type, opset, node.domain)
    takes = {bound.type_param_str: bound.allowed_type_strs for bound in schema.type_constraints}
    free = {output.type_str for output in schema.outputs if "tensor(float16)" in takes.get(output.type_str, ())}
    # the last formal input of an operator like Concat stands for all that follow
    formal = [schema.inputs[min(place, len(schema.inputs) - 1)].type_str for place in range(len(node.input))]
    return {place for place, kind in enumerate(formal) if kind in free}
